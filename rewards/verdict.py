"""The result of a verifier for one response."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """``score`` in [0, 1]; ``label`` names the finding, e.g. "safe with warning"; ``raw`` is a judge's own text.

    Raises ValueError for a score outside [0, 1].
    """

    score: float
    label: str
    raw: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.score <= 1:
            raise ValueError(f"verdict {self.label!r} has the score {self.score}: a verifier gives one in [0, 1]")


@dataclass(frozen=True)
class Failure:
    """The verifier gave no verdict, for this ``reason``. The sample then has no reward, which differs from a reward of
    0. ``raw`` is the text that a judge wrote, if any."""

    reason: str
    raw: str = ""


type VerifierResult = Verdict | Failure
type Row = Mapping[str, Any]
# (row, response) → result. Raises ValueError for a row that it can't verify any response of.
type Verifier = Callable[[Row, str], VerifierResult]


def to_json(result: VerifierResult) -> dict[str, Any]:
    """A JSON object with named fields, between processes and in files (samples.jsonl, answers.json). Verdicts and
    failures have different keys."""
    return asdict(result)


def from_json(data: Mapping[str, Any]) -> VerifierResult:
    """Inverse of :func:`to_json`."""
    return Failure(**data) if "reason" in data else Verdict(**data)


def or_nan(reward: float | None) -> float:
    """The reward as the algorithms take it: NaN for a sample without one. They leave it out of every mean."""
    return math.nan if reward is None else reward
