"""Host memory that is shared between processes of one user on one host.

A transport has two functions. ``share`` makes a storage visible to other processes and returns its address (plain
JSON). ``attach`` opens the storage at an address in another process.

``share`` moves the storage into shared memory in place. Every tensor that views the storage stays valid, and a worker
can read the trainer's live parameters without an intermediate copy. The memory has no name, so nothing remains after
the processes end, however they end. Another process opens the memory as ``/proc/<pid>/fd/<n>``, which the kernel allows
to the same user in the same process namespace.
"""

import mmap
import os
import resource
from typing import TypedDict

import torch


class Address(TypedDict):
    """The address of a storage: the process, its file descriptor, and the size in bytes."""

    pid: int
    fd: int
    bytes: int


def share(storage: torch.UntypedStorage) -> Address:
    """Share a storage and return its address. Raises RuntimeError when /dev/shm has no room for it."""
    if not storage.is_shared():
        room = os.statvfs("/dev/shm")
        if storage.nbytes() > room.f_bavail * room.f_frsize:
            raise RuntimeError(
                f"/dev/shm has {room.f_bavail * room.f_frsize >> 20} MiB free and a storage of the model needs "
                f"{storage.nbytes() >> 20} MiB: enlarge it (docker run --shm-size, or mount -o remount,size=)"
            )
        # Raise the limit of open files: each storage takes a file descriptor, and a frozen vision tower has a storage
        # for each parameter.
        _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    fd, size = storage._share_fd_cpu_()
    return {"pid": os.getpid(), "fd": fd, "bytes": size}


def attach(address: Address) -> torch.UntypedStorage:
    """Open the storage at an address. Raises RuntimeError when it can't be opened or has another size."""
    path = f"/proc/{address['pid']}/fd/{address['fd']}"
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:
        raise RuntimeError(
            f"can't map the trainer's memory at {path} ({error}): engine and trainer rank must run on one host, as "
            "one user, in one process namespace"
        ) from error
    try:
        if os.fstat(fd).st_size != address["bytes"]:
            raise RuntimeError(f"{path} has {os.fstat(fd).st_size} bytes, expected {address['bytes']}")
        memory = mmap.mmap(fd, address["bytes"])
    finally:
        os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
