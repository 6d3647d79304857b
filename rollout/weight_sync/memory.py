"""Tensors of one process that others on the same host map, and the counters that synchronise the processes."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rollout import vllm_platform
from rollout.vllm_platform import VllmPlatform
from rollout.weight_sync.plan import Place

WAIT_SECONDS = 600
POLL_SECONDS = 5e-5
ABORTED = -1


def place_of(device: torch.device, platform: VllmPlatform) -> Place:
    """Return the place of a device of this process. Processes with the same ``host`` can map each other's memory."""
    # Containers on one machine may have the same host name. Memory is mapped by process id, which is valid only within
    # a pid namespace, so the namespace is part of the host's name.
    pid_namespace = os.readlink("/proc/self/ns/pid")
    return Place(f"{socket.gethostname()} {pid_namespace}", platform.device_id(device))


def share_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Share tensors with other processes on this host, and return their address as JSON.

    The address has the storages, the place of each tensor in its storage, and the id of this process. Raises
    RuntimeError for a tensor whose elements are not in its storage, such as a quantised tensor.
    """
    index_of_storage: dict[int, int] = {}
    storages: list[Any] = []
    described = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        if storage.nbytes() < tensor.nbytes:
            raise RuntimeError(
                f"{name}: a {type(tensor).__name__} of {tensor.nbytes} bytes with a storage of {storage.nbytes()}: "
                "engines read weights from storages, so they have to be plain tensors"
            )
        if storage._cdata not in index_of_storage:
            index_of_storage[storage._cdata] = len(storages)
            device = tensor.device.type
            storages.append([device, vllm_platform.of(device).load_transport().share(storage)])
        dtype = str(tensor.dtype).removeprefix("torch.")
        index = index_of_storage[storage._cdata]
        described[name] = [index, dtype, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]
    return {"pid": os.getpid(), "storages": storages, "tensors": described}


def attach_tensors(address: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Map the tensors at an address of :func:`share_tensors` into this process. Returns them by name."""
    storages = []
    for device, storage_address in address["storages"]:
        storages.append(vllm_platform.of(device).load_transport().attach(storage_address))
    tensors = {}
    for name, (index, dtype, shape, stride, offset) in address["tensors"].items():
        empty = torch.empty(0, dtype=getattr(torch, dtype), device=storages[index].device)
        tensors[name] = empty.set_(storages[index], offset, shape, stride)
    return tensors


class Signals:
    """Counters in shared memory that synchronise a trainer rank and the workers that read its slots.

    The rank counts the rounds that are ready in its slots. Each worker counts the rounds that it has consumed. Rounds
    are counted over all syncs. The first round of each sync moves nothing: it signals that the rank's own weights are
    final.

    ``values`` is int64 [1 + 2 x readers]: the number of ready rounds (or ABORTED), then for each reader its number of
    consumed rounds and its process id. Each counter is written by one process only.
    """

    def __init__(self, values: torch.Tensor, owner_pid: int) -> None:
        self.values = values
        self.owner_pid = owner_pid

    @staticmethod
    def create(readers: int) -> "Signals":
        return Signals(torch.zeros(1 + 2 * readers, dtype=torch.int64), os.getpid())

    def register(self, reader: int) -> None:
        """Store the process id of this reader, which is the calling process."""
        self.values[2 + 2 * reader] = os.getpid()

    def set_ready(self, rounds: int) -> None:
        self.values[0] = rounds

    def abort(self) -> None:
        self.values[0] = ABORTED

    def set_consumed(self, reader: int, rounds: int) -> None:
        self.values[1 + 2 * reader] = rounds

    def is_ready(self, rounds: int) -> bool:
        """Return whether so many rounds are ready. Raises RuntimeError when the rank has aborted."""
        if self.values[0] == ABORTED:
            raise RuntimeError(f"the trainer's process {self.owner_pid} aborted in the middle of the sync: see its log")
        return _reached(self.values[0], rounds)

    def wait_ready(self, rounds: int, meanwhile: Callable[[], bool]) -> None:
        """Wait until so many rounds are ready.

        While it waits, it calls ``meanwhile`` repeatedly, until that returns False (no more work). Raises RuntimeError
        when the rank has aborted or died.
        """
        while not self.is_ready(rounds) and meanwhile():
            pass
        wait(
            lambda: self.is_ready(rounds), self.owner_pid, "the trainer to bring a round of weights", dead_is_done=False
        )

    def wait_consumed(self, rounds: int) -> None:
        """Wait until all readers have consumed so many rounds.

        A reader that has died counts as done, because the answer of its engine reports the death.
        """
        for consumed, pid in self.values[1:].view(-1, 2):
            reached = partial(_reached, consumed, rounds)
            wait(reached, int(pid), "a worker to consume a round of weights", dead_is_done=True)


def _reached(counter: torch.Tensor, rounds: int) -> bool:
    return bool(counter >= rounds)


def wait(reached: Callable[[], bool], pid: int, what: str, dead_is_done: bool) -> None:
    """Poll ``reached`` until it returns True.

    When process ``pid`` has died, returns if ``dead_is_done``, else raises RuntimeError. Also raises RuntimeError after
    WAIT_SECONDS. ``what`` says in the message what was waited for.
    """
    started = time.monotonic()
    last_check = started
    while not reached():
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - last_check > 1:
            last_check = now
            if not alive(pid):
                if dead_is_done:
                    return
                raise RuntimeError(f"process {pid} died while this one waited for {what}")
            if now - started > WAIT_SECONDS:
                raise RuntimeError(f"waited {WAIT_SECONDS} seconds in vain for {what} (process {pid})")


def alive(pid: int) -> bool:
    """Return whether the process exists and is no zombie (a process that has ended but was not yet waited for)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    # The process name is in brackets and may itself contain spaces and brackets.
    state = stat.rpartition(")")[2].split()[0]
    return state not in ("Z", "X")
