"""Rewards before advantages: the penalty of overlong responses, and the groups that dynamic sampling keeps."""

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, longest: int, overlong_fraction: float) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), to be added to rewards: FP64, shaped as ``lengths``.

    ``longest`` is the longest response allowed. The last ``overlong_fraction`` of it is a buffer: the penalty is 0 up
    to the buffer, then falls linearly to −1 at ``longest``. A fraction of 0 switches it off (our choice).
    """
    buffer = overlong_fraction * longest
    if buffer == 0:
        return torch.zeros(lengths.shape, dtype=torch.float64)
    return -((lengths.double() - (longest - buffer)) / buffer).clamp(0, 1)


def has_reward_variance(rewards: Tensor) -> Tensor:
    """[prompts, samples] → [prompts]: whether a group has two different rewards; NaN (no reward) does not count.

    Only such a group has group-relative advantages. Dynamic sampling (DAPO, eq. 11) replaces the others by further
    prompts.
    """
    missing = rewards.isnan()
    highest = rewards.masked_fill(missing, -torch.inf).amax(dim=1)
    return highest > rewards.masked_fill(missing, torch.inf).amin(dim=1)


def select_groups(rewards: Tensor, count: int) -> list[int]:
    """Indices of the first ``count`` groups with differing rewards, ascending; where they are too few, the first others
    fill up.

    ``rewards`` [prompts, samples], of all generation batches of the step.
    """
    order = has_reward_variance(rewards).logical_not().int().argsort(stable=True)
    return sorted(order[:count].tolist())
