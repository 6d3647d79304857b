"""Policy losses: each function returns the loss of each response token, [R], to be minimised.

All take three tensors, [R] each: the log-probs under the present policy, with gradient; ``old``, the log-probs under
the policy before the first update of this rollout, without gradient; and the advantages. Losses that need them also
take the micro-batch's ``Sequences``.

Where a rollout makes only one update, ``old`` is the present log-probs without their gradient, and every importance
ratio is 1. A loss that clips has the keywords ``clip_low`` (1 for no lower bound) and ``clip_high``.
"""

import math

import torch
from torch import Tensor

from recipes.algorithms.needs import needs
from recipes.algorithms.sequences import Sequences


def reinforce(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """−A ln π: the plain policy gradient (Williams 1992)."""
    return -advantages * log_probs


def ppo_clip(log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """−min(r A, clip(r, 1 − low, 1 + high) A) with r = π / π_old (Schulman et al. 2017, eq. 7).

    With a higher ``clip_high`` than ``clip_low`` this is DAPO's clip-higher (Yu et al. 2025, eq. 10).
    """
    return _clipped(torch.exp(log_probs - old), advantages, clip_low, clip_high)


def cispo(log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """−stopgrad(clip(r, 1 − low, 1 + high)) A ln π (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    The clip bounds the weight of a token. Unlike that of ``ppo_clip``, it removes no token from the update.
    """
    ratio = torch.exp(log_probs - old).detach()
    return -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages * log_probs


def ppo_dual_clip(
    log_probs: Tensor, old: Tensor, advantages: Tensor,
    *, clip_low: float, clip_high: float, dual_clip: float,
) -> Tensor:  # fmt: skip
    """``ppo_clip``, bounded by −c A where A < 0, with c = ``dual_clip`` > 1 (Ye et al. 2020, eq. 4)."""
    loss = _clipped(torch.exp(log_probs - old), advantages, clip_low, clip_high)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


@needs(sequences=True)
def gspo(
    log_probs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, *, clip_low: float, clip_high: float
) -> Tensor:
    """The clipped loss with the sequence's ratio s = exp(mean of ln π/π_old over its trained tokens).

    Source: Zheng et al. 2025, eq. 5 to 7. This is the paper's token form (eq. 13): s without gradient, times
    π / stopgrad(π), which is 1. So no gradient crosses the ranks that share a sequence. Where all tokens of a sequence
    have the same weight, value and gradient are those of the paper's sequence form.
    """
    log_ratio = sequences.broadcast(sequences.mean(log_probs - old), log_probs)
    return _clipped(torch.exp(log_ratio + log_probs - log_probs.detach()), advantages, clip_low, clip_high)


def cpgd(
    log_probs: Tensor, old: Tensor, advantages: Tensor,
    *, clip_low: float, clip_high: float, drift_coefficient: float, drift_cap: float,
) -> Tensor:  # fmt: skip
    """Clipped policy gradient with policy drift (Liu et al. 2025, arXiv 2505.12504, eq. 2), per token.

    −min(l A, clip(l, ln(1 − low), ln(1 + high)) A) + α drift with l = ln π/π_old and α = ``drift_coefficient``.

    The gradient of the drift is that of k3 for KL(π_old ‖ π) with a capped factor: min(stopgrad(r) − 1, c) ∇ ln π with
    c = ``drift_cap``. The value of the drift is this factor times l. It is never negative, and 0 where both policies
    agree.
    """
    log_ratio = log_probs - old
    surrogate = _clipped_log(log_ratio, advantages, clip_low, clip_high)
    return surrogate + drift_coefficient * _drift(log_ratio, drift_cap)


@needs(sequences=True)
def cpgd_sequence(
    log_probs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences,
    *, clip_low: float, clip_high: float, drift_coefficient: float, drift_cap: float,
) -> Tensor:  # fmt: skip
    """``cpgd`` clipped by the sequence's l, which is the mean of l over its trained tokens. The drift stays per token.

    The paper's update (eq. 1) has the sum instead of the mean. With the mean, as in ``gspo``, one bound fits all
    lengths (our choice).
    """
    mean = sequences.broadcast(sequences.mean(log_probs - old), log_probs)
    surrogate = _clipped_log(mean + log_probs - log_probs.detach(), advantages, clip_low, clip_high)
    return surrogate + drift_coefficient * _drift(log_probs - old, drift_cap)


def _clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def _clipped_log(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    lowest = math.log(1 - low) if low < 1 else -math.inf
    clipped = log_ratio.clamp(lowest, math.log(1 + high))
    return -torch.minimum(log_ratio * advantages, clipped * advantages)


def _drift(log_ratio: Tensor, cap: float) -> Tensor:
    return torch.expm1(log_ratio.detach()).clamp(max=cap) * log_ratio
