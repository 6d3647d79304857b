"""The result of a verifier for one response."""

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

EXCERPT_CHARACTERS = 200  # how much of a value's text a message shows


@dataclass(frozen=True)
class Verdict:
    """A verifier's verdict on one response.

    Raises ValueError for a score that is not a number or outside [0, 1], and for a label or raw that is not text.
    """

    score: float  # in [0, 1]
    label: str  # the class that the verifier assigned, e.g. "safe with warning"
    raw: str = ""  # the text that a judge wrote

    def __post_init__(self) -> None:
        if not is_score(self.score):
            raise ValueError(f"verdict {self.label!r} has the score {self.score!r}: a verifier gives one in [0, 1]")
        if not isinstance(self.label, str) or not isinstance(self.raw, str):
            raise ValueError(f"verdict with label={self.label!r}, raw={excerpt(self.raw)}: both are text")
        object.__setattr__(self, "score", float(self.score))


@dataclass(frozen=True)
class Failure:
    """The verifier gave no verdict. The sample then has no reward, which is not the same as a reward of 0."""

    reason: str
    raw: str = ""  # the text that a judge wrote, if any
    traceback: str = ""  # of a function that raised, if any

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.reason, self.raw, self.traceback)):
            raise ValueError(f"failure with reason={excerpt(self.reason)}, raw={excerpt(self.raw)}: both are text")


type VerifierResult = Verdict | Failure
type Row = Mapping[str, Any]
# (row, response) → result. Raises ValueError for a row for which it can't verify any response.
type Verifier = Callable[[Row, str], VerifierResult]


def is_score(value: Any) -> bool:
    """Whether a value is a number of Python or NumPy in [0, 1]. A bool and NaN are not."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def as_result(returned: Any) -> VerifierResult:
    """Convert what a verifier's function returned to a result.

    A Verdict or Failure is returned as it is. A number in [0, 1] becomes a Verdict with this score, whose label is the
    number to one decimal. Raises TypeError, naming the value and what is expected, for anything else.
    """
    if isinstance(returned, Verdict | Failure):
        return returned
    if is_score(returned):
        return Verdict(float(returned), f"{float(returned):.1f}")
    is_near = isinstance(returned, bool) or (hasattr(returned, "__float__") and not isinstance(returned, Real))
    remedy = ": write float(…) around it" if is_near else ""
    raise TypeError(
        f"it returned {excerpt(returned)} ({type(returned).__name__}), not a number from 0 to 1 or a Verdict{remedy}"
    )


def describe(error: BaseException) -> str:
    """An exception in one line, with the place that raised it: "it raised KeyError: 'answer' (my_reward.py:5)"."""
    # An invalid Verdict raises in this file. The place to name is the one that constructed it.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"it raised {type(error).__name__}: {' '.join(str(error).split())}{place}"


def excerpt(value: Any) -> str:
    """The beginning of a value's text, for a message."""
    text = repr(value)
    return text if len(text) <= EXCERPT_CHARACTERS else f"{text[:EXCERPT_CHARACTERS]}…"


def to_json(result: VerifierResult) -> dict[str, Any]:
    """The result as a JSON object with named fields, for messages between processes and for files (samples,
    answers.json). Verdicts and failures have different keys.
    """
    return asdict(result)


def from_json(data: Mapping[str, Any]) -> VerifierResult:
    """Inverse of :func:`to_json`."""
    return Failure(**data) if "reason" in data else Verdict(**data)


def or_nan(reward: float | None) -> float:
    """The reward, or NaN for a sample without one. The algorithms leave NaN out of every mean."""
    return math.nan if reward is None else reward
