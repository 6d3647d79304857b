"""What a part of an algorithm needs beside its usual arguments, declared at its function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ATTRIBUTE = "needs"


@dataclass(frozen=True)
class Needs:
    """``values``: a critic's value of each response token. ``reference``: log-probs under the reference policy.
    ``sequences``: sums over each sequence's response tokens (``recipes.algorithms.sequences``)."""

    values: bool = False
    reference: bool = False
    sequences: bool = False


def needs[F: Callable[..., Any]](
    *, values: bool = False, reference: bool = False, sequences: bool = False
) -> Callable[[F], F]:
    """Decorator of a part: the run gets a critic, a reference policy or sequence sums because of it.

    An advantage reads ``AdvantageInputs.values``; a policy loss gets an argument named ``reference`` or ``sequences``.
    """

    def declare(function: F) -> F:
        setattr(function, ATTRIBUTE, Needs(values, reference, sequences))
        return function

    return declare


def needs_of(function: Callable[..., Any]) -> Needs:
    """What the function declares; nothing without a declaration."""
    return getattr(function, ATTRIBUTE, Needs())
