"""Who gives which rectangle of which tensor to whom: a pure function of shapes and places, made once.

Each Hugging Face tensor is cut along every boundary of the trainer's blocks into pieces that each holder has whole.
What a vLLM worker wants of a piece reaches it in one of two ways:

* a rank on the worker's host holds the piece: the worker reads it in place, from the rank's parameter (``Copy``);
* none does: it crosses the network once for each host, in a numbered round, from one rank's slot to another's on the
  worker's host, where the worker reads it (``Arrival``).

The holders of a piece share the work (replicas over data parallelism, norms, tied embeddings). In every round a rank
packs and receives at most ``bucket_bytes``, and only two rounds are under way at a time.
"""

import hashlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from megatron_ext.blocks import Block
from rollout.weight_sync.checksum import checksum_unit
from rollout.weight_sync.layout import Index, LayoutError, ParameterLayout, Rectangle, check_exact_cover

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# Parcels start at multiples of this in a slot: any dtype, and whole cache lines.
ALIGNMENT = 64
# A parcel is at most this part of a bucket, so that rounds fill up well.
PARCELS_PER_BUCKET = 8

ShardTable = list[tuple[str, Block]]
"""(shard name, block) of every block on one trainer rank."""


class Place(NamedTuple):
    """A host's name and, on it, a device's. Processes on one host can map each other's memory."""

    host: str
    device: str


@dataclass(frozen=True)
class Topology:
    """The place of each rank and of each worker of each engine; a rank is needed on every host that has workers."""

    ranks: tuple[Place, ...]
    engines: tuple[tuple[Place, ...], ...]


class Holder(NamedTuple):
    """A trainer rank that has a piece, and where: at ``local_start`` of its shard."""

    rank: int
    shard: str
    local_start: Index


class Piece(NamedTuple):
    """A rectangle of an HF tensor that each holder has whole."""

    hf_name: str
    start: Index
    shape: Index
    holders: tuple[Holder, ...]


class Copy(NamedTuple):
    """The rectangle at ``local_start`` of a rank's shard goes to ``parameter_start`` of a worker's parameter."""

    rank: int
    shard: str
    local_start: Index
    shape: Index
    parameter: str
    parameter_start: Index


class Arrival(NamedTuple):
    """As ``Copy``, from the packed rectangle at byte ``offset`` of the rank's slot, there once ``round`` has landed."""

    round: int
    rank: int
    offset: int
    shape: Index
    parameter: str
    parameter_start: Index


class Packing(NamedTuple):
    """In ``round`` the rank packs a rectangle of its shard, as ``dtype``, to byte ``offset`` of its slot."""

    round: int
    offset: int
    shard: str
    local_start: Index
    shape: Index
    dtype: str


class Message(NamedTuple):
    """In ``round``, ``size`` bytes go from the sender's slot to the receiver's.

    The sender packed them in this round, or (``forwarded``) received them in the round before: they are then still in
    its other slot.
    """

    round: int
    sender: int
    receiver: int
    sender_offset: int
    receiver_offset: int
    size: int
    forwarded: bool


class TensorInfo(NamedTuple):
    """An HF tensor: its shape, the dtype it travels in (that of vLLM's parameter), and the checksum's unit."""

    shape: Index
    dtype: str
    unit: int


@dataclass(frozen=True)
class Plan:
    """``copies[e][w]`` and ``arrivals[e][w]``: what worker ``w`` of engine ``e`` places, arrivals by round;
    ``packings[rank]`` and ``messages`` by round; ``slot_bytes[rank]``: the size of a slot, of which there are two;
    ``placed_bytes``: what the workers of all engines write in one sync."""

    tensors: dict[str, TensorInfo]
    pieces: tuple[Piece, ...]
    copies: tuple[tuple[tuple[Copy, ...], ...], ...]
    arrivals: tuple[tuple[tuple[Arrival, ...], ...], ...]
    packings: tuple[tuple[Packing, ...], ...]
    messages: tuple[Message, ...]
    slot_bytes: tuple[int, ...]
    placed_bytes: int

    @property
    def rounds(self) -> int:
        return 1 + max((message.round for message in self.messages), default=-1)

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Plan":
        """From :meth:`to_json` after a trip through JSON, which turns tuples into lists."""
        pieces = (
            Piece(name, tuple(start), tuple(shape), tuple(Holder(rank, shard, tuple(at)) for rank, shard, at in held))
            for name, start, shape, held in data["pieces"]
        )
        return Plan(
            {name: TensorInfo(tuple(shape), dtype, unit) for name, (shape, dtype, unit) in data["tensors"].items()},
            tuple(pieces),
            tuple(tuple(read(Copy, worker) for worker in engine) for engine in data["copies"]),
            tuple(tuple(read(Arrival, worker) for worker in engine) for engine in data["arrivals"]),
            tuple(read(Packing, rank) for rank in data["packings"]),
            read(Message, data["messages"]),
            tuple(data["slot_bytes"]),
            data["placed_bytes"],
        )


