"""Several answers to a question → one: by majority, or weighted by the confidence that the model states.

Deliberative Searcher (arXiv 2507.16727): four answers weighted by confidence are as good as sixteen that count alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import mean_interval
from rewards.verifiers.exact import plain
from rewards.verifiers.search import OUTCOMES
from rollout.environment import Segment
from rollout.search import stated

UNSTATED = 10  # an answer without a stated confidence counts as certain (our choice)


@dataclass(frozen=True)
class Reply:
    """``answer``: None where there is none; ``confidence`` from 0 to 10, None where it is not stated."""

    answer: str | None
    confidence: int | None
    right: bool


def vote(replies: Sequence[Reply], weighted: bool) -> Reply | None:
    """A reply with the answer that wins; None when there is no answer at all.

    Answers are the same when they differ in case, spaces and punctuation around them only. Each counts one or,
    weighted, its confidence. Between equal ones more replies win, then the one that was given first (our choice).
    """
    first: dict[str, Reply] = {}
    weights: dict[str, tuple[int, int]] = {}
    for reply in replies:
        if reply.answer is None:
            continue
        name = plain(reply.answer)
        first.setdefault(name, reply)
        weight, count = weights.get(name, (0, 0))
        confidence = UNSTATED if reply.confidence is None else reply.confidence
        weights[name] = (weight + (confidence if weighted else 1), count + 1)
    return first[max(weights, key=lambda name: weights[name])] if weights else None  # stable: the first of equal ones


def search_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What an evaluation's rows ({id, response, scores}) say, those with verdicts of ``search_accuracy`` and
    ``search_reliability``. Raises ValueError when there is none.

    ``outcomes``: {true certain, false certain, …: share of the rows}; ``false_certain``: {mean, interval, n} of the
    rows that are wrong and certain; ``accuracy``: {single, majority, confidence_weighted: the same}, of a reply alone
    and of the votes of all of a question's; ``by_samples``: {k: the last two's means} for the first k of a question's
    replies, k = 1, 2, 4, … Intervals are over questions.
    """
    replies: dict[str, list[Reply]] = {}
    outcomes: list[str] = []
    of_each: list[str] = []
    for row in rows:
        right, reliable = (row["scores"].get(name, {}) for name in ("search_accuracy", "search_reliability"))
        if "score" in right and "score" in reliable:
            answer, confidence = stated([Segment(row["response"], by_environment=False)])
            replies.setdefault(row["id"], []).append(Reply(answer, confidence, right["score"] == 1))
            outcomes.append(reliable["label"])
            of_each.append(row["id"])
    if not replies:
        raise ValueError("no row has verdicts of search_accuracy and search_reliability: name both in data.scores")

    def votes(count: int, weighted: bool) -> list[float]:
        won = [vote(own[:count], weighted) for own in replies.values()]
        return [float(reply is not None and reply.right) for reply in won]

    most = max(map(len, replies.values()))
    sizes = sorted({most, *(2**i for i in range(most.bit_length()) if 2**i <= most)})
    return {
        "outcomes": {label: outcomes.count(label) / len(outcomes) for label in OUTCOMES},
        "false_certain": mean_interval([float(label == "false certain") for label in outcomes], of_each),
        "accuracy": {
            "single": mean_interval([float(label.startswith("true")) for label in outcomes], of_each),
            "majority": mean_interval(votes(most, False), list(replies)),
            "confidence_weighted": mean_interval(votes(most, True), list(replies)),
        },
        "by_samples": {
            size: {"majority": fmean(votes(size, False)), "confidence_weighted": fmean(votes(size, True))}
            for size in sizes
        },
    }
