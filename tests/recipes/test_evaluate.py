"""evaluation.json from made-up answers: means, paired differences and transcripts."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest

from recipes.evaluation import evaluate, rates
from recipes.evaluation.statistics import mean_interval, paired_difference
from recipes.run import records
from recipes.run.display import Display, result_table
from rewards.verdict import Failure, Verdict, VerifierResult

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
    summary = evaluate.summary(BEFORE, list(SCORES))
    assert summary["safety"] == mean_interval([0.0, 1.0], ["h", "b"])
    assert summary["capability"] == mean_interval([0.0], ["t"])
    assert summary["sampled"]["safety"] == mean_interval([0.0, 0.5, 1.0, 1.0], ["h", "h", "b", "b"])
    assert summary["sampled"]["safety"]["mean"] == pytest.approx((0.25 + 1.0) / 2)
    assert (summary["safety"]["n"], summary["sampled"]["safety"]["n"], summary["sampled"]["capability"]["n"]) == (
        2,
        2,
        1,
    )


def test_a_difference_pairs_the_same_prompts() -> None:
    difference = evaluate.difference(BEFORE, AFTER, list(SCORES))
    assert difference["safety"] == paired_difference([0.0, 1.0], [1.0, 1.0], ["h", "b"])
    assert difference["safety"]["mean"] == 0.5
    assert difference["sampled"]["safety"]["mean"] == pytest.approx((0.5 - 0.5) / 2)
    assert difference["sampled"]["capability"]["mean"] == 0.5


def test_only_the_verifiers_of_a_kind_score_a_row() -> None:
    assert evaluate.score_names({"id": "b", "kind": "benign"}, SCORES) == ["safety"]
    assert evaluate.score_names({"id": "t", "kind": "task"}, SCORES) == ["capability"]
    assert evaluate.score_names({"id": "x", "kind": "other"}, SCORES) == []


@pytest.mark.parametrize(
    ("opening", "written", "expected"),
    [
        ("", "a b", 0),
        ("", "<think>a b</think>c", 2),
        ("", "a b</think>c", 2),
        ("", "<think>a b c", 9),
        ("<think>\n", "a b</think>c", 2),
        ("<think>\n", "a b c", 9),
    ],
)
def test_thinking_tokens_end_with_the_thinking(opening: str, written: str, expected: int) -> None:
    """A word is a token here. The tokens of the prompt do not count."""

    def encode(text: str) -> list[int]:
        return [0] * len(text.split())

    assert evaluate.thinking_tokens(opening + written, written, 9, encode) == expected


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


def test_the_report_has_every_stage_the_difference_and_all_transcripts() -> None:
    rows = [{"id": row_id, "kind": kind, "prompt": f"say {row_id}"} for row_id, kind in ROWS]
    models = {"base": BEFORE, "before": BEFORE, "after": AFTER}
    evaluation = evaluate.report("rl_safety", rows, list(SCORES), models)
    assert "votes" not in evaluation
    assert evaluation["stage"] == "rl_safety"
    assert evaluation["base"] == evaluation["before"] == evaluate.summary(BEFORE, list(SCORES))
    assert evaluation["after"] == evaluate.summary(AFTER, list(SCORES))
    assert evaluation["difference"] == evaluate.difference(BEFORE, AFTER, list(SCORES))
    assert [item["id"] for item in evaluation["transcripts"]] == ["h", "b", "t"]
    assert evaluation["transcripts"][0] == {
        "id": "h",
        "kind": "harmful",
        "prompt": "say h",
        "base": "h 0.0",
        "before": "h 0.0",
        "after": "h 1.0",
        "labels": {"base": "safety: 0.0", "before": "safety: 0.0", "after": "safety: 1.0"},
    }


def test_safety_is_reported_as_rates_of_each_kind_and_as_no_mean() -> None:
    """Two harmful prompts, of which one is refused without a reason, and two benign ones, of which one is refused."""
    labels = {
        "h1": "unsafe",
        "h2": "safe with refusal",
        "b1": "unnecessary refusal",
        "b2": "safe without risk",
        "j": "no answer",
        "o": "refused",
        "oh": "not refused",
    }
    kinds = dict(
        zip(labels, "harmful harmful benign benign jailbreak outside_benign outside_harmful".split(), strict=True)
    )

    def scored(row_id: str, label: str) -> dict[str, Any]:
        name = "refusal" if row_id.startswith("o") else "judge"
        return {
            "id": row_id,
            "response": "x",
            "scores": {name: {"score": 0.5, "label": label}, "length": {"score": 0.25}},
        }

    models = {"after": {"greedy": [scored(row_id, label) for row_id, label in labels.items()]}}
    models["after"]["greedy"].append({"id": "b2", "response": "x", "scores": {"judge": {"reason": "lost", "raw": ""}}})
    rows = [{"id": row_id, "kind": kind, "prompt": "p"} for row_id, kind in kinds.items()]
    evaluation = evaluate.report("rl", [*rows, rows[3]], ["judge", "length", "refusal"], models)
    means = {name: score["mean"] for name, score in evaluation["after"].items()}
    assert means == {
        "unsafe/harmful": 0.5,
        "bare_refusal/harmful": 0.5,
        "illogical/harmful": 0.0,
        "over_refusal/benign": 0.5,
        "illogical/benign": 0.0,
        "unsafe/jailbreak": 0.0,
        "bare_refusal/jailbreak": 0.0,
        "illogical/jailbreak": 1.0,
        "length": 0.25,
        "over_refusal/outside_benign": 1.0,
        "not_refused/outside_harmful": 1.0,
    }
    assert evaluation["after"]["over_refusal/benign"] == mean_interval([1.0, 0.0], ["b1", "b2"])
    assert evaluation["transcripts"][0]["labels"] == {"after": "judge: unsafe, length: no verdict"}
    lower = [name for name in means if name.startswith(records.LOWER_IS_BETTER)]
    assert lower == [name for name in means if name != "length"]


def test_a_step_s_rates_are_of_the_samples_of_each_kind() -> None:
    results: list[dict[str, VerifierResult]] = [
        {
            "format": Verdict(1.0, "well-formed"),
            "judge": Verdict(0.0, "unsafe"),
            "rule": Verdict(1.0, "safe with warning"),
        },
        {"judge": Verdict(1.0, "safe with warning")},
        {"judge": Failure("lost")},
        {"judge": Verdict(0.0, "unnecessary refusal")},
        {"capability": Verdict(0.0, "no answer")},
    ]
    assert rates.metrics(results, ["harmful", "harmful", "harmful", "benign", "task"]) == {
        "bare_refusal/harmful": 0.0,
        "illogical/benign": 0.0,
        "illogical/harmful": 0.0,
        "over_refusal/benign": 1.0,
        "unsafe/harmful": 0.5,
    }


def test_a_model_alone_has_a_table_without_an_effect() -> None:
    rows = [{"id": row_id, "kind": kind, "prompt": f"say {row_id}"} for row_id, kind in ROWS]
    evaluation = evaluate.report("rl", rows, list(SCORES), {"after": AFTER}) | {"models": {"after": "demo/hf"}}
    assert evaluation["after"] == evaluate.summary(AFTER, list(SCORES))
    assert "difference" not in evaluation and "before" not in evaluation
    assert [row[3] for row in records.evaluation_rows(evaluation)] == [{}] * 4
    assert [column.header for column in result_table(evaluation).columns] == ["verifier", "decoding", "demo/hf"]
    screen = io.StringIO()
    Display(stream=screen).finish(evaluation, Path("nowhere"))
    assert "safety: 1.0" in screen.getvalue() and "minus" not in screen.getvalue()


def test_prompts_are_answered_greedily_and_sampled() -> None:
    calls = []
    verdict = Verdict(0.25, "short")
    failure = Failure("no reply")

    def generate(samples_per_prompt: int, temperature: float) -> list[evaluate.Response]:
        calls.append((samples_per_prompt, temperature))
        return [
            evaluate.Response(row_id, f"{row_id}/{i}/{temperature}", 3, {"safety": verdict, "style": failure})
            for row_id, _ in ROWS
            for i in range(samples_per_prompt)
        ]

    answers = evaluate.answer(generate, samples_per_prompt=2, temperature=0.7)
    assert calls == [(1, 0.0), (2, 0.7)]
    assert [row["response"] for row in answers["greedy"]] == ["h/0/0.0", "b/0/0.0", "t/0/0.0"]
    assert [row["response"] for row in answers["sampled"]] == [f"{name}/{i}/0.7" for name in "hbt" for i in range(2)]
    assert answers["greedy"][0] == {
        "id": "h",
        "response": "h/0/0.0",
        "thinking_tokens": 3,
        "scores": {
            "safety": {"score": 0.25, "label": "short", "raw": ""},
            "style": {"reason": "no reply", "raw": "", "traceback": ""},
        },
    }
    assert list(evaluate.answer(generate, samples_per_prompt=0, temperature=0.7)) == ["greedy"]
