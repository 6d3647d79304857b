"""Does on plain tensors, byte for byte, what a plan says; everything as late as the plan allows."""

import math
from collections.abc import Mapping, Sequence

import torch

from megatron_ext.blocks import region
from rollout.weight_sync.layout import ParameterLayout
from rollout.weight_sync.plan import Plan, Topology

Shards = Sequence[Mapping[str, torch.Tensor]]
NAN_BYTE = 0xFF  # four or two of them are a NaN


def empty(layout: ParameterLayout) -> torch.Tensor:
    """A worker's parameter before a sync: zero where vLLM's loader pads, NaN elsewhere."""
    tensor = torch.full(layout.shape, math.nan, dtype=getattr(torch, layout.dtype))
    for rectangle in layout.padding:
        tensor[region(rectangle.start, rectangle.shape)] = 0
    return tensor


def execute(
    plan: Plan, topology: Topology, shards: Shards, layouts: Sequence[Sequence[ParameterLayout]]
) -> list[list[dict[str, torch.Tensor]]]:
    """[engine][worker] → its parameters, made from ``shards`` (by rank and name).

    What a round brings is read only when the next round is ready, as the two slots of a rank allow. Fails when an
    element is written twice, when chunks or messages share bytes of a slot, and when a worker reads from another host.
    """
    parameters_of_engines = [
        [{layout.name: empty(layout) for layout in worker} for worker in layouts] for _ in topology.engines
    ]

    def place(e: int, w: int, rank: int, parameter: str, start: tuple[int, ...], values: torch.Tensor) -> None:
        assert topology.ranks[rank].host == topology.engines[e][w].host, "a worker reads from another host"
        target = parameters_of_engines[e][w][parameter][region(start, tuple(values.shape))]
        assert target.isnan().all(), f"{parameter}: an element is written twice"
        target.copy_(values)

    def consume(t: int) -> None:
        for e, engine in enumerate(plan.recvs):
            for w, recvs in enumerate(engine):
                for a in (recv for recv in recvs if recv.round == t):
                    dtype = parameters_of_engines[e][w][a.parameter].dtype
                    values = slots[a.rank][t % 2][a.offset :][: math.prod(a.shape) * dtype.itemsize]
                    place(e, w, a.rank, a.parameter, a.parameter_start, values.view(dtype).view(a.shape))

    slots = [torch.full((2, size), NAN_BYTE, dtype=torch.uint8) for size in plan.slot_bytes]
    for t in range(plan.rounds):
        taken = [torch.zeros(size, dtype=torch.bool) for size in plan.slot_bytes]

        def claim(rank: int, offset: int, size: int, taken: list[torch.Tensor] = taken) -> None:
            assert offset + size <= len(taken[rank]), "a slot is too small"
            assert not taken[rank][offset : offset + size].any(), "two chunks or messages share bytes of a slot"
            taken[rank][offset : offset + size] = True

        for rank, sends in enumerate(plan.sends):
            for p in (send for send in sends if send.round == t):
                values = shards[rank][p.shard][region(p.local_start, p.shape)].to(getattr(torch, p.dtype))
                packed = values.contiguous().view(-1).view(torch.uint8)
                claim(rank, p.offset, len(packed))
                slots[rank][t % 2][p.offset : p.offset + len(packed)] = packed
        for m in (m for m in plan.messages if m.round == t):
            claim(m.receiver, m.receiver_offset, m.size)
            source = slots[m.sender][(t - m.forwarded) % 2][m.sender_offset : m.sender_offset + m.size]
            slots[m.receiver][t % 2][m.receiver_offset : m.receiver_offset + m.size] = source
        consume(t - 1)
        for slot in slots:
            slot[(t + 1) % 2].fill_(NAN_BYTE)  # the next round's
    consume(plan.rounds - 1)
    for e, engine in enumerate(plan.copies):
        for w, copies in enumerate(engine):
            for c in copies:
                values = shards[c.rank][c.shard][region(c.local_start, c.shape)]
                place(e, w, c.rank, c.parameter, c.parameter_start, values)
    return parameters_of_engines
