"""Held-out evaluation: every score with its interval, greedy and sampled, and the paired difference RL made."""

from collections.abc import Callable
from typing import Any

from recipes.data import prompts
from recipes.session import Session
from recipes.statistics import mean_interval, paired_difference
from rewards.verdict import Verdict

EVALUATION_STEP = -1  # its own sampling seeds, the same for every model that is compared
Answers = dict[str, list[dict[str, Any]]]


def answer(session: Session) -> Answers:
    """Collective: the engines' present weights answer every held-out prompt, greedy and sampled.

    Returns {"greedy": rows, "sampled": rows}; a row is {id, response, scores: {score name: verdict}}.
    """
    config = session.config
    rows = prompts.load_rows(config.data.evaluation)
    asked = [session.prompts(row).prompt for row in rows]
    found: Answers = {}
    for name, count, temperature in (
        ("greedy", 1, 0.0),
        ("sampled", config.data.evaluation_samples, config.rollout.temperature),
    ):
        samples, _ = session.generate(asked, count, EVALUATION_STEP, temperature)
        texts = [session.text(sample) for sample in samples]
        found[name] = [
            {"id": row["id"], "response": text, "scores": judge(session.verifiers, config.data.scores, row, text)}
            for row, text in ((rows[i // count], text) for i, text in enumerate(texts))
        ]
    return found


def judge(
    verifiers: dict[str, Callable[..., Verdict]], scores: dict[str, list[str]], row: prompts.Row, response: str
) -> dict[str, dict[str, Any]]:
    """The verdicts of the verifiers that score this kind of row."""
    verdicts = {name: verifiers[name](row, response) for name, kinds in scores.items() if row["kind"] in kinds}
    return {name: {"score": verdict.score, "label": verdict.label} for name, verdict in verdicts.items()}


def summary(answers: Answers, names: list[str]) -> dict[str, Any]:
    """{score: {mean, interval, n}, "sampled": the same} of one model's answers."""
    of = {mode: {name: mean_interval(*_column(rows, name)) for name in names} for mode, rows in answers.items()}
    return {**of["greedy"], "sampled": of["sampled"]}


def difference(before: Answers, after: Answers, names: list[str]) -> dict[str, Any]:
    """Paired after − before on the same prompts, shaped like ``summary``."""
    of = {
        mode: {
            name: paired_difference(
                _column(before[mode], name)[0], _column(after[mode], name)[0], _column(after[mode], name)[1]
            )
            for name in names
        }
        for mode in after
    }
    return {**of["greedy"], "sampled": of["sampled"]}


def report(session: Session, stages: dict[str, Answers]) -> dict[str, Any]:
    """evaluation.json: summaries of ``base``, ``before`` and ``after`` RL, the difference, and greedy transcripts."""
    names = list(session.config.data.scores)
    rows = {row["id"]: row for row in prompts.load_rows(session.config.data.evaluation)}
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
                    stage: ", ".join(f"{name}: {s['label']}" for name, s in entry["scores"].items())
                    for stage, entry in greedy.items()
                },
            }
        )
    return {
        **{stage: summary(answers, names) for stage, answers in stages.items()},
        "difference": difference(stages["before"], stages["after"], names),
        "transcripts": transcripts,
    }


def _column(rows: list[dict[str, Any]], name: str) -> tuple[list[float], list[str]]:
    chosen = [row for row in rows if name in row["scores"]]
    return [row["scores"][name]["score"] for row in chosen], [row["id"] for row in chosen]
