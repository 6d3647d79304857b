"""Tensors of one process, mapped by others on the same host, and the counters by which both keep step."""

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
    """The place of a device of this process. Processes with the same host can map each other's memory."""
    # Containers on one machine may share its name; memory is mapped by process id, which a pid namespace bounds.
    pid_namespace = os.readlink("/proc/self/ns/pid")
    return Place(f"{socket.gethostname()} {pid_namespace}", platform.device_id(device))


def share_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The address of all tensors as JSON: their storages, each tensor's place in its storage, and this process.

    Raises RuntimeError for a tensor that keeps its elements elsewhere than in its storage, as quantised ones do.
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
    """Map the tensors at an address of :func:`share_tensors` into this process; returns them by name."""
    storages = []
    for device, storage_address in address["storages"]:
        storages.append(vllm_platform.of(device).load_transport().attach(storage_address))
    tensors = {}
    for name, (index, dtype, shape, stride, offset) in address["tensors"].items():
        empty = torch.empty(0, dtype=getattr(torch, dtype), device=storages[index].device)
        tensors[name] = empty.set_(storages[index], offset, shape, stride)
    return tensors


class Signals:
    """Counters in shared memory by which a trainer rank and the workers that read its slots keep step.

    The rank counts the rounds that are ready in its slots, each worker those that it has consumed. Rounds count over
    all syncs. The first round of each sync moves nothing: it says that the rank's own weights are final.

    ``values``: int64 [1 + 2 x readers]: rounds ready (or ABORTED), then consumed rounds and process id of each reader.
    Each counter is written by one process.
    """

    def __init__(self, values: torch.Tensor, owner_pid: int) -> None:
        self.values = values
        self.owner_pid = owner_pid

    @staticmethod
    def create(readers: int) -> "Signals":
        return Signals(torch.zeros(1 + 2 * readers, dtype=torch.int64), os.getpid())

    def register(self, reader: int) -> None:
        """Tell the rank which process is this reader: the calling one."""
        self.values[2 + 2 * reader] = os.getpid()

    def set_ready(self, rounds: int) -> None:
        self.values[0] = rounds

    def abort(self) -> None:
        self.values[0] = ABORTED

    def set_consumed(self, reader: int, rounds: int) -> None:
        self.values[1 + 2 * reader] = rounds

    def is_ready(self, rounds: int) -> bool:
        """Raises RuntimeError when the rank has aborted."""
        if self.values[0] == ABORTED:
            raise RuntimeError(f"the trainer's process {self.owner_pid} aborted in the middle of the sync: see its log")
        return _reached(self.values[0], rounds)

    def wait_ready(self, rounds: int, meanwhile: Callable[[], bool]) -> None:
        """Wait until so many rounds are ready. Calls ``meanwhile`` until then, or until it returns False (no work)."""
        while not self.is_ready(rounds) and meanwhile():
            pass
        wait(
            lambda: self.is_ready(rounds), self.owner_pid, "the trainer to bring a round of weights", dead_is_done=False
        )

    def wait_consumed(self, rounds: int) -> None:
        """Wait until all readers have consumed so many rounds.

        A reader that has died counts as done: the answer of its engine reports it.
        """
        for consumed, pid in self.values[1:].view(-1, 2):
            reached = partial(_reached, consumed, rounds)
            wait(reached, int(pid), "a worker to consume a round of weights", dead_is_done=True)


def _reached(counter: torch.Tensor, rounds: int) -> bool:
    return bool(counter >= rounds)


def wait(reached: Callable[[], bool], pid: int, what: str, dead_is_done: bool) -> None:
    """Poll ``reached``. Raises RuntimeError after WAIT_SECONDS, and when process ``pid`` is dead, unless
    ``dead_is_done``: then it returns."""
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
    """Whether the process exists and is no zombie (ended, but its parent has not waited for it)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    # The process's name, in brackets, may contain spaces and brackets.
    state = stat.rpartition(")")[2].split()[0]
    return state not in ("Z", "X")
