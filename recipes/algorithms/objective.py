"""The loss of a micro-batch, put together from an algorithm's parts, and the metrics of an update."""

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.forward_backward import LossFunction
from megatron_ext.packing import MicroBatch
from recipes.algorithms import kl, mismatch
from recipes.algorithms.needs import needs_of
from recipes.algorithms.registry import function_of, resolve
from recipes.algorithms.sequences import sequences_of
from recipes.algorithms.settings import AlgorithmConfig

LOG_PROBS = ("old", "logprobs", "reference")  # the values of a micro-batch that are log-probs


def loss(config: AlgorithmConfig, context_group: dist.ProcessGroup | None) -> LossFunction:
    """([2, R], log-probs and below them the entropies; micro-batch) → (loss, sums of metrics).

    Each token's policy loss, corrected for the mismatch between trainer and rollout, plus ``kl_coefficient`` × KL to
    the reference where ``kl_in`` is the loss, minus ``entropy_coefficient`` × entropy; then the sum over the tokens,
    each times its weight in the full update. ``values`` of the micro-batch, [R] each: ``advantages``, ``weights``,
    ``logprobs`` (the engine's), ``loss_mask``, ``reference`` in steps that make its pass and, where a rollout makes
    several updates, ``old``.

    The sums are those that ``report`` takes, over the tokens that are trained on.
    """
    policy_loss = resolve("policy_loss", config)
    estimator = resolve("kl_estimator", config)
    importance_sampling = resolve("importance_sampling", config)
    needed = needs_of(function_of("policy_loss", config))
    kl_in_loss = config.kl_in == "loss" and config.kl_coefficient > 0

    def micro_batch_loss(outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sequences = sequences_of(batch, context_group)
        # The other tokens' weights are 0. Their ratios may overflow, though, and 0 × infinity is NaN.
        log_probs, entropies = outputs.masked_fill(~sequences.loss_mask, 0.0)
        values = {
            name: column.masked_fill(~sequences.loss_mask, 0.0) if name in LOG_PROBS else column
            for name, column in batch.values.items()
        }
        advantages = values["advantages"]
        old = values.get("old", log_probs.detach())
        rollout = values["logprobs"]

        further: dict[str, Any] = {}
        if needed.sequences:
            further["sequences"] = sequences
        if needed.reference:
            further["reference"] = values["reference"]
        policy_losses = policy_loss(log_probs, old, advantages, **further)
        correction = importance_sampling(old, rollout, sequences)
        if config.sequence_ratio_bounds or config.token_ratio_veto:
            correction = correction * mismatch.kept_sequences(
                old,
                rollout,
                sequences,
                sequence_ratio_bounds=config.sequence_ratio_bounds,
                token_ratio_veto=config.token_ratio_veto,
            )
        losses = policy_losses * correction
        if kl_in_loss:
            losses = losses + config.kl_coefficient * estimator(log_probs, values["reference"])
        if config.entropy_coefficient:
            losses = losses - config.entropy_coefficient * entropies

        current = log_probs.detach()
        of_tokens = {
            "kl/old": kl.k3(old, current),
            "policy_nll": -old,
            "sampler_nll": -rollout,
            "entropy": entropies.detach(),
            "left_out": correction == 0,
        }
        if "reference" in values:
            of_tokens["kl/reference"] = kl.k3(current, values["reference"])
        if clips(policy_loss):
            # A clip acts where the loss would be another without it.
            without_low = policy_loss(current, old, advantages, **further, clip_low=1.0)
            without_high = policy_loss(current, old, advantages, **further, clip_high=math.inf)
            of_tokens["clip_fraction/low"] = without_low != policy_losses.detach()
            of_tokens["clip_fraction/high"] = without_high != policy_losses.detach()
        columns = torch.stack([column.double() for column in of_tokens.values()])
        sums = columns.masked_fill(~sequences.loss_mask, 0.0).sum(1)
        measured = dict(zip(of_tokens, sums.unbind(), strict=True))
        measured |= mismatch.sums(old, rollout, sequences, tis_cap=config.tis_cap)
        return (losses * values["weights"]).sum(), measured

    return micro_batch_loss


def clips(policy_loss: Callable[..., Any]) -> bool:
    """Whether a policy loss has the clip's two keywords."""
    return {"clip_low", "clip_high"} <= signature(policy_loss).parameters.keys()


def report(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of the added-up sums of :func:`loss`, means over the tokens that are trained on; none without any.

    ``kl/reference`` is the k3 estimate of KL(policy ‖ reference) from samples of the policy, ``kl/old`` that of
    KL(old policy ‖ policy) from samples of the old one. ``perplexity/policy`` and ``perplexity/sampler`` are those of
    the sampled tokens under the policy before the rollout's updates, and as the engine recorded them. ``entropy`` is
    the mean entropy of the distributions over the vocabulary. ``clip_fraction/…``: the share of tokens whose loss the
    clip changes. ``train_inference_mismatch/left_out``: the share that a correction of the mismatch leaves out.
    """
    tokens = sums.get(f"{mismatch.NAME}/tokens", 0)
    if not tokens:
        return {}
    names = ("kl/reference", "kl/old", "clip_fraction/low", "clip_fraction/high", "entropy")
    return {
        **{name: sums[name] / tokens for name in names if name in sums},
        "perplexity/policy": math.exp(sums["policy_nll"] / tokens),
        "perplexity/sampler": math.exp(sums["sampler_nll"] / tokens),
        **mismatch.report(sums),
        f"{mismatch.NAME}/left_out": sums["left_out"] / tokens,
    }
