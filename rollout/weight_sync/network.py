"""The rounds in which packed weights cross the network between ranks: gloo over TCP on a CPU, NCCL between GPUs.

Packing a round, sending the one before, and the workers' placing of what has landed overlap: every rank has two slots,
and reuses one when its sends are done and all workers on its host have placed what they read there.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_ext.blocks import region
from rollout.weight_sync.memory import Signals
from rollout.weight_sync.plan import Plan


class Network:
    """One rank's part of a plan's rounds. ``tensors``: its shards. ``group``: of all ranks, gloo or NCCL.

    ``slots``: uint8 [2, slot_bytes] on the shards' device, mapped by the workers on this host.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        tensors: Mapping[str, torch.Tensor],
        device: torch.device,
        readers: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.rounds, self.group = plan.rounds, group
        self.slots = torch.empty(2, plan.slot_bytes[rank], dtype=torch.uint8, device=device)
        self.signals = Signals.make(readers)
        self.packings: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(plan.rounds)]
        self.sent: list[list[dist.P2POp]] = [[] for _ in range(plan.rounds)]
        self.handed_on: list[list[dist.P2POp]] = [[] for _ in range(plan.rounds)]
        for p in plan.packings[rank]:
            source = tensors[p.shard][region(p.local_start, p.shape)]
            target = slot_view(self.slots, p.round, p.offset, p.shape, getattr(torch, p.dtype))
            self.packings[p.round].append((target, source))
        for m in plan.messages:
            messages = (self.handed_on if m.forwarded else self.sent)[m.round]
            if m.sender == rank:
                data = self.slots[(m.round - m.forwarded) % 2][m.sender_offset :][: m.size]
                messages.append(dist.P2POp(dist.isend, data, group=group, group_peer=m.receiver))
            if m.receiver == rank:
                data = self.slots[m.round % 2][m.receiver_offset :][: m.size]
                messages.append(dist.P2POp(dist.irecv, data, group=group, group_peer=m.sender))

    def begin(self, sequence: int) -> None:
        """Of sync number ``sequence`` (from 0): this rank's weights are final, workers on this host may copy them."""
        self.signals.land(sequence * (1 + self.rounds) + 1)

    @torch.no_grad()
    def run(self, sequence: int) -> None:
        """All rounds of sync number ``sequence``, behind :meth:`begin`. Collective over the ranks."""
        first = sequence * (1 + self.rounds) + 1
        sending: list[dist.Work] = []
        handing_on: list[dist.Work] = []
        try:
            for t in range(self.rounds + 1):
                finish(handing_on)  # of the round before: it read the slot that comes next
                before = sending
                if t < self.rounds:
                    if t >= 2:
                        self.signals.wait_placed(first + t - 1)  # the slot's former content
                    for target, source in self.packings[t]:
                        target.copy_(source)
                    sending = start(self.sent[t])
                if t > 0:
                    finish(before)
                    if self.slots.is_cuda:
                        torch.cuda.current_stream(self.slots.device).synchronize()
                    self.signals.land(first + t)
                if t < self.rounds:
                    handing_on = start(self.handed_on[t])
        except BaseException:
            self.signals.give_up()
            raise


def start(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Begin all."""
    return dist.batch_isend_irecv(operations) if operations else []


def finish(under_way: list[dist.Work]) -> None:
    """Wait for all."""
    for work in under_way:
        work.wait()


def slot_view(slots: torch.Tensor, t: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The rectangle of ``shape`` packed at byte ``offset`` of the slot of round ``t``."""
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return slots[t % 2][offset : offset + size].view(dtype).view(shape)
