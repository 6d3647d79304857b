"""Votes over several answers to a question, by majority or weighted by the confidence that the model states.

According to Deliberative Searcher (arXiv 2507.16727), four answers weighted by confidence are as good as sixteen with
equal votes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.verifiers.exact import plain

# The confidence of an answer without a stated confidence, which counts as certain (our choice).
UNSTATED_CONFIDENCE = 10


@dataclass(frozen=True)
class Reply:
    """The answer and the confidence that a response states."""

    # None if the response has no answer.
    answer: str | None
    # From 0 to 10, None if the response states none.
    confidence: int | None


@dataclass(frozen=True)
class Vote:
    """The result of a vote."""

    # The places of the replies with the winning answer, in order.
    places: tuple[int, ...]
    # The winning answer's share of all votes.
    share: float


def vote(replies: Sequence[Reply], weighted: bool) -> Vote | None:
    """Return the winning answer, or None when no reply has an answer.

    Answers are equal when they differ only in case, in spaces, and in punctuation around them, as for the verifier. A
    reply has one vote, or, with ``weighted``, as many votes as its confidence. In a tie, the answer with more replies
    wins, then the one that came first (our choice).
    """
    places: dict[str, list[int]] = {}
    votes: Counter[str] = Counter()
    for place, reply in enumerate(replies):
        if reply.answer is None:
            continue
        name = plain(reply.answer)
        places.setdefault(name, []).append(place)
        confidence = UNSTATED_CONFIDENCE if reply.confidence is None else reply.confidence
        votes[name] += confidence if weighted else 1
    if not places:
        return None
    # max returns the first of several maxima, and places is in the order of the replies.
    winner = max(places, key=lambda name: (votes[name], len(places[name])))
    total = votes.total()
    return Vote(tuple(places[winner]), votes[winner] / total if total else 0.0)
