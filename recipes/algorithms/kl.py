"""Estimators of KL(policy ‖ reference) per sampled token, from Schulman's note "Approximating KL divergence".

d is ln(reference / policy) of a token that the policy sampled. No value is clamped, so that an overflow is visible.

The estimators differ in their gradients as a loss. That of k2 is the gradient of the KL itself. That of k3 has the same
sign and, near the reference, the same size. That of k1 is zero on average, so k1 makes sense only in the reward
(``algorithm.kl_in``).
"""

import torch
from torch import Tensor


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """−d, [R]: unbiased, positive or negative."""
    return log_probs - reference


def k2(log_probs: Tensor, reference: Tensor) -> Tensor:
    """d² / 2, [R]: biased, never negative."""
    return (reference - log_probs) ** 2 / 2


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) − d − 1, [R]: unbiased, never negative, exactly 0 where both agree."""
    d = reference - log_probs
    return torch.exp(d) - d - 1
