"""evaluation.json from made-up answers: means, paired differences and transcripts."""

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from recipes.evaluation import evaluate
from recipes.evaluation.statistics import mean_interval, paired_difference
from recipes.run import records
from recipes.run.display import result_table
from recipes.training.session import Session
from rewards.verdict import Verdict
from rollout.sample import Prompt
from tests.recipes import tiny

SCORES = {"safety": ["harmful", "benign"], "capability": ["task"]}
ROWS = [("h", "harmful"), ("b", "benign"), ("t", "task")]


def answers(greedy: dict[str, float], sampled: dict[str, list[float]]) -> dict[str, list[dict[str, Any]]]:
    """Answers whose scores are given by row id; the benign row is scored on safety like the harmful one."""

    def row(row_id: str, score: float) -> dict[str, Any]:
        name = "capability" if row_id == "t" else "safety"
        return {"id": row_id, "response": f"{row_id} {score}", "scores": {name: {"score": score, "label": str(score)}}}

    return {
        "greedy": [row(row_id, greedy[row_id]) for row_id, _ in ROWS],
        "sampled": [row(row_id, score) for row_id, _ in ROWS for score in sampled[row_id]],
    }


BEFORE = answers({"h": 0.0, "b": 1.0, "t": 0.0}, {"h": [0.0, 0.5], "b": [1.0, 1.0], "t": [0.0, 1.0]})
AFTER = answers({"h": 1.0, "b": 1.0, "t": 1.0}, {"h": [1.0, 0.5], "b": [1.0, 0.0], "t": [1.0, 1.0]})


def test_a_summary_counts_prompts_not_samples() -> None:
    found = evaluate.summary(BEFORE, list(SCORES))
    assert found["safety"] == mean_interval([0.0, 1.0], ["h", "b"])
    assert found["capability"] == mean_interval([0.0], ["t"])
    assert found["sampled"]["safety"] == mean_interval([0.0, 0.5, 1.0, 1.0], ["h", "h", "b", "b"])
    assert found["sampled"]["safety"]["mean"] == pytest.approx((0.25 + 1.0) / 2)
    assert (found["safety"]["n"], found["sampled"]["safety"]["n"], found["sampled"]["capability"]["n"]) == (2, 2, 1)


def test_a_difference_pairs_the_same_prompts() -> None:
    found = evaluate.difference(BEFORE, AFTER, list(SCORES))
    assert found["safety"] == paired_difference([0.0, 1.0], [1.0, 1.0], ["h", "b"])
    assert found["safety"]["mean"] == 0.5
    assert found["sampled"]["safety"]["mean"] == pytest.approx((0.5 - 0.5) / 2)
    assert found["sampled"]["capability"]["mean"] == 0.5


def test_only_the_verifiers_of_a_kind_judge_a_row() -> None:
    asked = []

    def verifier(name: str) -> Any:
        def score(row: Any, response: str) -> Verdict:
            asked.append((name, row["id"], response))
            return Verdict(0.25, f"{name} says so")

        return score

    session: Any = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(scores=SCORES)),
        text=lambda sample: "yes",
        verifiers={name: verifier(name) for name in ("safety", "capability")},
        turns=None,
    )
    session.judge = partial(Session.judge, session)
    sample: Any = SimpleNamespace(prompt_id="b", failure="")
    found = evaluate.judge(session, {"b": {"id": "b", "kind": "benign"}}, sample)
    assert found == {"safety": {"score": 0.25, "label": "safety says so", "raw": ""}}
    assert asked == [("safety", "b", "yes")]


def test_an_answer_without_a_verdict_is_in_no_mean_and_its_pair_in_no_difference() -> None:
    after = copy.deepcopy(AFTER)
    after["greedy"][0]["scores"]["safety"] = {"reason": "no reply", "raw": ""}
    assert evaluate.summary(after, list(SCORES))["safety"] == mean_interval([1.0], ["b"])
    assert evaluate.difference(BEFORE, after, list(SCORES))["safety"] == paired_difference([1.0], [1.0], ["b"])


