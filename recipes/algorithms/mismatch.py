"""Train-inference mismatch: the differences of trainer's and rollout's log-probs, their corrections and their limit.

The engine that sampled and the trainer compute the same policy with different kernels, so their log-probs of the same
tokens differ. All ratios here are trainer / rollout, that is exp(trainer − rollout), and have no gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from recipes.algorithms.kl import k1, k3
from recipes.algorithms.sequences import Sequences

# Upper bounds of response lengths in tokens. A mismatch that grows with length shows in the buckets.
LENGTH_BUCKETS = (64, 256, 1024, 4096, 16384)
BUCKET_NAMES = (*(f"to_{bound}" for bound in LENGTH_BUCKETS), f"over_{LENGTH_BUCKETS[-1]}")
# Endings of the names of sums and metrics: of all tokens, and of each bucket.
PARTS = ("", *(f"/{bucket}" for bucket in BUCKET_NAMES))
NAME = "train_inference_mismatch"


# The part ``algorithm.importance_sampling``: (trainer, rollout, sequences) → the weight of each token's loss, [R].


def none(trainer: Tensor, rollout: Tensor, sequences: Sequences) -> Tensor:
    """1: no correction."""
    return torch.ones_like(trainer)


def token_truncated(trainer: Tensor, rollout: Tensor, sequences: Sequences, *, tis_cap: float) -> Tensor:
    """min(ρ, cap) with the token's ratio ρ: truncated importance sampling (Ionides 2008; Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training")."""
    return torch.exp((trainer - rollout).detach()).clamp(max=tis_cap)


def sequence_truncated(trainer: Tensor, rollout: Tensor, sequences: Sequences, *, tis_cap: float) -> Tensor:
    """min(Π ρ, cap) with the product over the sequence's trained tokens (Liu et al. 2025, "When speed kills stability:
    demystifying RL collapse from the training-inference mismatch", Seq-TIS).

    Without the cap it has no bias for a reward of the sequence, but its variance grows with the length.
    """
    gap = trainer - rollout
    return sequences.broadcast(sequences.sum(gap).exp().clamp(max=tis_cap), gap)


def icepop(
    trainer: Tensor, rollout: Tensor, sequences: Sequences, *, icepop_low: float, icepop_high: float
) -> Tensor:  # fmt: skip
    """ρ where low ≤ ρ ≤ high, and 0 for the other tokens (IcePop; Ling team 2025, Ring-1T, arXiv 2510.18855)."""
    ratio = torch.exp((trainer - rollout).detach())
    inside = (ratio >= icepop_low) & (ratio <= icepop_high)
    return ratio.masked_fill(~inside, 0.0)


def kept_sequences(
    trainer: Tensor, rollout: Tensor, sequences: Sequences,
    *, sequence_ratio_bounds: list[float] | None, token_ratio_veto: float | None,
) -> Tensor:  # fmt: skip
    """1 for the tokens of sequences that the update keeps and 0 for the others, [R].

    A sequence is left out when the geometric mean of its trained tokens' ratios is outside ``sequence_ratio_bounds`` or
    one of them is below ``token_ratio_veto``; None switches either off. The weights of the others do not change: the
    update remains a mean over all samples, and does not depend on the micro-batch split.
    """
    gap = (trainer - rollout).detach()
    keep = torch.ones(len(sequences.lengths), dtype=torch.bool, device=gap.device)
    if sequence_ratio_bounds is not None:
        low, high = sequence_ratio_bounds
        ratio = sequences.mean(gap).exp()
        keep &= (ratio >= low) & (ratio <= high)
    if token_ratio_veto is not None:
        keep &= sequences.minimum(gap).exp() >= token_ratio_veto
    return sequences.broadcast(keep, gap)