def read[T](kind: Callable[..., T], rows: Iterable[Sequence[Any]]) -> tuple[T, ...]:
    """``kind`` from each row of JSON; lists are indices."""
    return tuple(kind(*(tuple(v) if isinstance(v, list) else v for v in row)) for row in rows)


def tensor_shapes(tables: Sequence[ShardTable]) -> dict[str, Index]:
    """Shape of every HF tensor that the trainer's blocks speak of: the furthest element of any block."""
    shapes: dict[str, Index] = {}
    for _, block in itertools.chain.from_iterable(tables):
        stop = _rectangle(block).stop
        if not stop:
            raise LayoutError(f"{block.hf_name}: tensors without dimensions are not supported; give it shape (1,)")
        known = shapes.get(block.hf_name, stop)
        if len(known) != len(stop):
            raise LayoutError(f"{block.hf_name}: blocks with {len(known)} and with {len(stop)} dimensions")
        shapes[block.hf_name] = tuple(map(max, known, stop))
    return shapes


def _rectangle(block: Block) -> Rectangle:
    return Rectangle(tuple(block.hf_start), tuple(block.shape))


def _add(a: Sequence[int], b: Sequence[int]) -> Index:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _subtract(a: Sequence[int], b: Sequence[int]) -> Index:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _cells(shape: Index, rectangles: Sequence[Rectangle]) -> Iterator[Rectangle]:
    """The grid that all boundaries of ``rectangles`` cut a tensor of ``shape`` into."""
    axes = []
    for d, extent in enumerate(shape):
        cuts = sorted({0, extent, *(r.start[d] for r in rectangles), *(r.stop[d] for r in rectangles)})
        axes.append(list(itertools.pairwise(cuts)))
    for intervals in itertools.product(*axes):
        yield Rectangle(tuple(a for a, _ in intervals), tuple(b - a for a, b in intervals))


def _pieces(tables: Sequence[ShardTable], shapes: Mapping[str, Index]) -> list[Piece]:
    """Raises LayoutError for a cell of a tensor that nobody holds."""
    # Rank and shard by the block's rectangle, which most tensors have only a few of.
    held: dict[str, dict[Rectangle, list[Holder]]] = {name: defaultdict(list) for name in shapes}
    for rank, table in enumerate(tables):
        for shard, block in table:
            held[block.hf_name][_rectangle(block)].append(Holder(rank, shard, tuple(block.local_start)))
    pieces = []
    for name, shape in shapes.items():
        for cell in _cells(shape, list(held[name])):
            holders = [
                Holder(rank, shard, _add(local, _subtract(cell.start, rectangle.start)))
                for rectangle, inside in held[name].items()
                if rectangle.contains(cell)
                for rank, shard, local in inside
            ]
            if not holders:
                raise LayoutError(f"{name} of shape {shape}: no trainer rank holds {cell}")
            pieces.append(Piece(name, cell.start, cell.shape, tuple(sorted(holders))))
    return pieces


def _tensors(
    layouts: Sequence[Sequence[ParameterLayout]], shapes: Mapping[str, Index], pieces: Sequence[Piece]
) -> dict[str, TensorInfo]:
    """Check that the workers together take every HF tensor exactly once (or as identical replicas) and in one dtype."""
    rectangles: dict[str, set[Rectangle]] = {name: set() for name in shapes}
    dtypes: dict[str, set[str]] = {name: set() for name in shapes}
    for parameter in itertools.chain.from_iterable(layouts):
        for region in parameter.regions:
            if region.hf_name not in shapes:
                raise LayoutError(
                    f"vLLM parameter {parameter.name} needs {region.hf_name}, which no trainer rank holds"
                )
            rectangles[region.hf_name].add(region.source)
            dtypes[region.hf_name].add(parameter.dtype)
    ends: dict[str, set[int]] = {name: {shape[-1]} for name, shape in shapes.items()}
    for name in shapes:
        ends[name].update(*((r.start[-1], r.stop[-1]) for r in rectangles[name]))
    for piece in pieces:
        ends[piece.hf_name] |= {piece.start[-1], piece.start[-1] + piece.shape[-1]}
    infos = {}
    for name, shape in shapes.items():
        if not rectangles[name]:
            raise LayoutError(f"{name}: vLLM takes no element of it; the trainer's names or the model folder are wrong")
        check_exact_cover(f"{name}, as vLLM's workers take it,", shape, sorted(rectangles[name], key=lambda r: r.start))
        if len(dtypes[name]) > 1 or not dtypes[name] <= ITEMSIZE.keys():
            raise LayoutError(f"{name}: vLLM holds it as {sorted(dtypes[name])}; one of {sorted(ITEMSIZE)} is needed")
        (dtype,) = dtypes[name]
        infos[name] = TensorInfo(shape, dtype, checksum_unit(ITEMSIZE[dtype], sorted(ends[name])))
    return infos


