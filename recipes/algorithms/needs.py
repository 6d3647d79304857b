"""Declarations of what a part of an algorithm needs beside its usual arguments, attached to the part's function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ATTRIBUTE = "needs"


@dataclass(frozen=True)
class Needs:
    """The needs of a part of an algorithm."""

    # A critic's value of each response token.
    values: bool = False
    # Log-probs under the reference policy.
    reference: bool = False
    # Reductions over each sequence's response tokens (recipes.algorithms.sequences).
    sequences: bool = False


def needs[F: Callable[..., Any]](
    *, values: bool = False, reference: bool = False, sequences: bool = False
) -> Callable[[F], F]:
    """Declare, as a decorator of a part's function, that the run needs a critic, a reference policy or sequence sums.

    An advantage reads ``AdvantageInputs.values``; a policy loss gets an argument named ``reference`` or ``sequences``.
    """

    def declare(function: F) -> F:
        setattr(function, ATTRIBUTE, Needs(values, reference, sequences))
        return function

    return declare


def needs_of(function: Callable[..., Any]) -> Needs:
    """The declared needs of a function. Without a declaration it needs nothing."""
    return getattr(function, ATTRIBUTE, Needs())