def sums(trainer: Tensor, rollout: Tensor, sequences: Sequences, *, tis_cap: float) -> dict[str, Tensor]:
    """A micro-batch's sums for :func:`report`, to be added up over micro-batches and ranks; of ``/max`` the maximum.

    ``trainer`` and ``rollout`` [R]: log-probs, of which those of trained tokens (``sequences.loss_mask``) count. A
    sequence belongs to the bucket of all its response tokens; a bucket without a trained token has sums of 0.

    All sums are made by one scatter-add, which waits for nothing. On a GPU the order of its additions may differ from
    run to run, and with it the last bits of these FP64 sums; no loss is made of them.
    """
    gap = trainer.detach().double() - rollout.double()
    weight = gap.exp()
    zeros = torch.zeros_like(gap)
    measured = {
        "tokens": torch.ones_like(gap),
        "gap": gap.abs(),
        "k1": k1(zeros, gap),
        "k3": k3(zeros, gap),
        "clipped": (weight > tis_cap).double(),
        "weight": weight,
        "weight_squared": weight**2,
    }
    # [measures, R]; 0 for the tokens that are not trained on, whose log-probs may be anything.
    of_tokens = torch.stack(list(measured.values())).masked_fill(~sequences.loss_mask, 0.0)
    bucket_of_sequence = torch.stack([sequences.total_lengths > bound for bound in LENGTH_BUCKETS]).sum(0)
    bucket = bucket_of_sequence[sequences.owners]
    # Each token counts in two parts: that of all tokens, which is the first, and its bucket.
    part = torch.cat([torch.zeros_like(bucket), 1 + bucket])
    of_both = of_tokens.repeat(1, 2)
    of_parts = gap.new_zeros(len(measured), len(PARTS)).scatter_add_(1, part.expand_as(of_both), of_both)
    gaps = of_both[list(measured).index("gap")]
    greatest = gap.new_zeros(len(PARTS)).scatter_reduce_(0, part, gaps, "amax")
    table = torch.cat([of_parts, greatest.unsqueeze(0)])
    return {
        f"{NAME}{suffix}/{name}": table[row, column]
        for column, suffix in enumerate(PARTS)
        for row, name in enumerate((*measured, "max"))
    }


def report(totals: Mapping[str, float]) -> dict[str, float]:
    """Metrics ``train_inference_mismatch/…`` from the added-up :func:`sums`: of all trained tokens, then of each length
    bucket; none where no token is trained on.

    ``mean`` and ``max`` of the absolute log-prob difference in nats; ``k1`` and ``k3``, estimates of
    KL(rollout ‖ trainer); ``clipped``, the share of tokens whose ratio is above ``algorithm.tis_cap``; ``ess``, the
    effective sample size of the ratios as importance weights, (Σw)² / (N Σw²): 1 when all are equal.
    """
    metrics: dict[str, float] = {}
    for part in PARTS:
        tokens = totals.get(f"{NAME}{part}/tokens", 0)
        if not tokens:
            continue
        total = {name: totals[f"{NAME}{part}/{name}"] for name in ("gap", "max", "k1", "k3", "clipped")}
        weight = totals[f"{NAME}{part}/weight"]
        squared = totals[f"{NAME}{part}/weight_squared"]
        metrics |= {
            f"{NAME}/mean{part}": total["gap"] / tokens,
            f"{NAME}/max{part}": total["max"],
            f"{NAME}/k1{part}": total["k1"] / tokens,
            f"{NAME}/k3{part}": total["k3"] / tokens,
            f"{NAME}/clipped{part}": total["clipped"] / tokens,
            f"{NAME}/ess{part}": weight**2 / (tokens * squared),
        }
    return metrics


def check(metrics: Mapping[str, float], *, max_mismatch: float) -> None:
    """Raises RuntimeError when the mean log-prob difference is above ``max_mismatch``, or NaN."""
    gap = metrics[f"{NAME}/mean"]
    if not gap <= max_mismatch:
        raise RuntimeError(
            f"{NAME}/mean={gap:.3f} is above algorithm.max_mismatch={max_mismatch}: the engine did not sample from "
            "the trainer's weights, temperature or tokens. Rounding alone makes less; where it is known to make more "
            "(quantised engines), raise algorithm.max_mismatch"
        )
