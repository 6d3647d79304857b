"""Policy losses, to be minimised: a loss for each response token, [R].

All take the tokens' log-probs under the present policy (with gradient) and under the policy before the first update
of this rollout (``old``, without gradient), and the advantages, [R] each; those that need them, the micro-batch's
``Sequences``. Where a rollout makes one update only, ``old`` is the present log-probs without their gradient, and every
ratio is 1. A loss that clips does so by the keywords ``clip_low`` (1 for no lower bound) and ``clip_high``.
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

    A higher ``clip_high`` than ``clip_low`` is DAPO's clip-higher (Yu et al. 2025, eq. 10).
    """
    return _clipped(torch.exp(log_probs - old), advantages, clip_low, clip_high)


def cispo(log_probs: Tensor, old: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """−stopgrad(clip(r, 1 − low, 1 + high)) A ln π (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    The clip bounds a token's weight and takes no token out of the update, as ``ppo_clip`` does.
    """
    ratio = torch.exp(log_probs - old).detach()
    return -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages * log_probs


def ppo_dual_clip(
    log_probs: Tensor, old: Tensor, advantages: Tensor,
    *, clip_low: float, clip_high: float, dual_clip: float,
) -> Tensor:  # fmt: skip
    """``ppo_clip``, but where A < 0 never above −c A with c = ``dual_clip`` > 1 (Ye et al. 2020, eq. 4)."""
    loss = _clipped(torch.exp(log_probs - old), advantages, clip_low, clip_high)
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


@needs(sequences=True)
def gspo(
    log_probs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences, *, clip_low: float, clip_high: float
) -> Tensor:
    """Clipped by the sequence's ratio s = exp(mean of ln π/π_old over its tokens) (Zheng et al. 2025, eq. 5 to 7). Its
    tokens are those that are trained on.

    In the paper's token form (eq. 13): s without gradient, times π / stopgrad(π), which is 1. Where all tokens of a
    sequence have the same weight, value and gradient are those of the paper's sequence form, and no gradient crosses
    the ranks that share a sequence.
    """
    log_ratio = sequences.broadcast(sequences.mean(log_probs - old), log_probs)
    return _clipped(torch.exp(log_ratio + log_probs - log_probs.detach()), advantages, clip_low, clip_high)


def cpgd(
    log_probs: Tensor, old: Tensor, advantages: Tensor,
    *, clip_low: float, clip_high: float, drift_coefficient: float, drift_cap: float,
) -> Tensor:  # fmt: skip
    """Clipped policy gradient with policy drift (Liu et al. 2025, arXiv 2505.12504, eq. 2), per token.

    −min(l A, clip(l, ln(1 − low), ln(1 + high)) A) + α drift with l = ln π/π_old and α = ``drift_coefficient``. The
    drift's gradient is that of k3 for KL(π_old ‖ π) with a capped factor: min(stopgrad(r) − 1, c) ∇ ln π with c =
    ``drift_cap``. Its value here is that factor times l: never negative, and 0 where both policies agree.
    """
    log_ratio = log_probs - old
    surrogate = _clipped_log(log_ratio, advantages, clip_low, clip_high)
    return surrogate + drift_coefficient * _drift(log_ratio, drift_cap)


@needs(sequences=True)
def cpgd_sequence(
    log_probs: Tensor, old: Tensor, advantages: Tensor, sequences: Sequences,
    *, clip_low: float, clip_high: float, drift_coefficient: float, drift_cap: float,
) -> Tensor:  # fmt: skip
    """``cpgd`` clipped by the sequence's l, the mean over its tokens; the drift stays per token.

    The paper's update (eq. 1) has the sum instead. With the mean, as in ``gspo``, one bound fits all lengths (our
    choice).
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
