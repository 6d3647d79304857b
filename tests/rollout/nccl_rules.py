"""Replays what the ranks and workers of a weight sync do, and finds out whether it ends.

:func:`record` runs the project's own code of a rank (``vllm_platform.CUDA.network_group``, ``Network.run``) and notes
what it asks of NCCL and of the host, in order. :func:`replay` plays the notes of all ranks against each other:

* A communicator connects its ranks when each has called a first operation. Before that nothing moves.
* Operations of one group call proceed together. A group begins when all earlier ones of its rank have ended.
* Nothing is buffered: a send ends together with its receive, and only while the groups of both are in progress.
* Between two ranks the first send meets the first receive, the second the second; they must have the same size.
* Calls return at once. The host waits where it synchronises a stream, and where it waits for the workers' counters.

Under ``GLOO`` a group may begin before earlier ones have ended, which hides cycles, and nothing connects ranks first.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rollout import vllm_platform
from rollout.weight_sync import network
from rollout.weight_sync.plan import Plan

NCCL, GLOO = "nccl", "gloo"


@dataclass(frozen=True)
class Message:
    """One end of a message."""

    sends: bool
    peer: int
    size: int


@dataclass(frozen=True)
class Collective:
    """A rank calls a collective operation of all ranks."""


@dataclass(frozen=True)
class Group:
    """A rank calls a group of sends and receives."""

    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Synchronise:
    """A rank's host waits until so many of its groups have ended."""

    groups: int


@dataclass(frozen=True)
class Ready:
    """A rank tells the workers that read its slots that so many rounds are there."""

    rounds: int


@dataclass(frozen=True)
class WaitConsumed:
    """A rank waits until its readers have consumed so many rounds."""

    rounds: int


@dataclass(frozen=True)
class WaitReady:
    """A worker waits for so many rounds of a rank."""

    rank: int
    rounds: int


@dataclass(frozen=True)
class Consumed:
    """A worker has consumed so many rounds, of all ranks that it reads from."""

    rounds: int


@dataclass(frozen=True)
class Together:
    """A worker waits for the others of its engine, which quantise together."""

    number: int


Event = Collective | Group | Synchronise | Ready | WaitConsumed | WaitReady | Consumed | Together


class Deadlock(AssertionError):
    """Nobody can go on; says who waits for what."""


def record(plan: Plan, rank: int, patch: pytest.MonkeyPatch) -> list[Event]:
    """What a rank does from the making of its group to the end of its first sync, on CUDA."""
    events: list[Event] = []
    group = object()
    calls = 0
    waited = 0

    def all_reduce(tensor: torch.Tensor, group: Any = None) -> None:
        assert group is not None
        events.append(Collective())

    def operation(sends: bool, data: torch.Tensor, group: Any, group_peer: int) -> Message:
        return Message(sends, group_peer, data.nbytes)

    def call_group(messages: list[Message]) -> list[Any]:
        nonlocal calls
        assert messages, "NCCL has no empty groups"
        events.append(Group(tuple(messages)))
        calls += 1
        this_call = calls

        def wait() -> None:
            nonlocal waited
            waited = max(waited, this_call)

        return [SimpleNamespace(wait=wait)]

    fake_nccl = SimpleNamespace(
        P2POp=operation, isend=True, irecv=False, batch_isend_irecv=call_group, Work=Any, ProcessGroup=Any
    )
    with patch.context() as within:
        # All engines are on nodes of the trainer.
        within.setattr(dist, "get_world_size", lambda group=None: len(plan.slot_bytes))
        within.setattr(dist, "new_group", lambda backend, timeout: group)
        within.setattr(dist, "all_reduce", all_reduce)
        within.setattr(vllm_platform, "_cuda_device", lambda: torch.device("cpu"))
        within.setattr(network, "dist", fake_nccl)
        nccl_group = vllm_platform.CUDA.network_group(None)  # type: ignore[arg-type]
        slots = torch.empty(2, plan.slot_bytes[rank], dtype=torch.uint8)
        # What is packed has no part in the order.
        without_packing = replace(plan, sends=tuple(() for _ in plan.sends))
        this_rank = network.Network(without_packing, rank, {}, slots, 0, nccl_group)
        this_rank.platform = SimpleNamespace(  # type: ignore[assignment]
            synchronize_stream=lambda device: events.append(Synchronise(waited))
        )
        this_rank.signals = SimpleNamespace(  # type: ignore[assignment]
            set_ready=lambda rounds: events.append(Ready(rounds)),
            wait_consumed=lambda rounds: events.append(WaitConsumed(rounds)),
            abort=lambda: None,
        )
        this_rank.begin(0)
        this_rank.run(0)
    return events


def worker_events(plan: Plan, slot_ranks: Sequence[int]) -> list[Event]:
    """What a worker does in its first sync (``WeightSyncWorker.weight_sync_update``), if each round ends a quantised
    layer."""
    events: list[Event] = []
    for t in range(plan.rounds):
        events += [WaitReady(rank, t + 2) for rank in slot_ranks]
        events += [Consumed(t + 2), Together(t)]
    return events


