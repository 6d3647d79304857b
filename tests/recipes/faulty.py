"""Advantages of one's own (``algorithm.advantage``) that go wrong at their second call."""

import os
import threading
from itertools import count

from torch import Tensor

from recipes.algorithms.advantages import AdvantageInputs, grpo

calls = count(1)


def overflows(outcomes: AdvantageInputs, *, advantage_epsilon: float) -> Tensor:
    """GRPO's; once so large that the gradient's norm is infinite."""
    return grpo(outcomes, advantage_epsilon=advantage_epsilon) * (1e38 if next(calls) == 2 else 1.0)


def stands_still(outcomes: AdvantageInputs, *, advantage_epsilon: float) -> Tensor:
    """GRPO's; once without an end on rank 1."""
    if next(calls) == 2 and os.environ["RANK"] == "1":
        threading.Event().wait()
    return grpo(outcomes, advantage_epsilon=advantage_epsilon)
