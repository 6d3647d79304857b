"""GRPO's advantages, in the middle of whose computation a job's first start is held until it is preempted."""

import os
import time
from itertools import count
from pathlib import Path

from torch import Tensor

from recipes.algorithms.advantages import AdvantageInputs
from recipes.algorithms.advantages import grpo as unheld
from recipes.run import preemption

calls = count(1)
HELD_STEP = 2


def grpo(inputs: AdvantageInputs, *, advantage_epsilon: float) -> Tensor:
    """In step 2 wait until SIGUSR1 arrives on this rank. The file ``held`` says that rank 0 waits."""
    is_first_start = os.environ.get("SLURM_RESTART_COUNT", "0") == "0"
    if next(calls) == HELD_STEP and is_first_start:
        if os.environ["RANK"] == "0":
            Path("held").touch()
        while not preemption.preemption_requested():
            time.sleep(0.05)
    return unheld(inputs, advantage_epsilon=advantage_epsilon)
