"""The loss of a micro-batch, composed of an algorithm's parts, and the metrics of an update."""

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
    """The loss function of an algorithm: (outputs, micro-batch) → (loss, sums of metrics).

    The outputs are [2, R]: the log-probs in the first row and the entropies in the second.

    The loss of a token is its policy loss, times the correction of the mismatch between trainer and rollout, plus
    ``kl_coefficient`` × KL to the reference where ``kl_in`` is the loss, minus ``entropy_coefficient`` × entropy. The
    loss of the micro-batch is the sum over its tokens, each times its aggregation weight in the full update.

    ``values`` of the micro-batch has, [R] each: ``advantages``, ``weights``, ``logprobs`` (the engine's) and
    ``loss_mask``; ``reference`` in steps with a pass under the reference; ``old`` where a rollout makes several
    updates.

    The sums are the input of :func:`report`. They are over the tokens that are trained on.
    """
    policy_loss = resolve("policy_loss", config)
    estimator = resolve("kl_estimator", config)
    importance_sampling = resolve("importance_sampling", config)
    needed = needs_of(function_of("policy_loss", config))
    kl_in_loss = config.kl_in == "loss" and config.kl_coefficient > 0

    def micro_batch_loss(outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        sequences = sequences_of(batch, context_group)
        # Tokens that are not trained on have the weight 0. But their ratios may overflow, and 0 × infinity is NaN.
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
            # A token is clipped where its loss differs from the loss without the clip.
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
    """Whether a policy loss has the keywords ``clip_low`` and ``clip_high``."""
    return {"clip_low", "clip_high"} <= signature(policy_loss).parameters.keys()


def report(sums: Mapping[str, float]) -> dict[str, float]:
    """The metrics of an update, computed from the added-up sums of :func:`loss`.

    They are means over the tokens that are trained on. Without such tokens there are no metrics.

    - ``kl/reference``: the k3 estimate of KL(policy ‖ reference) from samples of the policy;
    - ``kl/old``: the k3 estimate of KL(old policy ‖ policy) from samples of the old policy;
    - ``perplexity/policy``: the perplexity of the sampled tokens under the policy before the rollout's updates;
    - ``perplexity/sampler``: their perplexity by the log-probs that the engine recorded;
    - ``entropy``: the mean entropy of the distributions over the vocabulary;
    - ``clip_fraction/…``: the share of tokens whose loss the clip changes;
    - ``train_inference_mismatch/…``: see ``mismatch.report``;
    - ``train_inference_mismatch/left_out``: the share of tokens that a correction of the mismatch leaves out.
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
