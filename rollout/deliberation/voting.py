"""Votes over several answers to a question: by majority, or weighted by the confidence that the model states.

Deliberative Searcher (arXiv 2507.16727): four answers weighted by confidence are as good as sixteen with equal votes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.verifiers.exact import plain

# The confidence of an answer that states none: it counts as certain (our choice).
UNSTATED_CONFIDENCE = 10


@dataclass(frozen=True)
class Reply:
    """``answer``: None where the response has none. ``confidence`` from 0 to 10, None where it states none."""

    answer: str | None
    confidence: int | None


@dataclass(frozen=True)
class Vote:
    """``places``: of the replies with the answer that wins, in their order. ``share``: its part of all votes."""

    places: tuple[int, ...]
    share: float


def vote(replies: Sequence[Reply], weighted: bool) -> Vote | None:
    """The answer that wins; None when no reply has an answer.

    Answers are equal when they differ only in case, spaces and punctuation around them, as for the verifier. A reply
    has one vote or, with ``weighted``, as many as its confidence. In a tie the answer with more replies wins, then the
    one that came first (our choice).
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
