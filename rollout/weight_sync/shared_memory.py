"""Shared-memory transport: a sender's buffer that every process of the same user on the same host can map.

The interface that any transport has:

* a sender has ``buffer`` (uint8 tensor that pieces are packed into) and ``address`` (JSON, sent to the receivers once);
* a receiver opens an address and gets ``buffer``, whose content is valid from the moment the trainer orders an update
  until that update is answered.

NCCL, CUDA IPC or TCP transports keep this shape: the order to update is where they would start receiving.

The memory is an anonymous ``memfd``: it has no name, so nothing is left behind however the processes die. Receivers
map it through ``/proc/<pid>/fd/<n>``, which the kernel allows to the same user in the same process namespace.

Unproven without a GPU: CUDA parameters are packed through an ordinary device-to-host copy into this memory and placed
by a host-to-device copy. That is correct by construction but has not been run, and it is not the fast path there.
"""

import mmap
import os
from typing import TypedDict

import torch


class Address(TypedDict):
    """Where a sender's memory is: process, its file descriptor, and the size in bytes."""

    pid: int
    fd: int
    bytes: int


def _as_tensor(memory: mmap.mmap, size: int) -> torch.Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, count=size) if size else torch.empty(0, dtype=torch.uint8)


class SharedMemorySender:
    """``size`` bytes of anonymous shared memory; freed when this process and all that mapped it are done with it."""

    def __init__(self, size: int) -> None:
        self._fd = os.memfd_create("weight_sync", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(size, 1))
        self.buffer = _as_tensor(mmap.mmap(self._fd, max(size, 1)), size)
        self.address: Address = {"pid": os.getpid(), "fd": self._fd, "bytes": size}

    def close(self) -> None:
        """Let go of the memory; receivers that mapped it keep it until they let go as well."""
        self.buffer = torch.empty(0, dtype=torch.uint8)
        os.close(self._fd)


class SharedMemoryReceiver:
    """A mapping of a sender's memory. Raises RuntimeError when it can't be opened or has another size."""

    def __init__(self, address: Address) -> None:
        path = f"/proc/{address['pid']}/fd/{address['fd']}"
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise RuntimeError(
                f"can't map the trainer's memory at {path} ({error}): engine and trainer rank must run on one host, as "
                "one user, in one process namespace"
            ) from error
        try:
            if os.fstat(fd).st_size != max(address["bytes"], 1):
                raise RuntimeError(f"{path} has {os.fstat(fd).st_size} bytes, expected {address['bytes']}")
            self.buffer = _as_tensor(mmap.mmap(fd, max(address["bytes"], 1)), address["bytes"])
        finally:
            os.close(fd)
