"""The decisions of guided decoding, as pure functions."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction


def normalised(weights: Mapping[str, float], principles: Sequence[str]) -> tuple[float, ...]:
    """Return the weights in the order of the principles, scaled to sum 1. Without weights, all are equal."""
    if not weights:
        return (1 / len(principles),) * len(principles)
    total = math.fsum(weights.values())
    return tuple(weights[principle] / total for principle in principles)


def weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the score of a prefix: the sum of its values, each times the weight of its principle."""
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True))


def best(scores: Sequence[float], count: int) -> list[int]:
    """Return the places of the ``count`` highest scores, the highest first. Among equals, the earlier place leads."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    return order[:count]


def thinks(text: str, marks: Sequence[str]) -> bool:
    """Return whether a text ends inside the thinking, that is, whether its last mark begins the thinking."""
    begin, end = marks
    return text.rfind(begin) > text.rfind(end)


def first_stop(text: str, known: int, stops: Sequence[str]) -> int | None:
    """Return where the first of the stop strings begins, or None. The first ``known`` characters contain none."""
    places = [text.find(stop, max(known - len(stop) + 1, 0)) for stop in stops]
    return min((place for place in places if place >= 0), default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def conformal_threshold(lowest_scores: Sequence[float], level: float) -> float:
    """Return the highest threshold below which at most a share ``level`` of benign answers falls.

    This is split conformal prediction. ``lowest_scores`` has the lowest segment score of each of n held-out benign
    answers. The threshold is the k-th smallest of them, where k = floor(level · (n + 1)). In terms of the negated
    scores, that is the ceil((n + 1)(1 - level))-th smallest. If a further answer is exchangeable with these, its lowest
    score is below the threshold with a probability of at most k / (n + 1) ≤ level. The probability is over the draw of
    the n answers and of the further one.

    Raises ValueError for fewer answers than the level needs, which is 1 / level - 1.
    """
    exact_level = Fraction(str(level))
    count = len(lowest_scores)
    rank = math.floor(exact_level * (count + 1))
    if rank < 1:
        needed = math.ceil(1 / exact_level) - 1
        raise ValueError(f"level={level}: needs {needed} held-out prompts or more, and there are {count}")
    return sorted(lowest_scores)[rank - 1]
