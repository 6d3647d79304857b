"""A bare memcpy by several processes at once: what moving bytes costs on this machine at least."""

import ctypes
import time
from collections.abc import Sequence

import torch


def copy_bytes(sources: Sequence[torch.Tensor], target: torch.Tensor) -> float:
    """Fill ``target`` (uint8) with the bytes of ``sources``, one after the other and again from the first; seconds.

    ``sources`` are contiguous CPU tensors. Both sides' pages must have been touched before, or this times page faults.
    """
    spans = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in sources]
    if not sum(size for _, size in spans):
        raise ValueError("there is nothing to copy")
    address, left = target.data_ptr(), target.numel()
    started = time.perf_counter()
    while left:
        for source, size in spans:
            size = min(size, left)
            ctypes.memmove(address, source, size)
            address, left = address + size, left - size
    return time.perf_counter() - started
