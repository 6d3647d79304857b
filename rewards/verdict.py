"""What a verifier says about one response."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1]; `label` names the finding, e.g. "safe with warning"; `raw` is a judge's own text.

    Raises ValueError for a score outside.
    """

    score: float
    label: str
    raw: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"verdict {self.label!r} has the score {self.score}: a verifier gives one in [0, 1]")


@dataclass(frozen=True)
class Failure:
    """No verdict, and why: the sample has no reward, which is not a reward of 0. ``raw`` is what a judge did say."""

    reason: str
    raw: str = ""


type Judgement = Verdict | Failure
type Row = Mapping[str, Any]
type Verifier = Callable[[Row, str], Judgement]


def to_json(judgement: Judgement) -> dict[str, Any]:
    """Plain JSON; the two kinds have different keys."""
    return asdict(judgement)


def from_json(data: Mapping[str, Any]) -> Judgement:
    """Inverse of :func:`to_json`."""
    return Failure(**data) if "reason" in data else Verdict(**data)


def or_nan(reward: float | None) -> float:
    """The reward as the algorithms take it: NaN for a sample without one, which they leave out of every mean."""
    return math.nan if reward is None else reward
