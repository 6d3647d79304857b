"""KL estimators of Schulman's note "Approximating KL divergence", per sampled token: KL(policy ‖ reference).

d = ln(reference / policy) of a token that the policy sampled. No value is clamped, so that an overflow is visible. As a
loss, k2 has the gradient of the KL itself; k3's has the same sign and, near the reference, the same size; k1's is zero
on average, so k1 makes sense only in the reward (``algorithm.kl_in``).
"""

import torch
from torch import Tensor


def k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """−d, [R]: unbiased, of either sign."""
    return log_probs - reference


def k2(log_probs: Tensor, reference: Tensor) -> Tensor:
    """d² / 2, [R]: biased, never negative."""
    return (reference - log_probs) ** 2 / 2


def k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """exp(d) − d − 1, [R]: unbiased, never negative, exactly 0 where both agree."""
    d = reference - log_probs
    return torch.exp(d) - d - 1
