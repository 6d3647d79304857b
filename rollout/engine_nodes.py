"""Engines on nodes of their own: what the trainer's first rank asks of the processes there.

Both sides then call the same collective functions, over a group of all processes of the job.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext.batch import TokenBatch
from megatron_ext.routing import exchange, holders
from rollout.frames import BATCH, JSON, frame, read_frames

# A process waits for an order for as long as the trainer's step takes. A trainer that hangs is ended by the watchdogs
# of its ranks, and with it the connections.
LONGEST_WAIT = timedelta(days=30)

# Names of orders. SYNC has the ``version``; GENERATE has ``sampling``, ``num_complete`` and ``rows``, and requests.
ALIVE, SYNC, GENERATE, COLLECT, SERVER_COUNTS, END = "alive", "sync", "generate", "collect", "server counts", "end"


@dataclass(frozen=True)
class Order:
    """``name`` says what to call, ``arguments`` (plain JSON) and ``requests`` with what."""

    name: str
    arguments: Mapping[str, Any]
    requests: TokenBatch | None = None


@dataclass(frozen=True)
class EngineNodes:
    """``group``: gloo, of the ``trainers`` ranks of the trainer and after them the processes of the engines' nodes. Its
    timeout is that of every message but :meth:`next_order`."""

    group: dist.ProcessGroup
    trainers: int

    def order(self, name: str, requests: TokenBatch | None = None, **arguments: Any) -> None:
        """The trainer's rank 0 sends an order to all processes of the engines' nodes; any other process does nothing,
        so that both sides may call what gives an order."""
        if dist.get_rank(self.group) != 0:
            return
        message = frame(JSON, json.dumps({"name": name, "arguments": arguments}).encode())
        if requests is not None:
            message += frame(BATCH, requests.to_bytes())
        data = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        sent: list[dist.Work | None] = []
        for receiver in range(self.trainers, dist.get_world_size(self.group)):
            for tensor in (size, data):
                sent.append(dist.isend(tensor, group=self.group, group_dst=receiver))
        for work in sent:
            assert work is not None  # it is for a rank outside the group
            work.wait()

    def next_order(self) -> Order:
        """On a process of an engines' node: wait for the next order. Raises RuntimeError when the trainer has ended."""
        size = torch.zeros(1, dtype=torch.int64)
        receiving = dist.irecv(size, group=self.group, group_src=0)
        assert receiving is not None  # it is for a rank outside the group
        receiving.wait(LONGEST_WAIT)
        data = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(data, group=self.group, group_src=0)
        frames = dict(read_frames(io.BytesIO(data.numpy().tobytes()).read))
        header = json.loads(frames[JSON])
        requests = TokenBatch.from_bytes(frames[BATCH]) if BATCH in frames else None
        return Order(header["name"], header["arguments"], requests)

    def part(self) -> None:
        """Collective: wait until every process of the job has called it."""
        dist.barrier(group=self.group)

    def to_trainers(self, batch: TokenBatch) -> TokenBatch:
        """Collective: the batch whose tokens the trainer's ranks hold in place of the processes that made them.

        Each of these hands its responses to one rank; the ranks are spread over the trainer's.
        """
        rank = dist.get_rank(self.group)
        makers = holders(batch, self.group)
        processes = dist.get_world_size(self.group) - self.trainers
        receivers = (makers - self.trainers) * self.trainers // processes
        assert (makers >= self.trainers).all(), "a rank of the trainer has made a response"
        return exchange(batch, np.asarray(receivers == rank, np.bool_), self.group)
