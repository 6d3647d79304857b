"""The entropy of next-token distributions whose vocabulary is sharded over tensor-parallel ranks."""

from typing import Any

import torch
import torch.distributed as dist

# The number of rows of logits that are processed at a time. Temporary tensors have this many rows, however many tokens
# there are.
ROWS = 256


def vocab_parallel_entropy(logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The entropy −Σ p ln p in nats, [R], of logits [R, V/TP] on each rank of ``group``. It is equal on all ranks.

    The all-reduces exchange two numbers and a maximum for each row, but no logits. If the logits require a gradient, so
    does the entropy. The gradient is −p (ln p + H), and one more tensor of the logits' size is saved for the backward
    pass. Otherwise nothing is saved.
    """
    if torch.is_grad_enabled() and logits.requires_grad:
        entropy: torch.Tensor = _Entropy.apply(logits, group)
        return entropy
    return _normaliser_and_entropy(logits, group)[1]


class _Entropy(torch.autograd.Function):
    """See :func:`vocab_parallel_entropy`."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        normaliser, entropy = _normaliser_and_entropy(logits, group)
        ctx.save_for_backward(logits - normaliser.unsqueeze(1), entropy)
        return entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        log_probs, entropy = ctx.saved_tensors
        return -gradients[0].unsqueeze(1) * log_probs.exp() * (log_probs + entropy.unsqueeze(1)), None


def _normaliser_and_entropy(logits: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ln Σ e^z and H = ln Σ e^z − Σ p z over the full vocabulary, [R] each, from logits z [R, V/TP]."""
    local = [_local_sums(rows) for rows in logits.split(ROWS)]
    own_highest, total, weighted = torch.cat(local, dim=1)
    highest = own_highest.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    # Change the reference from this rank's maximum to the maximum of all ranks:
    # e^(z − m) = e^(z − own m) e^(own m − m).
    shift = own_highest - highest
    total = total * shift.exp()
    weighted = weighted * shift.exp() + shift * total
    sums = torch.stack([total, weighted])
    dist.all_reduce(sums, group=group)
    log_total = sums[0].log()
    return highest + log_total, log_total - sums[1] / sums[0]


def _local_sums(logits: torch.Tensor) -> torch.Tensor:
    """Logits [rows, V/TP] → [3, rows]: this rank's maximum m, Σ e^(z − m) and Σ e^(z − m) (z − m).

    Padded columns hold the dtype's lowest number, so their e^(z − m) is 0.
    """
    highest = logits.amax(dim=1, keepdim=True)
    shifted = logits - highest
    weights = shifted.exp()
    return torch.stack([highest.squeeze(1), weights.sum(dim=1), weights.mul_(shifted).sum(dim=1)])
