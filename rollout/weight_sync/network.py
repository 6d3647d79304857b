"""Rounds in which packed weights cross the network between ranks, by gloo over TCP on CPUs and by NCCL between GPUs.

Three operations overlap: the packing of a round, the sending of the round before, and the workers' reading of what has
arrived. For this, each rank has two slots. It reuses a slot once its sends from the slot have completed and all workers
on its host have read the slot.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_ext.blocks import region
from rollout import vllm_platform
from rollout.weight_sync.memory import Signals
from rollout.weight_sync.plan import Plan


class Network:
    """One rank's part in the rounds of a plan.

    ``tensors`` are the rank's shards by name. ``slots`` come from :func:`make_slots`; they are on the device of the
    tensors, and the workers on this host map them. ``readers`` is the number of workers that read the slots. ``group``
    is a gloo or NCCL group of all ranks.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        tensors: Mapping[str, torch.Tensor],
        slots: torch.Tensor,
        readers: int,
        group: dist.ProcessGroup,
    ) -> None:
        self.rounds = plan.rounds
        self.platform = vllm_platform.of(slots.device.type)
        self.slots = slots
        self.signals = Signals.create(readers)
        # [round]: pairs (view of the slot, rectangle of a shard).
        self.packings: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(plan.rounds)]
        for send in plan.sends[rank]:
            source = tensors[send.shard][region(send.local_start, send.shape)]
            target = slot_view(self.slots, send.round, send.offset, send.shape, getattr(torch, send.dtype))
            self.packings[send.round].append((target, source))
        # [round]: the messages with what was packed in the round, and those with what was received in the round before.
        self.messages: list[list[dist.P2POp]] = [[] for _ in range(plan.rounds)]
        self.forwards: list[list[dist.P2POp]] = [[] for _ in range(plan.rounds)]
        for message in plan.messages:
            operations = (self.forwards if message.forwarded else self.messages)[message.round]
            if message.sender == rank:
                slot = self.slots[(message.round - message.forwarded) % 2]
                data = slot[message.sender_offset :][: message.size]
                operations.append(dist.P2POp(dist.isend, data, group=group, group_peer=message.receiver))
            if message.receiver == rank:
                data = self.slots[message.round % 2][message.receiver_offset :][: message.size]
                operations.append(dist.P2POp(dist.irecv, data, group=group, group_peer=message.sender))

    def begin(self, sequence: int) -> None:
        """Begin sync number ``sequence`` (from 0): signal that this rank's weights are final.

        From then on, workers on this host may copy them.
        """
        self.signals.set_ready(sequence * (1 + self.rounds) + 1)

    @torch.no_grad()
    def run(self, sequence: int) -> None:
        """Collective: run all rounds of sync number ``sequence``, after :meth:`begin`."""
        first = sequence * (1 + self.rounds) + 1
        sending: list[dist.Work] = []
        forwarding: list[dist.Work] = []
        try:
            # There is one iteration more than there are rounds, because each iteration also completes the round before.
            for t in range(self.rounds + 1):
                # The forwards of the round before send from the slot that this round fills.
                wait_for(forwarding)
                sending_before = sending
                if t < self.rounds:
                    if t >= 2:
                        # The slot holds round t - 2 until all workers have read it.
                        self.signals.wait_consumed(first + t - 1)
                    for target, source in self.packings[t]:
                        target.copy_(source)
                    sending = start(self.messages[t])
                if t > 0:
                    wait_for(sending_before)
                    self.platform.synchronize_stream(self.slots.device)
                    self.signals.set_ready(first + t)
                if t < self.rounds:
                    forwarding = start(self.forwards[t])
        except BaseException:
            self.signals.abort()
            raise


def make_slots(plan: Plan, rank: int, device: torch.device, former: torch.Tensor | None) -> torch.Tensor:
    """Return the rank's slots, uint8 [2, slot_bytes]. The ``former`` slots are reused if they have the right size.

    An engine that was killed never reports that it has released the former slots, and torch keeps GPU memory that
    another process may still read. With new slots at each restart of an engine, that memory would leak.
    """
    if former is not None and former.shape[1] == plan.slot_bytes[rank]:
        return former
    return torch.empty(2, plan.slot_bytes[rank], dtype=torch.uint8, device=device)


def start(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Start all operations without waiting for them."""
    return dist.batch_isend_irecv(operations) if operations else []


def wait_for(operations: list[dist.Work]) -> None:
    for operation in operations:
        operation.wait()


def slot_view(
    slots: torch.Tensor, round_number: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Return a view of the rectangle of ``shape`` that is packed at byte ``offset`` of the round's slot.

    ``slots`` is uint8 [2, slot_bytes].
    """
    size = math.prod(shape) * dtype.itemsize
    return slots[round_number % 2][offset : offset + size].view(dtype).view(shape)
