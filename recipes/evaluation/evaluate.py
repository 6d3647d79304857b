"""Held-out evaluation: every score with its interval, greedy and sampled, and the paired difference training made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from recipes.data.rows import Row, load_rows
from recipes.evaluation import voting
from recipes.evaluation.statistics import mean_interval, paired_difference
from rewards.verifiers.text import THINK_BEGIN, THINK_END
from rollout.sample import Sample

if TYPE_CHECKING:  # the ladder, which starts nothing itself, reads this module too
    from recipes.training.session import Session

EVALUATION_STEP = -1  # its own sampling seeds, the same for every model that is compared
MODELS = ["base", "before", "after"]  # that one launch compares; a base only where it trains twice
Answers = dict[str, list[dict[str, Any]]]


def asked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration's evaluation asks: answers to equal ones can be compared."""
    data, rollout = config["data"], config["rollout"]
    return {
        "seed": config["seed"],
        **{name: data[name] for name in ("evaluation", "evaluation_samples", "max_prompt_tokens", "scores")},
        **{name: rollout[name] for name in ("temperature", "top_p", "max_response_tokens", "thinking_budget")},
    }


def answer(session: Session) -> Answers:
    """Collective: the engines' present weights answer every held-out prompt, greedy and ``data.evaluation_samples``
    times sampled.

    Returns {"greedy": rows, "sampled": rows}; a row is {id, response, thinking_tokens, scores: {score name: verdict or
    failure}}.
    """
    config = session.config
    rows = load_rows(config.data.evaluation)
    by_id = {row["id"]: row for row in rows}
    asked = [session.prompts(row).prompt for row in rows]
    found: Answers = {}
    for name, count, temperature in (
        ("greedy", 1, 0.0),
        ("sampled", config.data.evaluation_samples, config.rollout.temperature),
    ):
        if count == 0:
            continue
        samples, scores = session.generate(asked, count, EVALUATION_STEP, temperature, partial(judge, session, by_id))
        found[name] = [
            {
                "id": rows[i // count]["id"],
                "response": session.text(sample),
                "thinking_tokens": thinking_tokens(session, sample),
                "scores": judged,
            }
            for i, (sample, judged) in enumerate(zip(samples, scores, strict=True))
        ]
    return found


def thinking_tokens(session: Session, sample: Sample) -> int:
    """Tokens up to the end of the thinking: none where there is no thinking, all where it does not end."""
    text = session.text(sample)
    if THINK_END in text:
        return len(session.tokenizer.encode(text.partition(THINK_END)[0], add_special_tokens=False))
    return len(sample.response_token_ids) if THINK_BEGIN in text else 0


def judge(session: Session, rows: dict[str, Row], sample: Sample) -> dict[str, dict[str, Any]]:
    """What the verifiers that score this kind of row say, as JSON; runs beside the engines in several threads."""
    row = rows[sample.prompt_id]
    names = [name for name, kinds in session.config.data.scores.items() if row["kind"] in kinds]
    return session.judge(row, sample, names)


def summary(answers: Answers, names: list[str]) -> dict[str, Any]:
    """{score: {mean, interval, n}, "sampled": the same, if any} of one model's answers; without the scores that no
    answer got a verdict of."""
    of: dict[str, Any] = {
        mode: {name: mean_interval(*column) for name in names if (column := _column(rows, name))[0]}
        for mode, rows in answers.items()
    }
    return of.pop("greedy") | of


def difference(before: Answers, after: Answers, names: list[str]) -> dict[str, Any]:
    """Paired after − before on the same prompts, shaped like ``summary``; without the scores that no pair has."""
    of: dict[str, Any] = {
        mode: {
            name: paired_difference(*pairs) for name in names if (pairs := _pairs(before[mode], after[mode], name))[0]
        }
        for mode in after
    }
    return of.pop("greedy") | of


def report(session: Session, stages: dict[str, Answers]) -> dict[str, Any]:
    """evaluation.json: summaries of the models (``MODELS``), the last difference, and greedy transcripts; of search
    questions also ``votes``, what several sampled answers say together (``recipes.evaluation.voting``)."""
    names = list(session.config.data.scores)
    rows = {row["id"]: row for row in load_rows(session.config.data.evaluation)}
    transcripts = []
    for i, (row_id, row) in enumerate(rows.items()):
        greedy = {stage: answers["greedy"][i] for stage, answers in stages.items()}
        transcripts.append(
            {
                "id": row_id,
                "kind": row["kind"],
                "prompt": row["prompt"],
                **{stage: entry["response"] for stage, entry in greedy.items()},
                "labels": {
                    stage: ", ".join(f"{name}: {s.get('label', 'no verdict')}" for name, s in entry["scores"].items())
                    for stage, entry in greedy.items()
                },
            }
        )
    votes = {
        stage: voting.search_summary(answers["sampled"])
        for stage, answers in stages.items()
        if {"search_accuracy", "search_reliability"} <= {*names} and "sampled" in answers
    }
    return {
        "stage": session.config.stage.name,
        **{stage: summary(answers, names) for stage, answers in stages.items()},
        "difference": difference(stages["before"], stages["after"], names),
        "transcripts": transcripts,
        **({"votes": votes} if votes else {}),
    }


def scored(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The answers that this verifier gave a verdict on."""
    return [row for row in rows if _score(row, name) is not None]


def _column(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[str]]:
    chosen = scored(rows, name)
    return [row["scores"][name]["score"] for row in chosen], [row["id"] for row in chosen]


def _pairs(
    before: list[dict[str, Any]], after: list[dict[str, Any]], name: str
) -> tuple[list[float], list[float], list[str]]:
    """Scores before and after and the prompt, of the answers that have a verdict on both sides."""
    found = [(_score(b, name), _score(a, name), a["id"]) for b, a in zip(before, after, strict=True)]
    both = [(b, a, row_id) for b, a, row_id in found if b is not None and a is not None]
    return [b for b, _, _ in both], [a for _, a, _ in both], [row_id for _, _, row_id in both]


def _score(row: dict[str, Any], name: str) -> float | None:
    """None where this verifier wasn't asked or gave no verdict."""
    return row["scores"].get(name, {}).get("score")
