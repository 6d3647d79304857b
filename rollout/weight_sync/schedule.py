"""The network's part of a plan: what is sent between hosts, in which round, and where in the slots."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rollout.weight_sync.layout import Index, LayoutError, Rectangle, add_indices
from rollout.weight_sync.plan import ITEMSIZE, Holder, Message, Piece, Send, TensorInfo

# Chunks start at multiples of this in a slot: aligned for any dtype, and for cache lines.
ALIGNMENT = 64
# A chunk has at most 1/CHUNKS_PER_BUCKET of a bucket's bytes, so that rounds fill up well.
CHUNKS_PER_BUCKET = 8


class Part(NamedTuple):
    """The rectangle at ``start`` of a piece."""

    piece: int
    start: Index
    shape: Index


class Route(NamedTuple):
    """A chunk of a piece (a rectangle small enough to be sent at once), who packs it, and the ranks that receive it.

    ``size``: its bytes in a slot, with padding to ALIGNMENT.
    """

    piece: int
    start: Index
    shape: Index
    dtype: str
    size: int
    origin: Holder
    receivers: tuple[int, ...]


def make_routes(
    receivers: Mapping[Part, Mapping[str, int]],
    pieces: Sequence[Piece],
    tensors: Mapping[str, TensorInfo],
    bucket_bytes: int,
) -> Iterator[Route]:
    """Distribute the receivers of each part over its holders, each to the one that sends least so far."""
    sent: dict[int, int] = defaultdict(int)
    for (i, start, shape), rank_of_host in receivers.items():
        piece = pieces[i]
        dtype = tensors[piece.hf_name].dtype
        for chunk in _split(Rectangle(start, shape), max(1, bucket_bytes // CHUNKS_PER_BUCKET // ITEMSIZE[dtype])):
            size = chunk.size * ITEMSIZE[dtype]
            receivers_of: dict[Holder, list[int]] = defaultdict(list)
            for receiver in rank_of_host.values():
                origin = min(piece.holders, key=lambda holder: (sent[holder.rank], holder.rank))
                sent[origin.rank] += size
                receivers_of[origin].append(receiver)
            for origin, ranks in receivers_of.items():
                yield Route(i, chunk.start, chunk.shape, dtype, _aligned(size), origin, tuple(ranks))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _split(rectangle: Rectangle, elements: int) -> Iterator[Rectangle]:
    """Rectangles of at most ``elements`` that tile ``rectangle``: cut along the first dimension that allows it."""
    if rectangle.size <= elements:
        yield rectangle
        return
    axis = next(axis for axis, extent in enumerate(rectangle.shape) if extent > 1)
    extent = rectangle.shape[axis]
    step = max(1, elements * extent // rectangle.size)
    for offset in range(0, extent, step):
        start = list(rectangle.start)
        shape = list(rectangle.shape)
        start[axis] += offset
        shape[axis] = min(step, extent - offset)
        yield from _split(Rectangle(tuple(start), tuple(shape)), elements)


@dataclass
class Schedule:
    """``ready[receiver, route]``: the round after which the chunk is in the receiver's slot, and its offset there."""

    messages: list[Message] = field(default_factory=list)
    sends: dict[int, list[Send]] = field(default_factory=lambda: defaultdict(list))
    ready: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    slot_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))


def make_schedule(routes: Sequence[Route], bucket_bytes: int, chained: bool) -> Schedule:
    """The messages of all routes. Those with the same ranks in the same round become one message.

    ``chained``: the first receiver forwards a chunk to the second one in the next round, and so on, so that each rank
    sends it once. Otherwise the origin sends to all receivers in one round. A chain is faster where few ranks hold the
    weights that many hosts need: more GPUs of engines than of the trainer.
    """
    schedule = Schedule()
    # Bytes taken so far in the slot of (rank, round).
    cursor: dict[tuple[int, int], int] = defaultdict(int)
    for (first_round, origin, receivers), members in _rounds_of_routes(routes, bucket_bytes, chained).items():
        offsets = list(itertools.accumulate((routes[i].size for i in members), initial=0))
        size = offsets.pop()
        sender = origin
        sender_offset = cursor[origin, first_round]
        cursor[origin, first_round] += size
        for i, offset in zip(members, offsets, strict=True):
            route = routes[i]
            holder = route.origin
            local_start = add_indices(holder.local_start, route.start)
            schedule.sends[origin].append(
                Send(first_round, sender_offset + offset, holder.shard, local_start, route.shape, route.dtype)
            )
        for hop, receiver in enumerate(receivers):
            round_number = first_round + hop if chained else first_round
            receiver_offset = cursor[receiver, round_number]
            cursor[receiver, round_number] += size
            forwarded = chained and hop > 0
            schedule.messages.append(
                Message(round_number, sender, receiver, sender_offset, receiver_offset, size, forwarded)
            )
            for i, offset in zip(members, offsets, strict=True):
                schedule.ready[receiver, i] = (round_number, receiver_offset + offset)
            if chained:
                sender = receiver
                sender_offset = receiver_offset
    for (rank, _), size in cursor.items():
        schedule.slot_bytes[rank] = max(schedule.slot_bytes[rank], size)
    return schedule


def _rounds_of_routes(
    routes: Sequence[Route], bucket_bytes: int, chained: bool
) -> dict[tuple[int, int, tuple[int, ...]], list[int]]:
    """Put each route into the first round in which the slots of all its ranks have room.

    Returns the routes, by number, of each (round, origin, receivers).
    """
    # Bytes used in the slot of (rank, round).
    used: dict[tuple[int, int], int] = defaultdict(int)
    members: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    # By ranks: no earlier round has room for a full chunk, so the search starts here.
    first_with_room: dict[tuple[int, ...], int] = defaultdict(int)
    for i in _alternate_origins(routes):
        route = routes[i]
        if route.size > bucket_bytes:
            raise LayoutError(f"a chunk of {route.size} bytes is larger than a bucket of {bucket_bytes}")
        ranks = (route.origin.rank, *route.receivers)
        # In how many rounds after the first one each rank holds the chunk.
        hops = [0] + [place if chained else 0 for place in range(len(route.receivers))]
        ranks_and_hops = list(zip(ranks, hops, strict=True))
        first_round = first_with_room[ranks]
        while any(used[rank, first_round + hop] + route.size > bucket_bytes for rank, hop in ranks_and_hops):
            first_round += 1
        first_with_room[ranks] = first_round
        for rank, hop in ranks_and_hops:
            used[rank, first_round + hop] += route.size
        members[first_round, route.origin.rank, route.receivers].append(i)
    return members


def _alternate_origins(routes: Sequence[Route]) -> Iterator[int]:
    """Numbers of the routes, one of each origin in turn, so that all origins send in every round."""
    routes_of_origin: dict[int, list[int]] = defaultdict(list)
    for i, route in enumerate(routes):
        routes_of_origin[route.origin.rank].append(i)
    for turn in itertools.zip_longest(*routes_of_origin.values()):
        for i in turn:
            if i is not None:
                yield i


def duration(messages: Sequence[Message]) -> int:
    """Rounds one after another, each as long as its busiest rank sends or receives; in bytes over one link."""
    sent: dict[tuple[int, int], int] = defaultdict(int)
    received: dict[tuple[int, int], int] = defaultdict(int)
    for message in messages:
        sent[message.round, message.sender] += message.size
        received[message.round, message.receiver] += message.size
    longest: dict[int, int] = defaultdict(int)
    for (round_number, _), size in [*sent.items(), *received.items()]:
        longest[round_number] = max(longest[round_number], size)
    return sum(longest.values())
