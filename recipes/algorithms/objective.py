"""The loss of a micro-batch, put together from an algorithm's parts."""

import torch
import torch.distributed as dist

from megatron_ext.forward_backward import LossFunction
from megatron_ext.packing import MicroBatch
from recipes.algorithms import kl, mismatch
from recipes.algorithms.registry import resolve
from recipes.algorithms.sequences import Sequences
from recipes.config import AlgorithmConfig


def loss(config: AlgorithmConfig, context_group: dist.ProcessGroup | None) -> LossFunction:
    """(log-probs [R], or [2, R] with the entropies behind them; micro-batch) → (loss, sums of metrics).

    Each token's policy loss, corrected for the mismatch between trainer and rollout, plus ``kl_coefficient`` × KL to
    the reference where ``kl_in`` is the loss, minus ``entropy_coefficient`` × entropy; then the sum over the tokens'
    weights, which are the whole update's. The batch's ``values``: ``advantage``, ``weight``, ``rollout``, ``sampled``
    (0 for a token that was forced), ``reference`` and, where a rollout makes several updates, ``old``.
    """
    policy_loss, estimator = resolve("policy_loss", config), resolve("kl_estimator", config)

    def of(outputs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        log_probs, entropy = outputs if config.entropy_coefficient else (outputs, None)
        values, now = batch.values, log_probs.detach()
        old, sampled = values.get("old", now), values["sampled"]
        rollout = torch.where(sampled > 0, values["rollout"], old)  # of a forced token there is none
        sequences = Sequences(batch.lengths, context_group)
        losses = policy_loss(log_probs, old, values["advantage"], sequences)
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
        if config.kl_in == "loss" and config.kl_coefficient:
            losses = losses + config.kl_coefficient * estimator(log_probs, values["reference"])
        measured = {"kl": (kl.k3(now, values["reference"]) * sampled).sum()}
        if entropy is not None:
            losses = losses - config.entropy_coefficient * entropy
            measured["entropy"] = entropy.detach().sum()
        measured |= mismatch.sums(old, rollout, sequences, tis_cap=config.tis_cap)
        return (losses * values["weight"]).sum(), measured

    return of
