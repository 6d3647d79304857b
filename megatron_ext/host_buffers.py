"""Copies of device tensors on the host, in memory that is reused."""

from collections.abc import Sequence

import torch

from megatron_ext import platform


class HostBuffers:
    """Host tensors that are allocated by the first copy and reused by later ones.

    They are reused because the allocation of pinned memory takes long. Each call of :meth:`copy` overwrites the copies
    of the call before. If a shape or dtype has changed, all tensors are allocated anew.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    @torch.no_grad()
    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copy the tensors to contiguous host tensors. The copies are complete when this returns."""
        if [(t.shape, t.dtype) for t in self.tensors] != [(t.shape, t.dtype) for t in tensors]:
            self.tensors = []  # freed before the new ones are allocated
            self.tensors = platform.current().empty_on_host(tensors)
        platform.current().copy_to_host(tensors, self.tensors)
        return self.tensors
