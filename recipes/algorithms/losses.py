"""Pieces that algorithms share: policy losses, KL estimators, and the token weights that aggregate a loss."""

import torch
from torch import Tensor


def sequence_mean_token_mean(lengths: list[int]) -> list[list[float]]:
    """Weight of each response token in the mean over sequences of token means (SafeWork-R1's aggregation).

    ``lengths`` counts all sequences of the update, on all ranks: the weights of an update sum to one, so neither the
    micro-batch split nor the number of ranks changes it.
    """
    return [[1.0 / (len(lengths) * n)] * n for n in lengths]


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_ratio: float) -> Tensor:
    """PPO's clipped surrogate per token, [R] each, to be minimised (Schulman et al. 2017, eq. 7)."""
    ratio = torch.exp(log_probs - old_log_probs)
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl_k3(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy ‖ reference) per sampled token, [R]: exp(d) − d − 1 with d = ln(ref/policy).

    Non-negative, and exactly 0 where both agree. Not clamped.
    """
    d = reference_log_probs - log_probs
    return torch.exp(d) - d - 1
