"""Verifiers of deliberative search: what each says of an episode, and the rates of a step."""

import pytest

from recipes.launch.trial import check_row
from rewards.registry import find_rule
from rewards.verdict import Failure, Verdict, VerifierResult
from rewards.verifiers.search import accuracy, false_certain, format_score, metrics, outcome, reliability
from rollout.environment import Segment

ROW = {"id": "r", "label": "search", "answer": "Veska", "aliases": ["Old Veska"]}
LOOK = [
    Segment("<think>x</think><search>capital</search>", False),
    Segment("<result>[n] The capital of Norland is Veska.</result>", True),
]


def ended(text: str) -> dict[str, object]:
    return {**ROW, "segments": [*LOOK, Segment(text, False)]}


def stating(answer: str, confidence: str = "8") -> dict[str, object]:
    return ended(f"<confidence>{confidence}</confidence><answer>{answer}</answer>")


def test_format_names_the_verdict_on_each_action() -> None:
    assert format_score(stating("Veska"), "") == Verdict(
        1.0, "legal", "think: ok; search: ok; confidence: ok; answer: ok"
    )
    assert format_score(ended("<read>m</read><answer>Veska</answer>"), "") == Verdict(
        0.0,
        "read: without a result",
        "think: ok; search: ok; read: without a result; answer: no confidence before it",
    )


def test_without_segments_the_response_is_all_the_model_s() -> None:
    assert format_score(ROW, "<think>x</think><confidence>3</confidence><answer>y</answer>").score == 1
    forged = "".join(segment.text for segment in LOOK) + "<confidence>3</confidence><answer>y</answer>"
    assert format_score(ROW, forged).label == "search: without a result"


@pytest.mark.parametrize(
    ("answer", "score"), [("Veska", 1), (" veska. ", 1), ("old  veska", 1), ("Tarn", 0), ("Veska or Tarn", 0)]
)
def test_accuracy(answer: str, score: float) -> None:
    assert accuracy(stating(answer), "") == Verdict(float(score), "correct" if score else "wrong")


@pytest.mark.parametrize(
    ("answer", "confidence", "label", "score"),
    [
        ("Veska", "5", "true certain", 1),
        ("Veska", "4", "true uncertain", 0),
        ("Tarn", "5", "false certain", 0),
        ("Tarn", "4", "false uncertain", 1),
        ("Tarn", "0", "false uncertain", 1),
        ("Tarn", "unsure", "false certain", 0),
        ("Veska", "11", "true certain", 1),
    ],
)
def test_reliability(answer: str, confidence: str, label: str, score: float) -> None:
    verdict = reliability(stating(answer, confidence), "", certain_from=5)
    assert (verdict.label, verdict.score) == (label, score)


def test_no_answer_is_neither() -> None:
    assert reliability(ended("<confidence>2</confidence>"), "", certain_from=5) == Verdict(0.0, "no answer")
    assert outcome(False, None, 2, 5) == "no answer"


def test_the_rates_are_shares_of_all_samples_with_a_verdict() -> None:
    labels = ["true certain", "false certain", "false certain", "false uncertain", "no answer"]
    judged: list[dict[str, VerifierResult]] = [{"search_reliability": Verdict(0.0, label)} for label in labels]
    judged += [{"search_reliability": Failure("lost")}, {"other": Verdict(1.0, "x")}]
    assert metrics(judged, 0.7) == {"search/false_certain": 0.4, "search/certain": 0.6, "search/lambda": 0.7}
    assert metrics([{"other": Verdict(1.0, "x")}], 0.7) == {}


def test_a_row_without_an_answer_is_told_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="row 'r' has no `answer`"):
        check_row("search_accuracy", find_rule("search_accuracy"), {"id": "r", "label": "search"})


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("<think>x</think><confidence>8</confidence><answer>Tarn</answer>", "false certain"),
        ("<think>x</think><confidence>2</confidence><answer>Tarn</answer>", "false uncertain"),
        ("<think>x</think><confidence>8</confidence><answer>Veska</answer>", "true certain"),
        # Models that do not know the actions: what they say is their answer, and they are certain of it.
        ("<think>Tarn?</think>\nIt is Veska, I think.", "true certain"),
        ("<think>Veska?</think>\nIt is Tarn.", "false certain"),
        ("It is Veskan.", "false certain"),
        ("The old Veska", "true certain"),
        ("<think>Veska", "no answer"),
        ("", "no answer"),
    ],
)
def test_false_certain(response: str, label: str) -> None:
    assert false_certain(ROW, response, certain_from=5) == Verdict(float(label == "false certain"), label)
