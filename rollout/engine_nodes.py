"""Engines on separate nodes: the orders that rank 0 of the trainer sends to the processes there.

After an order, both sides call the same collective functions, over a group of all processes of the job.
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

# The wait for an order has in effect no limit, because it lasts as long as the trainer's step. When the trainer hangs,
# the watchdogs of its ranks end it, which also closes the connections.
LONGEST_WAIT = timedelta(days=30)

# Names of orders. SYNC has the argument ``version``. GENERATE has the arguments ``sampling``, ``num_complete`` and
# ``rows``, and requests.
ALIVE, SYNC, GENERATE, COLLECT, SERVER_COUNTS, END = "alive", "sync", "generate", "collect", "server counts", "end"


@dataclass(frozen=True)
class Order:
    """What a process on an engines' node has to call, and with which arguments."""

    name: str
    # Plain JSON.
    arguments: Mapping[str, Any]
    requests: TokenBatch | None = None


@dataclass(frozen=True)
class EngineNodes:
    """The connection between the trainer's ranks and the processes on the engines' nodes."""

    # A gloo group of the trainer's ranks, followed by the processes on the engines' nodes. Its timeout applies to all
    # messages except :meth:`next_order`.
    group: dist.ProcessGroup
    # The number of the trainer's ranks.
    trainers: int

    def order(self, name: str, requests: TokenBatch | None = None, **arguments: Any) -> None:
        """Send an order from the trainer's rank 0 to all processes on the engines' nodes.

        On any other process it does nothing, so that both sides may call functions that send orders.
        """
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
            # It is None only on a rank outside the group.
            assert work is not None
            work.wait()

    def next_order(self) -> Order:
        """Wait for the next order, on a process of an engines' node. Raises RuntimeError when the trainer has ended."""
        size = torch.zeros(1, dtype=torch.int64)
        receiving = dist.irecv(size, group=self.group, group_src=0)
        # It is None only on a rank outside the group.
        assert receiving is not None
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
        """Collective: move the tokens of a batch from the processes that generated them to the trainer's ranks.

        Each process sends its responses to one rank. The receiving ranks are spread evenly over the trainer's ranks.
        """
        rank = dist.get_rank(self.group)
        makers = holders(batch, self.group)
        processes = dist.get_world_size(self.group) - self.trainers
        receivers = (makers - self.trainers) * self.trainers // processes
        assert (makers >= self.trainers).all(), "a rank of the trainer has made a response"
        return exchange(batch, np.asarray(receivers == rank, np.bool_), self.group)
