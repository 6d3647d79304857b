"""Copies of device tensors on the host, in memory that is kept."""

from collections.abc import Sequence

import torch

from megatron_ext import platform


class HostBuffers:
    """Host tensors that the first copies make and that later ones fill again, because pinned memory takes long to make.

    Each call of :meth:`copy` overwrites the copies of the call before. Where shapes or dtypes are other ones, all
    tensors are made anew.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    @torch.no_grad()
    def copy(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Contiguous copies of the tensors, complete when this returns."""
        if [(t.shape, t.dtype) for t in self.tensors] != [(t.shape, t.dtype) for t in tensors]:
            self.tensors = []  # given back before the new ones are taken
            self.tensors = platform.current().empty_on_host(tensors)
        platform.current().copy_to_host(tensors, self.tensors)
        return self.tensors
