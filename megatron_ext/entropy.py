"""The entropy of next-token distributions whose vocabulary is sharded over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist


class _Entropy(torch.autograd.Function):
    """See :func:`vocab_parallel_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """[R, V/TP] → [R], the same on all ranks."""
        highest = logits.amax(dim=1, keepdim=True)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        shifted = logits - highest
        weights = shifted.exp()
        # Σ e^z and Σ e^z z over the full vocabulary. Padded columns hold the dtype's lowest number, so their e^z is 0.
        sums = torch.stack([weights.sum(dim=1), (weights * shifted).sum(dim=1)])
        dist.all_reduce(sums, group=group)
        log_total = sums[0].log()
        entropy = log_total - sums[1] / sums[0]
        ctx.save_for_backward(shifted.sub_(log_total.unsqueeze(1)), entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probs, entropy = ctx.saved_tensors
        return -gradients[0].unsqueeze(1) * log_probs.exp() * (log_probs + entropy.unsqueeze(1)), None


def vocab_parallel_entropy(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The entropy −Σ p ln p in nats, [R], of logits [R, V/TP] on each rank of ``group``; equal on all ranks.

    The gradient is −p (ln p + H). One more tensor of the logits' size is saved for the backward pass.
    """
    entropy: torch.Tensor = _Entropy.apply(logits, group)
    return entropy