def test_a_score_without_any_verdict_is_left_out_and_has_no_row_in_the_tables() -> None:
    after = copy.deepcopy(AFTER)
    for row in after["greedy"][:2]:
        row["scores"]["safety"] = {"reason": "no reply", "raw": ""}
    models = {"before": BEFORE, "after": after}
    evaluation = {name: evaluate.summary(answers, list(SCORES)) for name, answers in models.items()}
    evaluation |= {"stage": "rl", "difference": evaluate.difference(BEFORE, after, list(SCORES))}
    assert "safety" in evaluation["before"]
    assert list(evaluation["after"]) == list(evaluation["difference"]) == ["capability", "sampled"]
    modes = [(name, mode) for name, mode, _, _ in records.evaluation_rows(evaluation)]
    assert modes == [("capability", "greedy"), ("capability", "sampled"), ("safety", "sampled")]
    assert [text.strip() for text in result_table(evaluation).columns[0].cells] == ["capability", "", "safety"]


def test_the_report_has_every_stage_the_difference_and_all_transcripts(tmp_path: Path) -> None:
    data = tmp_path / "eval.jsonl"
    data.write_text(
        "".join(
            f'{{"id": "{row_id}", "label": "safety", "kind": "{kind}", "prompt": "say {row_id}"}}\n'
            for row_id, kind in ROWS
        )
    )
    asked = SimpleNamespace(scores=SCORES, evaluation=str(data))
    session: Any = SimpleNamespace(config=SimpleNamespace(data=asked, stage=SimpleNamespace(name="rl_safety")))
    found = evaluate.report(session, {"base": BEFORE, "before": BEFORE, "after": AFTER})
    assert found["stage"] == "rl_safety"
    assert found["base"] == found["before"] == evaluate.summary(BEFORE, list(SCORES))
    assert found["after"] == evaluate.summary(AFTER, list(SCORES))
    assert found["difference"] == evaluate.difference(BEFORE, AFTER, list(SCORES))
    assert [item["id"] for item in found["transcripts"]] == ["h", "b", "t"]
    assert found["transcripts"][0] == {
        "id": "h",
        "kind": "harmful",
        "prompt": "say h",
        "base": "h 0.0",
        "before": "h 0.0",
        "after": "h 1.0",
        "labels": {"base": "safety: 0.0", "before": "safety: 0.0", "after": "safety: 1.0"},
    }


def test_every_prompt_is_answered_greedily_and_sampled_with_seeds_of_its_own(tmp_path: Path) -> None:
    """``answer`` on a session whose engine answers with the prompt's id, the sample's index and the temperature."""
    rows = tiny.make_rows(1)
    data = tmp_path / "eval.jsonl"
    tiny.write_rows(data, rows)
    calls = []

    def generate(
        prompts: Any, samples_per_prompt: int, step: int, temperature: float, on_sample: Any
    ) -> tuple[list[Any], list[Any]]:
        calls.append((samples_per_prompt, step, temperature))
        made = [
            SimpleNamespace(prompt_id=p.prompt_id, failure="", text=f"{p.prompt_id}/{i}/{temperature}")
            for p in prompts
            for i in range(samples_per_prompt)
        ]
        return made, [on_sample(sample) for sample in made]

    session: Any = SimpleNamespace(
        config=SimpleNamespace(
            data=SimpleNamespace(
                evaluation=str(data), max_prompt_tokens=40, evaluation_samples=2, scores={"letters": ["task"]}
            ),
            rollout=SimpleNamespace(temperature=0.7),
        ),
        prompts=lambda row: SimpleNamespace(prompt=Prompt(row["id"], (1,))),
        verifiers={"letters": tiny.letters},
        generate=generate,
        text=lambda sample: sample.text,
        turns=None,
    )
    session.judge = partial(Session.judge, session)
    found = evaluate.answer(session)
    assert calls == [(1, evaluate.EVALUATION_STEP, 0.0), (2, evaluate.EVALUATION_STEP, 0.7)]
    assert [row["response"] for row in found["greedy"]] == [f"{row['id']}/0/0.0" for row in rows]
    assert [row["response"] for row in found["sampled"]] == [f"{row['id']}/{i}/0.7" for row in rows for i in range(2)]
    for row in found["greedy"] + found["sampled"]:
        assert list(row["scores"]) == (["letters"] if row["id"] == "task-0" else [])
