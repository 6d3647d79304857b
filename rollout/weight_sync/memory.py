"""Tensors of one process, mapped by others on the same host; and the counters by which both keep step."""

import os
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rollout.weight_sync import cuda_ipc, shared_memory
from rollout.weight_sync.plan import Place

TRANSPORTS: dict[str, Any] = {"cpu": shared_memory, "cuda": cuda_ipc}
WAIT_SECONDS = 600
POLL_SECONDS = 5e-5


def here(device: torch.device) -> Place:
    """This process's place. Processes with the same host can map each other's memory."""
    namespace = os.readlink("/proc/self/ns/pid")
    name = 0 if device.type == "cpu" else cuda_ipc.uuid(device.index)
    return Place(f"{socket.gethostname()} {namespace}", str(name))


def share_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The address of all, plain JSON: their storages, each tensor's place in its storage, and this process."""
    storages: dict[int, tuple[int, Any]] = {}
    described = {}
    for name, tensor in tensors.items():
        storage, kind = tensor.untyped_storage(), tensor.device.type
        if storage._cdata not in storages:
            storages[storage._cdata] = (len(storages), [kind, TRANSPORTS[kind].share(storage)])
        dtype = str(tensor.dtype).removeprefix("torch.")
        index = storages[storage._cdata][0]
        described[name] = [index, dtype, list(tensor.shape), list(tensor.stride()), tensor.storage_offset()]
    return {"pid": os.getpid(), "storages": [address for _, address in storages.values()], "tensors": described}


def attach_tensors(address: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors behind an address, by name."""
    storages = [TRANSPORTS[kind].attach(where) for kind, where in address["storages"]]
    tensors = {}
    for name, (index, dtype, shape, stride, offset) in address["tensors"].items():
        empty = torch.empty(0, dtype=getattr(torch, dtype), device=storages[index].device)
        tensors[name] = empty.set_(storages[index], offset, shape, stride)
    return tensors


class Signals:
    """Counters in shared memory, each written by one process: how many rounds have landed in a rank's slots, and how
    many each worker that reads there has placed. Rounds are counted over all syncs; in the first of each sync nothing
    lands in the slots, but the rank's own weights are final.

    ``values``: int64 [1 + 2 x readers]: landed (or -1: the rank gave up), then placed and process id of each reader.
    """

    def __init__(self, values: torch.Tensor, owner_pid: int) -> None:
        self.values, self.owner_pid = values, owner_pid

    @staticmethod
    def make(readers: int) -> "Signals":
        return Signals(torch.zeros(1 + 2 * readers, dtype=torch.int64), os.getpid())

    def register(self, reader: int) -> None:
        """This process is that reader."""
        self.values[2 + 2 * reader] = os.getpid()

    def land(self, rounds: int) -> None:
        self.values[0] = rounds

    def give_up(self) -> None:
        self.values[0] = -1

    def place(self, reader: int, rounds: int) -> None:
        self.values[1 + 2 * reader] = rounds

    def landed(self, rounds: int) -> bool:
        """Raises RuntimeError when the rank gave up."""
        if self.values[0] < 0:
            raise RuntimeError(f"the trainer's process {self.owner_pid} gave up in the middle of the sync: see its log")
        return _reached(self.values[0], rounds)

    def wait_placed(self, rounds: int) -> None:
        """Until all readers have placed so many rounds; one that has died needs no waiting for (its engine's answer
        tells of it)."""
        for placed, pid in self.values[1:].view(-1, 2):
            wait(partial(_reached, placed, rounds), int(pid), "a worker to place a round of weights", dead_is_done=True)

    def wait_landed(self, rounds: int, meanwhile: Callable[[], bool]) -> None:
        """Until so many rounds have landed, doing ``meanwhile`` (returns whether it did anything) as long as not."""
        while not self.landed(rounds) and meanwhile():
            pass
        wait(lambda: self.landed(rounds), self.owner_pid, "the trainer to bring a round of weights", dead_is_done=False)


def _reached(counter: torch.Tensor, rounds: int) -> bool:
    return bool(counter >= rounds)


def wait(reached: Callable[[], bool], pid: int, what: str, dead_is_done: bool) -> None:
    """Raises RuntimeError when process ``pid`` is gone (unless ``dead_is_done``) or after WAIT_SECONDS."""
    started = checked = time.monotonic()
    while not reached():
        time.sleep(POLL_SECONDS)
        now = time.monotonic()
        if now - checked > 1:
            checked = now
            if not alive(pid):
                if dead_is_done:
                    return
                raise RuntimeError(f"process {pid} died while this one waited for {what}")
            if now - started > WAIT_SECONDS:
                raise RuntimeError(f"waited {WAIT_SECONDS} seconds for {what}, in vain (process {pid})")


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie, which its parent has not yet asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
