"""Rewards before advantages: the penalty of overlong responses, and the groups that dynamic sampling keeps."""

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, longest: int, overlong_fraction: float) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), to be added to rewards: FP64, shaped as ``lengths``.

    ``longest`` is the longest response allowed. The last ``overlong_fraction`` of it is a buffer. The penalty is 0 up
    to the buffer and then falls linearly to −1 at ``longest``. A fraction of 0 switches the penalty off (our choice).
    """
    buffer = overlong_fraction * longest
    if buffer == 0:
        return torch.zeros(lengths.shape, dtype=torch.float64)
    return -((lengths.double() - (longest - buffer)) / buffer).clamp(0, 1)


def has_reward_variance(rewards: Tensor) -> Tensor:
    """[prompts, samples] → [prompts]: whether a group has two different rewards. NaN (no reward) does not count.

    Only such a group has group-relative advantages other than 0. Dynamic sampling (DAPO, eq. 11) replaces the other
    groups by those of further prompts.
    """
    missing = rewards.isnan()
    highest = rewards.masked_fill(missing, -torch.inf).amax(dim=1)
    return highest > rewards.masked_fill(missing, torch.inf).amin(dim=1)


def select_groups(rewards: Tensor, count: int) -> list[int]:
    """The indices of the first ``count`` groups with differing rewards, in ascending order.

    Where there are fewer such groups, the first of the other groups fill up. ``rewards`` [prompts, samples] are those
    of all generation batches of the step.
    """
    order = has_reward_variance(rewards).logical_not().int().argsort(stable=True)
    return sorted(order[:count].tolist())
