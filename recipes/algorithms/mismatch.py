"""Train-inference mismatch: metrics of the differences of trainer's and rollout's log-probs, corrections and a limit.

The engine that samples and the trainer compute the same policy with different kernels, so their log-probs of the same
tokens differ. All importance ratios here are trainer / rollout, that is exp(trainer − rollout). They have no gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from recipes.algorithms.kl import k1, k3
from recipes.algorithms.sequences import Sequences

# Upper bounds of the response lengths in each bucket, in tokens. The buckets show a mismatch that grows with length.
LENGTH_BUCKETS = (64, 256, 1024, 4096, 16384)
BUCKET_NAMES = (*(f"to_{bound}" for bound in LENGTH_BUCKETS), f"over_{LENGTH_BUCKETS[-1]}")
# Suffixes of the names of sums and metrics: the first for all tokens, the others for each bucket.
PARTS = ("", *(f"/{bucket}" for bucket in BUCKET_NAMES))
NAME = "train_inference_mismatch"


# The part ``algorithm.importance_sampling``: (trainer, rollout, sequences) → the weight of each token's loss, [R].


def none(trainer: Tensor, rollout: Tensor, sequences: Sequences) -> Tensor:
    """1: no correction."""
    return torch.ones_like(trainer)


def token_truncated(trainer: Tensor, rollout: Tensor, sequences: Sequences, *, tis_cap: float) -> Tensor:
    """min(ρ, cap), where ρ is the ratio of the token: truncated importance sampling.

    Sources: Ionides 2008; Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".
    """
    return torch.exp((trainer - rollout).detach()).clamp(max=tis_cap)


def sequence_truncated(trainer: Tensor, rollout: Tensor, sequences: Sequences, *, tis_cap: float) -> Tensor:
    """min(Π ρ, cap), where the product is over the sequence's trained tokens.

    Without the cap this is unbiased for a reward of the sequence, but its variance grows with the length. Source: Liu
    et al. 2025, "When speed kills stability: demystifying RL collapse from the training-inference mismatch", Seq-TIS.
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
    """[R]: 1 for the tokens of sequences that the update keeps, 0 for the others.

    A sequence is left out when the geometric mean of its trained tokens' ratios is outside ``sequence_ratio_bounds``,
    or when one of these ratios is below ``token_ratio_veto``. None switches off the one or the other. The aggregation
    weights of the kept sequences do not change. So the update remains a mean over all samples and does not depend on
    the micro-batch split.
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
    """The sums of a micro-batch for :func:`report`.

    They are added up over micro-batches and ranks, except those named ``/max``, of which the maximum is taken.

    ``trainer`` and ``rollout`` [R] are log-probs. Only trained tokens (``sequences.loss_mask``) count. The bucket of a
    sequence is that of its total number of response tokens. A bucket without a trained token has sums of 0.

    One scatter-add computes all sums, so that the host does not wait for the device. On a GPU the order of its
    additions may differ from run to run, and with it the last bits of these FP64 sums. No loss is computed from them.
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
    # [measures, R]. Tokens that are not trained on get 0, since their log-probs may have any value.
    of_tokens = torch.stack(list(measured.values())).masked_fill(~sequences.loss_mask, 0.0)
    bucket_of_sequence = torch.stack([sequences.total_lengths > bound for bound in LENGTH_BUCKETS]).sum(0)
    bucket = bucket_of_sequence[sequences.owners]
    # Each token counts in two parts: the first, which is that of all tokens, and that of its bucket.
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
    """The metrics ``train_inference_mismatch/…``, computed from the added-up :func:`sums`.

    They are given for all trained tokens and for each length bucket that has a trained token:

    - ``mean`` and ``max``: mean and maximum of the absolute log-prob difference, in nats;
    - ``k1`` and ``k3``: estimates of KL(rollout ‖ trainer);
    - ``clipped``: the share of tokens whose ratio is above ``algorithm.tis_cap``;
    - ``ess``: the effective sample size of the ratios as importance weights, (Σw)² / (N Σw²), which is 1 when all are
      equal.
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
    """Raises RuntimeError when the mean absolute log-prob difference is above ``max_mismatch``, or NaN."""
    gap = metrics[f"{NAME}/mean"]
    if not gap <= max_mismatch:
        raise RuntimeError(
            f"{NAME}/mean={gap:.3f} is above algorithm.max_mismatch={max_mismatch}: the engine did not sample from "
            "the trainer's weights, temperature or tokens. Rounding alone makes less; where it is known to make more "
            "(quantised engines), raise algorithm.max_mismatch"
        )