@dataclass
class _Process:
    """A rank or a worker: its events, and how far it is."""

    name: str
    events: Sequence[Event]
    next_event: int = 0
    rounds: int = 0
    """Ready or consumed so far."""

    @property
    def event(self) -> Event | None:
        return self.events[self.next_event] if self.next_event < len(self.events) else None


@dataclass
class _Stream:
    """The groups that a rank has called, and how many have ended."""

    groups: list[list[int]] = field(default_factory=list)
    """Of each group: which of the rank's messages have not ended."""
    ended: int = 0


class Replay:
    """``ranks``: the events of each. ``workers[engine][worker]``: its events. ``readers[rank]``: the (engine, worker)s
    that read its slots."""

    def __init__(
        self,
        ranks: Sequence[Sequence[Event]],
        workers: Sequence[Sequence[Sequence[Event]]] = (),
        readers: Sequence[Sequence[tuple[int, int]]] | None = None,
        rules: str = NCCL,
    ) -> None:
        self.rules = rules
        self.ranks = [_Process(f"rank {r}", events) for r, events in enumerate(ranks)]
        self.workers = [
            [_Process(f"worker {w} of engine {e}", events) for w, events in enumerate(engine)]
            for e, engine in enumerate(workers)
        ]
        self.readers = readers or [[] for _ in ranks]
        self.streams = [_Stream() for _ in ranks]
        # (sender, receiver) → of each end, in order: the rank's group and the message's number in it, and the size.
        self.sends: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        self.receives: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
        self.callers: set[int] = set()

    def run(self) -> None:
        """Raises Deadlock when it does not end."""
        processes = [*self.ranks, *(worker for engine in self.workers for worker in engine)]
        going_on = True
        while going_on:
            # Every process goes as far as it can, then NCCL does.
            going_on = False
            for rank in range(len(self.ranks)):
                going_on |= self._advance(self.ranks[rank], lambda event, rank=rank: self._rank_can(rank, event))
            for engine in self.workers:
                for worker in engine:
                    going_on |= self._advance(worker, lambda event, engine=engine: self._worker_can(engine, event))
            going_on |= self._transfer()
        stuck = [f"{process.name} at {process.event}" for process in processes if process.event is not None]
        unfinished = [
            f"rank {rank}: {sum(map(len, stream.groups))} messages of its group {stream.ended} and later"
            for rank, stream in enumerate(self.streams)
            if any(stream.groups)
        ]
        if stuck or unfinished:
            raise Deadlock("; ".join([*stuck, *unfinished][:12]))

    def _advance(self, process: _Process, can: Any) -> bool:
        moved = False
        while process.event is not None and can(process.event):
            if isinstance(process.event, Ready | Consumed):
                process.rounds = process.event.rounds
            process.next_event += 1
            moved = True
        return moved

    def _rank_can(self, rank: int, event: Event) -> bool:
        """Whether the rank's host gets past the event. Calls take effect here."""
        if isinstance(event, Collective):
            self.callers.add(rank)
        elif isinstance(event, Group):
            self.callers.add(rank)
            self._call(rank, event)
        elif isinstance(event, Synchronise):
            return not any(self.streams[rank].groups[: event.groups])
        elif isinstance(event, WaitConsumed):
            return all(self.workers[e][w].rounds >= event.rounds for e, w in self.readers[rank])
        return True

    def _worker_can(self, engine: Sequence[_Process], event: Event) -> bool:
        if isinstance(event, WaitReady):
            return self.ranks[event.rank].rounds >= event.rounds
        if isinstance(event, Together):
            # The others are past it, or at it.
            return all(event in other.events[: other.next_event] or other.event == event for other in engine)
        return True

    def _call(self, rank: int, group: Group) -> None:
        stream = self.streams[rank]
        for i, message in enumerate(group.messages):
            pair = (rank, message.peer) if message.sends else (message.peer, rank)
            ends = self.sends if message.sends else self.receives
            ends[pair].append((len(stream.groups), i, message.size))
        stream.groups.append(list(range(len(group.messages))))

    def _in_progress(self, rank: int, group: int) -> bool:
        return self.rules == GLOO or not any(self.streams[rank].groups[:group])

    def _transfer(self) -> bool:
        """End every message whose two ends are in progress."""
        if self.rules == NCCL and len(self.callers) < len(self.ranks):
            return False
        moved = False
        for pair, sends in self.sends.items():
            receives = self.receives[pair]
            while sends and receives:
                sender, receiver = pair
                sending, receiving = sends[0], receives[0]
                if sending[2] != receiving[2]:
                    raise Deadlock(f"{pair}: a send of {sending[2]} bytes meets a receive of {receiving[2]}")
                if not (self._in_progress(sender, sending[0]) and self._in_progress(receiver, receiving[0])):
                    break
                self.streams[sender].groups[sending[0]].remove(sending[1])
                self.streams[receiver].groups[receiving[0]].remove(receiving[1])
                sends.pop(0)
                receives.pop(0)
                moved = True
        return moved
