"""Deliberative search (arXiv 2507.16727): is the episode legal, is the answer right, does the confidence fit it?

The reward is r_format · (0.1·r_format + 0.9·r_acc + λ·r_reliability). It is set by `gate`, `mix` and `constraint` in
conf/rewards/search.yaml. A row's ``segments`` say which parts of the response the environment wrote. In a row without
them, the model wrote the whole response.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.verdict import Row, Verdict, VerifierResult
from rewards.verifiers.exact import plain
from rewards.verifiers.text import without_thinking
from rollout import search
from rollout.environment import Segment

RELIABILITY = "search_reliability"
OUTCOMES = ("true certain", "false certain", "true uncertain", "false uncertain", "no answer")


def format_score(row: Row, response: str) -> Verdict:
    """1 "legal" if no action has a fault (``rollout.search.steps``), else 0 with the first fault as the label.

    ``raw`` lists every action with its fault or "ok".
    """
    steps = search.steps(_segments(row, response))
    all_actions = "; ".join(f"{step.action}: {step.fault or 'ok'}" for step in steps)
    for step in steps:
        if step.fault:
            return Verdict(0.0, f"{step.action}: {step.fault}", all_actions)
    return Verdict(1.0, "legal", all_actions)


def accuracy(row: Row, response: str) -> Verdict:
    """1 "correct" if the stated answer equals the row's ``answer`` or one of its ``aliases``, else 0 "wrong".

    Case, repeated spaces, and punctuation around the answer are ignored. Raises ValueError for a row without
    ``answer``.
    """
    answer, _ = search.stated(_segments(row, response))
    return Verdict(1.0, "correct") if _right(row, answer) else Verdict(0.0, "wrong")


def reliability(row: Row, response: str, *, certain_from: int) -> Verdict:
    """1 if the model is certain of a right answer or uncertain of a wrong one, else 0. The label is the outcome.

    The model is certain if its confidence is at least ``certain_from`` (the paper's ζ, 5) on the scale from 0 to 10. An
    answer without a stated confidence counts as certain, and a response without an answer scores 0 (both our choice).
    """
    answer, confidence = search.stated(_segments(row, response))
    label = outcome(_right(row, answer), answer, confidence, certain_from)
    return Verdict(float(label in ("true certain", "false uncertain")), label)


def false_certain(row: Row, response: str, *, certain_from: int) -> Verdict:
    """1 if the model is certain of a wrong answer, else 0. This is a metric; the reward for it is `reliability`.

    If the response has no answer action, its text after the thinking is the answer, without a confidence. Such an
    answer is right if the reference occurs in it. This is our choice, so that models that were never taught the actions
    can be compared.
    """
    answer: str | None
    if "<answer>" in response:
        answer, confidence = search.stated(_segments(row, response))
        is_right = _right(row, answer)
    else:
        answer = without_thinking(response) or None
        confidence = None
        is_right = _right(row, answer, within=True)
    label = outcome(is_right, answer, confidence, certain_from)
    return Verdict(float(label == "false certain"), label)


def outcome(right: bool, answer: str | None, confidence: int | None, certain_from: int) -> str:
    """One of ``OUTCOMES``."""
    if answer is None:
        return "no answer"
    certain = confidence is None or confidence >= certain_from
    return f"{'true' if right else 'false'} {'certain' if certain else 'uncertain'}"


def metrics(results: Sequence[Mapping[str, VerifierResult]], multiplier: float) -> dict[str, float]:
    """A step's metrics over the samples with a verdict on their reliability. Empty if there is no such sample.

    ``search/false_certain`` is the share of samples that are certain of a wrong answer, the rate that the paper
    reports. ``search/certain`` is the share that are certain. ``search/lambda`` is the constraint's multiplier.
    """
    of_samples = [of_sample[RELIABILITY] for of_sample in results if RELIABILITY in of_sample]
    labels = [result.label for result in of_samples if isinstance(result, Verdict)]
    if not labels:
        return {}
    return {
        "search/false_certain": labels.count("false certain") / len(labels),
        "search/certain": sum(label.endswith(" certain") for label in labels) / len(labels),
        "search/lambda": multiplier,
    }


def _right(row: Row, answer: str | None, within: bool = False) -> bool:
    """Whether the answer equals the row's ``answer`` or an alias.

    With ``within``, whether the answer contains one of them as whole words.
    """
    if not row.get("answer"):
        raise ValueError(f"row {row['id']!r} has no `answer`, which the label {row['label']!r} needs")
    accepted: list[Any] = [row["answer"], *row.get("aliases", [])]
    if answer is None:
        return False
    if within:
        return any(f" {_words(text)} " in f" {_words(answer)} " for text in accepted)
    return plain(answer) in map(plain, accepted)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _segments(row: Row, response: str) -> Sequence[Segment]:
    return row.get("segments") or [Segment(response, by_environment=False)]
