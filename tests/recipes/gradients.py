"""Gradients two ways, and numbers to try them at: what the tests of the algorithms' parts share. All in FP64."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from recipes.algorithms.sequences import Sequences


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, element by element."""
    steps = h * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(function(at + step) - function(at - step)) / (2 * h) for step in steps])


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Autograd's, of a scalar function."""
    x = at.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(function(x), x)
    return derivative


def draws(n: int, seed: int = 0) -> Tensor:
    """[n] standard normal numbers."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sequences(
    lengths: list[int],
    loss_mask: Tensor,
    context_group: dist.ProcessGroup | None = None,
    total_lengths: list[int] | None = None,
) -> Sequences:
    """Sequences of these lengths; ``total_lengths`` where other context-parallel ranks have more of their tokens."""
    on_this_rank = torch.tensor(lengths, dtype=torch.long)
    on_all_ranks = torch.tensor(total_lengths or lengths, dtype=torch.long)
    owners = torch.arange(len(lengths)).repeat_interleave(on_this_rank)
    return Sequences(on_this_rank, on_all_ranks, owners, loss_mask, context_group)


def all_trained(lengths: list[int], context_group: dist.ProcessGroup | None = None) -> Sequences:
    """Sequences of which every token is trained on."""
    return sequences(lengths, torch.ones(sum(lengths), dtype=torch.bool), context_group)
