"""What a verifier says about one response."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """`score` in [0, 1]; `label` names the finding, e.g. "safe with warning"."""

    score: float
    label: str


type Row = Mapping[str, Any]
type Verifier = Callable[[Row, str], Verdict]
