"""Rates of search questions and accuracies of votes, by hand."""

from typing import Any

import pytest

from recipes.evaluation.voting import search_summary


def row(name: str, answer: str, confidence: int | str, right: bool) -> dict[str, Any]:
    text = f"<think>x</think><confidence>{confidence}</confidence><answer>{answer}</answer>"
    certain = "uncertain" if confidence in range(5) else "certain"
    scores = {
        "search_accuracy": {"score": float(right), "label": ""},
        "search_reliability": {
            "score": float(right == (certain == "certain")),
            "label": f"{str(right).lower()} {certain}",
        },
    }
    return {"id": name, "response": text, "scores": scores}


def test_the_summary_of_two_questions() -> None:
    rows = [
        row("a", "Tarn", 2, False),
        row("a", "Tarn", 1, False),
        row("a", "Veska", 9, True),
        row("b", "Ombra", 9, True),
        row("b", "unknown", 8, False),
        row("b", "unknown", "?", False),
        {"id": "c", "response": "", "scores": {"search_accuracy": {"reason": "lost", "raw": ""}}},
    ]
    summary = search_summary(rows)
    shares = {"true certain": 1 / 3, "false certain": 1 / 3, "false uncertain": 1 / 3}
    assert summary["outcomes"] == pytest.approx(shares | {"true uncertain": 0.0, "no answer": 0.0})
    assert summary["false_certain"]["mean"] == pytest.approx(1 / 3)
    accuracy = {name: value["mean"] for name, value in summary["accuracy"].items()}
    # b: unknown has 8 and, unstated, 10 against 9
    assert accuracy == pytest.approx({"single": 1 / 3, "majority": 0.0, "confidence_weighted": 0.5})
    assert summary["by_samples"] == {
        1: {"majority": 0.5, "confidence_weighted": 0.5},
        2: {"majority": 0.5, "confidence_weighted": 0.5},
        3: {"majority": 0.0, "confidence_weighted": 0.5},
    }
    with pytest.raises(ValueError, match="search_accuracy"):
        search_summary([{"id": "c", "response": "", "scores": {}}])


def test_four_calibrated_replies_do_what_sixteen_alike_can_t() -> None:
    """Right with confidence 9 one time in four, and wrong, always the same way, with confidence 1 else."""
    rows = [row("q", "Veska" if i % 4 == 3 else "Tarn", 9 if i % 4 == 3 else 1, i % 4 == 3) for i in range(16)]
    by_samples = search_summary(rows)["by_samples"]
    assert by_samples[4] == {"majority": 0.0, "confidence_weighted": 1.0}
    assert by_samples[16]["majority"] == 0.0
