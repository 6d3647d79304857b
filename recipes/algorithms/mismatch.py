"""Where trainer and rollout disagree: how much, what to do about it, and when to stop.

The engine that sampled and the trainer compute the same policy with other kernels, so their log-probs of the same
tokens differ. All ratios here are trainer / rollout, that is exp(trainer − rollout), and none has a gradient.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from recipes.algorithms.kl import k1, k3
from recipes.algorithms.sequences import Sequences

# Response lengths: up to 64 tokens, up to 256, …, and longer. A mismatch that grows with length shows here.
LENGTH_BUCKETS = (64, 256, 1024, 4096, 16384)
BUCKET_NAMES = (*(f"to_{bound}" for bound in LENGTH_BUCKETS), f"over_{LENGTH_BUCKETS[-1]}")
NAME = "train_inference_mismatch"


def truncated_weights(trainer: Tensor, rollout: Tensor, *, tis_cap: float) -> Tensor:
    """min(trainer / rollout, cap) per token, [R]: truncated importance sampling (Ionides 2008; Yao et al. 2025)."""
    return torch.exp((trainer - rollout).detach()).clamp(max=tis_cap)


def kept_sequences(
    trainer: Tensor, rollout: Tensor, sequences: Sequences,
    *, sequence_ratio_bounds: list[float] | None, token_ratio_veto: float | None,
) -> Tensor:  # fmt: skip
    """1 for the tokens of sequences to learn from and 0 for the others, [R].

    A sequence is left out when its geometric mean ratio lies outside ``sequence_ratio_bounds`` or any of its tokens has
    a ratio below ``token_ratio_veto``; None switches either off. The weights of the others stay as they are: the
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
    return sequences.spread(keep, gap)


def sums(trainer: Tensor, rollout: Tensor, sequences: Sequences, *, tis_cap: float) -> dict[str, Tensor]:
    """A micro-batch's part of the report: sums to be added up over micro-batches and ranks (``/max``: the maximum)."""
    trainer, rollout = trainer.detach().double(), rollout.double()
    gap = trainer - rollout
    weight = gap.exp()
    measured = {
        "tokens": torch.ones_like(gap),
        "gap": gap.abs(),
        "k1": k1(rollout, trainer),
        "k3": k3(rollout, trainer),
        "clipped": (weight > tis_cap).double(),
        "weight": weight,
        "weight_squared": weight**2,
    }
    bounds = torch.tensor(LENGTH_BUCKETS, device=gap.device)
    bucket = sequences.spread(torch.bucketize(sequences.whole_lengths(gap.device), bounds), gap)
    # A context-parallel rank can have none of a micro-batch's tokens: then it has no part in the report.
    parts = {"": bucket >= 0} if len(gap) else {}
    parts |= {f"/{BUCKET_NAMES[int(b)]}": bucket == b for b in bucket.unique().tolist()}
    found: dict[str, Tensor] = {}
    for part, tokens in parts.items():
        found |= {f"{NAME}{part}/{name}": values[tokens].sum() for name, values in measured.items()}
        found[f"{NAME}{part}/max"] = measured["gap"][tokens].max()
    return found


def report(totals: Mapping[str, float]) -> dict[str, float]:
    """Finish the added-up ``sums``: ``train_inference_mismatch/…`` for all tokens, then for each bucket of lengths.

    ``mean`` and ``max`` of the absolute gap; ``k1`` and ``k3``, estimates of KL(rollout ‖ trainer); ``clipped``, the
    share of tokens whose ratio is above ``algorithm.tis_cap``; ``ess``, the effective sample size of the ratios
    as importance weights, (Σw)² / (N Σw²): 1 when they are all equal.
    """
    found: dict[str, float] = {}
    for part in ("", *(f"/{bucket}" for bucket in BUCKET_NAMES)):
        if (n := totals.get(f"{NAME}{part}/tokens")) is None:
            continue
        total = {name: totals[f"{NAME}{part}/{name}"] for name in ("gap", "max", "k1", "k3", "clipped")}
        weight, squared = totals[f"{NAME}{part}/weight"], totals[f"{NAME}{part}/weight_squared"]
        found |= {
            f"{NAME}/mean{part}": total["gap"] / n,
            f"{NAME}/max{part}": total["max"],
            f"{NAME}/k1{part}": total["k1"] / n,
            f"{NAME}/k3{part}": total["k3"] / n,
            f"{NAME}/clipped{part}": total["clipped"] / n,
            f"{NAME}/ess{part}": weight**2 / (n * squared),
        }
    return found


def check(metrics: Mapping[str, float], *, max_mismatch: float) -> None:
    """Raises RuntimeError when the mean gap says that the engine's weights are not the trainer's."""
    gap = metrics[f"{NAME}/mean"]
    if not gap <= max_mismatch:  # so that NaN raises
        raise RuntimeError(
            f"{NAME}/mean={gap:.3f} is above algorithm.max_mismatch={max_mismatch}: the engine did not sample from "
            "the trainer's weights, temperature or tokens. Rounding alone makes less; where it is known to make more "
            "(quantised engines), raise the alarm"
        )
