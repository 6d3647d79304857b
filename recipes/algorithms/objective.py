"""The loss of a micro-batch, put together from an algorithm's parts."""

from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.forward_backward import LossFunction
from megatron_ext.packing import MicroBatch
from recipes.algorithms import kl, mismatch
from recipes.algorithms.needs import needs_of
from recipes.algorithms.registry import function_of, requirements, resolve
from recipes.algorithms.sequences import Sequences
from recipes.algorithms.settings import AlgorithmConfig


def loss(config: AlgorithmConfig, context_group: dist.ProcessGroup | None) -> LossFunction:
    """(log-probs [R], or [2, R] with the entropies after them; micro-batch) → (loss, sums of metrics).

    Each token's policy loss, corrected for the mismatch between trainer and rollout, plus ``kl_coefficient`` × KL to
    the reference where ``kl_in`` is the loss, minus ``entropy_coefficient`` × entropy; then the sum over the tokens,
    each times its weight in the full update. ``values`` of the micro-batch, [R] each: ``advantages``, ``weights``,
    ``logprobs`` (the engine's), ``loss_mask``, ``reference`` where the algorithm needs it and, where a rollout makes
    several updates, ``old``.
    """
    policy_loss = resolve("policy_loss", config)
    estimator = resolve("kl_estimator", config)
    needed = needs_of(function_of("policy_loss", config))
    has_reference = requirements(config).reference
    kl_in_loss = config.kl_in == "loss" and config.kl_coefficient > 0

    def micro_batch_loss(outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_probs, entropy = outputs if config.entropy_coefficient else (outputs, None)
        values = batch.values
        current = log_probs.detach()
        old = values.get("old", current)
        loss_mask = values["loss_mask"]
        # A token that was not sampled has no log-prob of the engine's.
        rollout = torch.where(loss_mask > 0, values["logprobs"], old)
        sequences = Sequences(batch.lengths, context_group)

        further: dict[str, Any] = {}
        if needed.sequences:
            further["sequences"] = sequences
        if needed.reference:
            further["reference"] = values["reference"]
        losses = policy_loss(log_probs, old, values["advantages"], **further)
        if config.importance_sampling:
            losses = losses * mismatch.truncated_weights(old, rollout, tis_cap=config.tis_cap)
        if config.sequence_ratio_bounds or config.token_ratio_veto:
            losses = losses * mismatch.kept_sequences(
                old,
                rollout,
                sequences,
                sequence_ratio_bounds=config.sequence_ratio_bounds,
                token_ratio_veto=config.token_ratio_veto,
            )
        if kl_in_loss:
            losses = losses + config.kl_coefficient * estimator(log_probs, values["reference"])

        measured: dict[str, torch.Tensor] = {}
        if has_reference:
            measured["kl"] = (kl.k3(current, values["reference"]) * loss_mask).sum()
        if entropy is not None:
            losses = losses - config.entropy_coefficient * entropy
            measured["entropy"] = entropy.detach().sum()
        measured |= mismatch.sums(old, rollout, sequences, tis_cap=config.tis_cap)
        return (losses * values["weights"]).sum(), measured

    return micro_batch_loss
