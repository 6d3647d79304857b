"""The network part of a plan: what is sent between hosts, in which round, and at which place in the slots."""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rollout.weight_sync.layout import Index, LayoutError, Rectangle, add_indices
from rollout.weight_sync.plan import ITEMSIZE, Holder, Message, Piece, Send, TensorInfo

# Chunks start at multiples of this many bytes in a slot, so they are aligned for any dtype and for cache lines.
ALIGNMENT = 64
# A chunk has at most 1/CHUNKS_PER_BUCKET of a bucket's bytes, so that rounds fill up well.
CHUNKS_PER_BUCKET = 8


class Part(NamedTuple):
    """The rectangle at ``start`` of a piece."""

    piece: int
    start: Index
    shape: Index


class Route(NamedTuple):
    """A chunk of a piece, the rank that packs it, and the ranks that receive it.

    A chunk is a rectangle that is small enough to be sent at once.
    """

    piece: int
    start: Index
    shape: Index
    dtype: str
    # Bytes in a slot, padded to ALIGNMENT.
    size: int
    # Packs the chunk.
    origin: Holder
    receivers: tuple[int, ...]


def make_routes(
    receivers: Mapping[Part, Mapping[str, int]],
    pieces: Sequence[Piece],
    tensors: Mapping[str, TensorInfo],
    bucket_bytes: int,
) -> Iterator[Route]:
    """Split the parts into chunks, and assign each receiver of a chunk to the holder that has sent least so far.

    ``receivers`` has for each part the rank that receives it on each host.
    """
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
    """Tile ``rectangle`` with rectangles of at most ``elements`` elements.

    It is cut along the first dimension with more than one element, and its parts again if they are too large.
    """
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
    """What the ranks pack, send and receive in each round."""

    messages: list[Message] = field(default_factory=list)
    # By rank.
    sends: dict[int, list[Send]] = field(default_factory=lambda: defaultdict(list))
    # By (receiver, route): the round after which the chunk is in the receiver's slot, and its offset there.
    ready: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    # By rank.
    slot_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))


def make_schedule(routes: Sequence[Route], bucket_bytes: int, chained: bool) -> Schedule:
    """Make the messages of all routes. Routes with the same ranks in the same round become one message.

    With ``chained``, the first receiver forwards a chunk to the second one in the next round, and so on, so that each
    rank sends the chunk once. Otherwise the origin sends it to all receivers in one round. A chain is faster where few
    ranks hold the weights that many hosts need, that is, where the engines have more GPUs than the trainer.
    """
    schedule = Schedule()
    # By (rank, round): the bytes of the slot that are used so far.
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
    """Assign each route to the first round in which the slots of all its ranks have room.

    Returns (round, origin, receivers) → the numbers of the routes.
    """
    # By (rank, round): the bytes of the slot that are used so far.
    used: dict[tuple[int, int], int] = defaultdict(int)
    members: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    # By ranks: the round at which the search starts, because no earlier round has room for a full chunk.
    first_with_room: dict[tuple[int, ...], int] = defaultdict(int)
    for i in _alternate_origins(routes):
        route = routes[i]
        if route.size > bucket_bytes:
            raise LayoutError(f"a chunk of {route.size} bytes is larger than a bucket of {bucket_bytes}")
        ranks = (route.origin.rank, *route.receivers)
        # For each rank: how many rounds after the first one it holds the chunk.
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
    """Yield the numbers of the routes, taking one of each origin in turn, so that all origins send in every round."""
    routes_of_origin: dict[int, list[int]] = defaultdict(list)
    for i, route in enumerate(routes):
        routes_of_origin[route.origin.rank].append(i)
    for turn in itertools.zip_longest(*routes_of_origin.values()):
        for i in turn:
            if i is not None:
                yield i


def duration(messages: Sequence[Message]) -> int:
    """Return the estimated duration of the messages, in bytes over one link.

    Rounds follow one another. A round takes as long as its busiest rank sends or receives.
    """
    sent: dict[tuple[int, int], int] = defaultdict(int)
    received: dict[tuple[int, int], int] = defaultdict(int)
    for message in messages:
        sent[message.round, message.sender] += message.size
        received[message.round, message.receiver] += message.size
    longest: dict[int, int] = defaultdict(int)
    for (round_number, _), size in [*sent.items(), *received.items()]:
        longest[round_number] = max(longest[round_number], size)
    return sum(longest.values())
