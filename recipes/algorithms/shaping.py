"""What is done to a rollout before its advantages are made: overlong answers, groups that teach nothing."""

import torch
from torch import Tensor


def overlong_penalty(lengths: Tensor, *, longest: int, overlong_fraction: float) -> Tensor:
    """DAPO's soft overlong punishment (Yu et al. 2025, eq. 13), added to the rewards; the shape of ``lengths``.

    ``longest`` is the longest response allowed and ``overlong_fraction`` of it a buffer: 0 up to where it begins, then
    linear down to −1 at ``longest``. A fraction of 0 punishes nothing (our choice, for off).
    """
    buffer = overlong_fraction * longest
    if buffer == 0:
        return torch.zeros(lengths.shape, dtype=torch.float64)
    return -((lengths.double() - (longest - buffer)) / buffer).clamp(0, 1)


def has_reward_variance(rewards: Tensor) -> Tensor:
    """[prompts, samples] → [prompts]: whether a group has two different rewards; NaN (not judged) is none.

    Only these give a group-relative advantage. Dynamic sampling (DAPO, eq. 11) asks further prompts in place of others.
    """
    missing = rewards.isnan()
    highest = rewards.masked_fill(missing, -torch.inf).amax(dim=1)
    return highest > rewards.masked_fill(missing, torch.inf).amin(dim=1)


def select_groups(rewards: Tensor, wanted: int) -> list[int]:
    """The first ``wanted`` groups with differing rewards, in order; too few are filled up with the first others.

    ``rewards`` [prompts, samples], of all rounds of sampling.
    """
    order = has_reward_variance(rewards).logical_not().int().argsort(stable=True)
    return sorted(order[:wanted].tolist())