class _Part(NamedTuple):
    """The rectangle at ``start`` of a piece."""

    piece: int
    start: Index
    shape: Index


class _Want(NamedTuple):
    """The part belongs at ``parameter_start`` of a worker's parameter."""

    part: _Part
    parameter: str
    parameter_start: Index


def _wants(worker: Sequence[ParameterLayout], pieces: Sequence[Piece], by_name: Mapping[str, range]) -> Iterator[_Want]:
    for parameter in worker:
        for region in parameter.regions:
            for i in by_name[region.hf_name]:
                piece = Rectangle(pieces[i].start, pieces[i].shape)
                part = piece.intersect(region.source)
                if part:
                    target = _add(region.start, _subtract(part.start, region.hf_start))
                    yield _Want(_Part(i, _subtract(part.start, piece.start), part.shape), parameter.name, target)


def build_plan(
    tables: Sequence[ShardTable],
    layouts: Sequence[Sequence[ParameterLayout]],
    topology: Topology,
    bucket_bytes: int,
) -> Plan:
    """Compose the trainer's blocks (one table per rank) with the parameters of an engine's workers, alike in all
    engines, whose places ``topology`` gives.

    Raises LayoutError naming the tensor when an element that vLLM needs is held by nobody, when vLLM's workers overlap
    or leave a part of a tensor out, or when a tensor is known to one side only; and naming the host when a worker's
    host has no rank.
    """
    shapes = tensor_shapes(tables)
    pieces = _pieces(tables, shapes)
    tensors = _tensors(layouts, shapes, pieces)
    by_name = {
        name: range((found := list(group))[0], found[-1] + 1)
        for name, group in itertools.groupby(range(len(pieces)), lambda i: pieces[i].hf_name)
    }
    size = lambda part: math.prod(part.shape) * ITEMSIZE[tensors[pieces[part.piece].hf_name].dtype]  # noqa: E731
    # Large ones first, so that small ones can even out what these leave. Staged ones one after the other, so that a
    # worker has few of them begun at a time.
    turn = {p.name: i for worker in layouts for i, p in enumerate(worker) if p.staged}
    wants = [
        sorted(_wants(worker, pieces, by_name), key=lambda want: (turn.get(want.parameter, -1), -size(want.part)))
        for worker in layouts
    ]

    on_host: dict[str, list[int]] = defaultdict(list)
    for rank, place in enumerate(topology.ranks):
        on_host[place.host].append(rank)
    given = [[0] * len(topology.ranks) for _ in range(2)]  # to its own device, and over the link to others

    def nearest(ranks: Iterable[int], devices: Iterable[str], extra: int) -> int:
        """On one of the devices if possible, else on another of the host; among these with least to give so far."""
        far, _, chosen = min(
            (far := topology.ranks[rank].device not in devices, given[far][rank], rank) for rank in ranks
        )
        given[far][chosen] += extra
        return chosen

    copies: list[list[list[Copy]]] = []
    far: list[tuple[int, int, _Want]] = []
    devices: dict[tuple[_Part, str], set[str]] = defaultdict(set)  # of a host, on which a part of a far piece is wanted
    turns: dict[_Part, int] = {}
    for e, engine in enumerate(topology.engines):
        copies.append([[] for _ in engine])
        for w, place in enumerate(engine):
            if place.host not in on_host:
                raise LayoutError(f"engine {e} is on host {place.host}, where no rank runs: start one there")
            for want in wants[w]:
                part, name, at = want
                here = {h.rank: h for h in pieces[part.piece].holders if topology.ranks[h.rank].host == place.host}
                if here:
                    holder = here[nearest(here, {place.device}, size(part))]
                    start = _add(holder.local_start, part.start)
                    copies[e][w].append(Copy(holder.rank, holder.shard, start, part.shape, name, at))
                else:
                    far.append((e, w, want))
                    devices[part, place.host].add(place.device)
                    turns[part] = turn.get(name, -1)
    landings: dict[_Part, dict[str, int]] = defaultdict(dict)  # host → rank
    for (part, host), wanting in sorted(devices.items(), key=lambda item: (turns[item[0][0]], -size(item[0][0]))):
        landings[part][host] = nearest(on_host[host], wanting, size(part))
    routes = list(_routes(landings, pieces, tensors, bucket_bytes // PARCELS_PER_BUCKET))
    schedules = [_schedule(routes, bucket_bytes, chained) for chained in (False, True)]
    schedule = min(schedules, key=lambda s: _duration(s.messages))
    return Plan(
        tensors,
        tuple(pieces),
        tuple(tuple(tuple(worker) for worker in engine) for engine in copies),
        _arrivals(topology, far, landings, routes, schedule),
        tuple(tuple(sorted(schedule.packings[rank])) for rank in range(len(topology.ranks))),
        tuple(sorted(schedule.messages)),
        tuple(schedule.slot_bytes[rank] for rank in range(len(topology.ranks))),
        sum(size(want.part) for engine in topology.engines for w in range(len(engine)) for want in wants[w]),
    )


class _Route(NamedTuple):
    """A part of a piece small enough to be a parcel, who packs it, and the ranks that receive it."""

    piece: int
    start: Index
    shape: Index
    dtype: str
    size: int
    origin: Holder
    receivers: tuple[int, ...]


def _routes(
    landings: Mapping[_Part, Mapping[str, int]],
    pieces: Sequence[Piece],
    tensors: Mapping[str, TensorInfo],
    parcel_bytes: int,
) -> Iterator[_Route]:
    """Deal the receivers of each part out to its holders, each to the one with least to send so far."""
    sent: dict[int, int] = defaultdict(int)
    for (i, start, shape), hosts in landings.items():
        piece = pieces[i]
        dtype = tensors[piece.hf_name].dtype
        for part in _split(Rectangle(start, shape), max(1, parcel_bytes // ITEMSIZE[dtype])):
            size = part.size * ITEMSIZE[dtype]
            receivers: dict[Holder, list[int]] = defaultdict(list)
            for receiver in hosts.values():
                holder = min(piece.holders, key=lambda h: (sent[h.rank], h.rank))
                sent[holder.rank] += size
                receivers[holder].append(receiver)
            for holder, ranks in receivers.items():
                yield _Route(i, part.start, part.shape, dtype, _aligned(size), holder, tuple(ranks))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _split(part: Rectangle, elements: int) -> Iterator[Rectangle]:
    """Rectangles of at most ``elements`` that tile ``part``: cut along the first dimension that allows it."""
    if part.size <= elements:
        yield part
        return
    d = next(d for d, extent in enumerate(part.shape) if extent > 1)
    step = max(1, elements * part.shape[d] // part.size)
    for a in range(0, part.shape[d], step):
        start, shape = list(part.start), list(part.shape)
        start[d], shape[d] = part.start[d] + a, min(step, part.shape[d] - a)
        yield from _split(Rectangle(tuple(start), tuple(shape)), elements)


@dataclass
class _Schedule:
    """``landed[receiver, route]``: the round and the offset in the receiver's slot."""

    messages: list[Message] = field(default_factory=list)
    packings: dict[int, list[Packing]] = field(default_factory=lambda: defaultdict(list))
    landed: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    slot_bytes: dict[int, int] = field(default_factory=lambda: defaultdict(int))


def _schedule(routes: Sequence[_Route], bucket_bytes: int, chained: bool) -> _Schedule:
    """Put each route into the first round in which the slots of all its ranks have room.

    ``chained``: the first receiver hands it on to the second in the next round, and so on; otherwise the origin sends
    to all. Routes with the same ranks in the same round become one message.
    """
    used: dict[tuple[int, int], int] = defaultdict(int)  # (rank, round) → bytes of its slot
    together: dict[tuple[int, int, tuple[int, ...]], list[int]] = defaultdict(list)
    first: dict[tuple[int, ...], int] = defaultdict(int)  # no round before this one has room for a full parcel
    queues: dict[int, list[int]] = defaultdict(list)
    for i, route in enumerate(routes):
        queues[route.origin.rank].append(i)
    # In turns, so that all origins work in every round.
    for i in (i for turn in itertools.zip_longest(*queues.values()) for i in turn if i is not None):
        route = routes[i]
        ranks = (route.origin.rank, *route.receivers)
        hops = [0] + [n if chained else 0 for n in range(len(route.receivers))]
        if route.size > bucket_bytes:
            raise LayoutError(f"a parcel of {route.size} bytes is larger than a bucket of {bucket_bytes}")
        t = first[ranks]
        while any(used[rank, t + hop] + route.size > bucket_bytes for rank, hop in zip(ranks, hops, strict=True)):
            t += 1
        first[ranks] = t
        for rank, hop in zip(ranks, hops, strict=True):
            used[rank, t + hop] += route.size
        together[t, route.origin.rank, route.receivers].append(i)
    schedule = _Schedule()
    cursor: dict[tuple[int, int], int] = defaultdict(int)
    for (t, origin, receivers), members in together.items():
        offsets = list(itertools.accumulate((routes[i].size for i in members), initial=0))
        size = offsets.pop()
        sender, source = origin, cursor[origin, t]
        cursor[origin, t] += size
        for i, offset in zip(members, offsets, strict=True):
            _, _, shape, dtype, _, holder, _ = route = routes[i]
            at = _add(holder.local_start, route.start)
            schedule.packings[origin].append(Packing(t, source + offset, holder.shard, at, shape, dtype))
        for n, receiver in enumerate(receivers):
            when = t + n if chained else t
            target = cursor[receiver, when]
            cursor[receiver, when] += size
            schedule.messages.append(Message(when, sender, receiver, source, target, size, chained and n > 0))
            for i, offset in zip(members, offsets, strict=True):
                schedule.landed[receiver, i] = (when, target + offset)
            if chained:
                sender, source = receiver, target
    for (rank, _), size in cursor.items():
        schedule.slot_bytes[rank] = max(schedule.slot_bytes[rank], size)
    return schedule


def _duration(messages: Sequence[Message]) -> int:
    """Rounds one after another, each as long as its busiest rank sends or receives; in bytes of one link."""
    out: dict[tuple[int, int], int] = defaultdict(int)
    for message in messages:
        out[message.round, message.sender] += message.size
        out[message.round, -1 - message.receiver] += message.size
    longest: dict[int, int] = defaultdict(int)
    for (t, _), size in out.items():
        longest[t] = max(longest[t], size)
    return sum(longest.values())


def _arrivals(
    topology: Topology,
    far: Sequence[tuple[int, int, _Want]],
    landings: Mapping[_Part, Mapping[str, int]],
    routes: Sequence[_Route],
    schedule: _Schedule,
) -> tuple[tuple[tuple[Arrival, ...], ...], ...]:
    """What each worker takes from the slots on its host, by round."""
    parts: dict[tuple[int, int], list[int]] = defaultdict(list)  # (receiver, piece) → routes
    for i, route in enumerate(routes):
        for receiver in route.receivers:
            parts[receiver, route.piece].append(i)
    made: list[list[list[Arrival]]] = [[[] for _ in engine] for engine in topology.engines]
    for e, w, want in far:
        receiver = landings[want.part][topology.engines[e][w].host]
        wanted = Rectangle(want.part.start, want.part.shape)
        for i in parts[receiver, want.part.piece]:
            route = routes[i]
            if wanted.contains(Rectangle(route.start, route.shape)):
                when, offset = schedule.landed[receiver, i]
                target = _add(want.parameter_start, _subtract(route.start, want.part.start))
                made[e][w].append(Arrival(when, receiver, offset, route.shape, want.parameter, target))
    return tuple(tuple(tuple(sorted(worker)) for worker in engine) for engine in made)


def cached_plan(
    tables: Sequence[ShardTable],
    layouts: Sequence[Sequence[ParameterLayout]],
    topology: Topology,
    bucket_bytes: int,
    folder: Path,
) -> Plan:
    """``build_plan``, or what it made before of the same arguments, from a file in ``folder`` named by their hash."""
    arguments = json.dumps([tables, layouts, topology, bucket_bytes], default=vars)
    name = hashlib.sha256(Path(__file__).read_bytes() + arguments.encode()).hexdigest()
    path = folder / f"{name}.json"
    if path.is_file():
        return Plan.from_json(json.loads(path.read_text()))
    plan = build_plan(tables, layouts, topology, bucket_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(plan.to_json()))
    partial.rename(path)
    return plan
