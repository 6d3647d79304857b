"""Votes over several answers to a question: by majority, or weighted by the confidence that the model states.

Deliberative Searcher (arXiv 2507.16727): four answers weighted by confidence are as good as sixteen with equal votes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from recipes.evaluation.statistics import mean_interval
from rewards.verifiers.exact import plain
from rewards.verifiers.search import OUTCOMES
from rollout.environment import Segment
from rollout.search import stated

# The confidence of an answer that states none: it counts as certain (our choice).
UNSTATED_CONFIDENCE = 10


@dataclass(frozen=True)
class Reply:
    """``answer``: None where the response has none. ``confidence`` from 0 to 10, None where it states none."""

    answer: str | None
    confidence: int | None
    right: bool


def vote(replies: Sequence[Reply], weighted: bool) -> Reply | None:
    """A reply with the answer that wins the vote; None when no reply has an answer.

    Answers are equal when they differ only in case, spaces and punctuation around them. A reply has one vote or, with
    ``weighted``, as many as its confidence. In a tie the answer with more replies wins, then the one that came first
    (our choice).
    """
    first_replies: dict[str, Reply] = {}
    votes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for reply in replies:
        if reply.answer is None:
            continue
        name = plain(reply.answer)
        first_replies.setdefault(name, reply)
        confidence = UNSTATED_CONFIDENCE if reply.confidence is None else reply.confidence
        votes[name] += confidence if weighted else 1
        counts[name] += 1
    if not first_replies:
        return None
    # max returns the first of several maxima, and first_replies is in the order of the replies.
    winner = max(first_replies, key=lambda name: (votes[name], counts[name]))
    return first_replies[winner]


def search_summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates and votes over an evaluation's answers ({id, response, scores}) to search questions: those with verdicts of
    ``search_accuracy`` and ``search_reliability``. Raises ValueError when there is none.

    ``outcomes``: {true certain, false certain, …: share of the answers}. ``false_certain``: {mean, interval, n} of the
    answers that are wrong and certain. ``accuracy``: {single, majority, confidence_weighted: {mean, interval, n}}, of
    one answer alone and of both votes over all answers to a question. ``by_samples``: {k: {majority,
    confidence_weighted: mean}} for votes over the first k answers, k = 1, 2, 4, … and all. Intervals are over
    questions.
    """
    replies: dict[str, list[Reply]] = {}
    outcomes: list[str] = []
    question_ids: list[str] = []  # of each outcome
    for row in rows:
        accuracy = row["scores"].get("search_accuracy", {})
        reliability = row["scores"].get("search_reliability", {})
        if "score" not in accuracy or "score" not in reliability:
            continue
        answer, confidence = stated([Segment(row["response"], by_environment=False)])
        replies.setdefault(row["id"], []).append(Reply(answer, confidence, accuracy["score"] == 1))
        outcomes.append(reliability["label"])
        question_ids.append(row["id"])
    if not replies:
        raise ValueError("no row has verdicts of search_accuracy and search_reliability: name both in data.scores")

    def vote_scores(count: int, weighted: bool) -> list[float]:
        """1.0 for each question whose vote over the first ``count`` replies is right, else 0.0."""
        winners = [vote(of_question[:count], weighted) for of_question in replies.values()]
        return [float(winner is not None and winner.right) for winner in winners]

    most = max(map(len, replies.values()))
    powers_of_two = {2**i for i in range(most.bit_length()) if 2**i <= most}
    return {
        "outcomes": {label: outcomes.count(label) / len(outcomes) for label in OUTCOMES},
        "false_certain": mean_interval([float(label == "false certain") for label in outcomes], question_ids),
        "accuracy": {
            "single": mean_interval([float(label.startswith("true")) for label in outcomes], question_ids),
            "majority": mean_interval(vote_scores(most, weighted=False), list(replies)),
            "confidence_weighted": mean_interval(vote_scores(most, weighted=True), list(replies)),
        },
        "by_samples": {
            size: {
                "majority": fmean(vote_scores(size, weighted=False)),
                "confidence_weighted": fmean(vote_scores(size, weighted=True)),
            }
            for size in sorted({most, *powers_of_two})
        },
    }
