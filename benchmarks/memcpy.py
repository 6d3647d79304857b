"""A plain memcpy: the least time in which this machine moves bytes."""

import ctypes
import time
from collections.abc import Sequence

import torch


def copy_bytes(sources: Sequence[torch.Tensor], target: torch.Tensor) -> float:
    """Fill ``target`` (uint8) with the bytes of ``sources``, repeating them from the first one. Returns the seconds.

    ``sources`` are contiguous CPU tensors. The pages of both sides must have been touched before; otherwise the seconds
    include page faults. Raises ValueError when the sources have no bytes.
    """
    spans = [(tensor.data_ptr(), tensor.numel() * tensor.element_size()) for tensor in sources]
    if not any(size for _, size in spans):
        raise ValueError("there is nothing to copy")
    address = target.data_ptr()
    remaining = target.numel()
    started = time.perf_counter()
    while remaining:
        for source, source_size in spans:
            size = min(source_size, remaining)
            ctypes.memmove(address, source, size)
            address += size
            remaining -= size
    return time.perf_counter() - started
