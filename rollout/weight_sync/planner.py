"""Builds the plan of the weight sync, as a pure function.

Its inputs are the trainer's blocks, the parameters of the workers, the places of both, and the size of a bucket.
"""

import hashlib
import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megatron_ext.blocks import Block
from rollout.weight_sync.checksum import checksum_unit
from rollout.weight_sync.layout import (
    Index,
    LayoutError,
    ParameterLayout,
    Rectangle,
    add_indices,
    check_exact_cover,
    subtract_indices,
)
from rollout.weight_sync.plan import ITEMSIZE, Copy, Holder, Piece, Plan, Recv, ShardTable, TensorInfo, Topology
from rollout.weight_sync.schedule import Part, Route, Schedule, duration, make_routes, make_schedule


def build_plan(
    tables: Sequence[ShardTable],
    layouts: Sequence[Sequence[ParameterLayout]],
    topology: Topology,
    bucket_bytes: int,
) -> Plan:
    """Build the plan that maps the trainer's blocks to the parameters of vLLM's workers.

    ``tables`` has the blocks of each rank. ``layouts`` has the parameter layouts of each worker of an engine, which are
    the same in all engines. ``topology`` has the places of ranks and workers.

    Raises LayoutError naming the tensor in these cases: no rank holds an element that vLLM needs, vLLM's workers
    overlap or leave out a part of a tensor, or only one side has the tensor. Raises LayoutError naming the host when a
    worker's host has no rank.
    """
    shapes = tensor_shapes(tables)
    pieces = _pieces(tables, shapes)
    tensors = _tensors(layouts, shapes, pieces)

    def size(part: Part) -> int:
        return math.prod(part.shape) * ITEMSIZE[tensors[pieces[part.piece].hf_name].dtype]

    destinations = _destinations(layouts, pieces, size)
    assignment = _assign(destinations, pieces, topology, size)
    routes = list(make_routes(assignment.receivers, pieces, tensors, bucket_bytes))
    schedules = [make_schedule(routes, bucket_bytes, chained) for chained in (False, True)]
    schedule = min(schedules, key=lambda s: duration(s.messages))
    placed_bytes = 0
    for engine in topology.engines:
        for worker_number in range(len(engine)):
            placed_bytes += sum(size(destination.part) for destination in destinations[worker_number])
    ranks = range(len(topology.ranks))
    return Plan(
        tensors=tensors,
        pieces=tuple(pieces),
        copies=_frozen(assignment.copies),
        recvs=_recvs(topology, assignment, routes, schedule),
        sends=tuple(tuple(sorted(schedule.sends[rank])) for rank in ranks),
        messages=tuple(sorted(schedule.messages)),
        slot_bytes=tuple(schedule.slot_bytes[rank] for rank in ranks),
        placed_bytes=placed_bytes,
    )


# What the trainer holds


def tensor_shapes(tables: Sequence[ShardTable]) -> dict[str, Index]:
    """Return the shape of every HF tensor in the trainer's blocks, which is where the blocks end in each dimension."""
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


def _pieces(tables: Sequence[ShardTable], shapes: Mapping[str, Index]) -> list[Piece]:
    """Cut every tensor along all boundaries of blocks into pieces.

    Raises LayoutError for a part of a tensor that no rank holds.
    """
    # By the rectangle of the block. Most tensors have only a few different ones.
    holders_of: dict[str, dict[Rectangle, list[Holder]]] = {name: defaultdict(list) for name in shapes}
    for rank, table in enumerate(tables):
        for shard, block in table:
            holder = Holder(rank, shard, tuple(block.local_start))
            holders_of[block.hf_name][_rectangle(block)].append(holder)
    pieces = []
    for name, shape in shapes.items():
        for cell in _cells(shape, list(holders_of[name])):
            holders = []
            for rectangle, block_holders in holders_of[name].items():
                if rectangle.contains(cell):
                    offset = subtract_indices(cell.start, rectangle.start)
                    for rank, shard, local_start in block_holders:
                        holders.append(Holder(rank, shard, add_indices(local_start, offset)))
            if not holders:
                raise LayoutError(f"{name} of shape {shape}: no trainer rank holds {cell}")
            pieces.append(Piece(name, cell.start, cell.shape, tuple(sorted(holders))))
    return pieces


def _cells(shape: Index, rectangles: Sequence[Rectangle]) -> Iterator[Rectangle]:
    """Yield the cells of the grid into which the boundaries of ``rectangles`` cut a tensor of ``shape``."""
    intervals_of_axes = []
    for axis, extent in enumerate(shape):
        cuts = {0, extent}
        for rectangle in rectangles:
            cuts.add(rectangle.start[axis])
            cuts.add(rectangle.stop[axis])
        intervals_of_axes.append(list(itertools.pairwise(sorted(cuts))))
    for intervals in itertools.product(*intervals_of_axes):
        start = tuple(first for first, _ in intervals)
        extents = tuple(stop - first for first, stop in intervals)
        yield Rectangle(start, extents)


def _tensors(
    layouts: Sequence[Sequence[ParameterLayout]], shapes: Mapping[str, Index], pieces: Sequence[Piece]
) -> dict[str, TensorInfo]:
    """Return the TensorInfo of every HF tensor.

    Raises LayoutError unless the workers together take every element of a tensor exactly once (or as part of identical
    rectangles on several workers), and in one dtype.
    """
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
    # Boundaries along the last dimension, which the checksum's unit must divide.
    ends: dict[str, set[int]] = {name: {shape[-1]} for name, shape in shapes.items()}
    for name in shapes:
        for rectangle in rectangles[name]:
            ends[name] |= {rectangle.start[-1], rectangle.stop[-1]}
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
        unit = checksum_unit(ITEMSIZE[dtype], sorted(ends[name]))
        infos[name] = TensorInfo(shape, dtype, unit)
    return infos


# What the workers need, and who provides it


class _Destination(NamedTuple):
    """A part of a piece and its place in a worker's parameter."""

    part: Part
    parameter: str
    parameter_start: Index
    # A number that increases from one staged parameter to the next; -1 for a parameter that is not staged.
    staging_order: int


def _destinations(
    layouts: Sequence[Sequence[ParameterLayout]], pieces: Sequence[Piece], size: Callable[[Part], int]
) -> list[list[_Destination]]:
    """Return the parts that each worker of an engine needs, in the order in which they are assigned and sent.

    Staged parameters come one after another, so that a worker stages few of them at a time. Otherwise large parts come
    first, so that the small ones can balance the load.
    """
    pieces_of: dict[str, list[int]] = defaultdict(list)
    for i, piece in enumerate(pieces):
        pieces_of[piece.hf_name].append(i)
    staging_order: dict[str, int] = {}
    for worker in layouts:
        for number, parameter in enumerate(worker):
            if parameter.staged:
                staging_order[parameter.name] = number
    destinations = []
    for worker in layouts:
        needed = []
        for parameter in worker:
            for region in parameter.regions:
                for i in pieces_of[region.hf_name]:
                    extent = Rectangle(pieces[i].start, pieces[i].shape)
                    overlap = extent.intersect(region.source)
                    if overlap:
                        part = Part(i, subtract_indices(overlap.start, extent.start), overlap.shape)
                        offset_in_region = subtract_indices(overlap.start, region.hf_start)
                        parameter_start = add_indices(region.start, offset_in_region)
                        order = staging_order.get(parameter.name, -1)
                        needed.append(_Destination(part, parameter.name, parameter_start, order))
        needed.sort(key=lambda destination: (destination.staging_order, -size(destination.part)))
        destinations.append(needed)
    return destinations


@dataclass(frozen=True)
class _Assignment:
    """Which rank provides each part to each worker."""

    # [engine][worker]: what ranks on the worker's host provide.
    copies: list[list[list[Copy]]]
    # (engine, worker, destination) of the parts that no rank on the worker's host holds.
    remote: list[tuple[int, int, _Destination]]
    # [part][host]: the rank that receives a remote part for its host.
    receivers: dict[Part, dict[str, int]]


def _assign(
    destinations: Sequence[Sequence[_Destination]],
    pieces: Sequence[Piece],
    topology: Topology,
    size: Callable[[Part], int],
) -> _Assignment:
    """Choose the rank that provides each part on each host.

    Raises LayoutError when the host of a worker has no rank.
    """
    ranks_of_host: dict[str, list[int]] = defaultdict(list)
    for rank, place in enumerate(topology.ranks):
        ranks_of_host[place.host].append(rank)
    # The bytes that each rank provides so far, to workers on its own device and, over a link, to workers on others.
    bytes_within_device = [0] * len(topology.ranks)
    bytes_over_link = [0] * len(topology.ranks)

    def nearest(ranks: Iterable[int], devices: Collection[str], part_bytes: int) -> int:
        """Choose a rank on one of the devices if possible, and among equals the one with the least load so far."""
        choices = []
        for rank in ranks:
            other_device = topology.ranks[rank].device not in devices
            load = bytes_over_link if other_device else bytes_within_device
            choices.append((other_device, load[rank], rank))
        other_device, _, chosen = min(choices)
        load = bytes_over_link if other_device else bytes_within_device
        load[chosen] += part_bytes
        return chosen

    copies: list[list[list[Copy]]] = []
    remote: list[tuple[int, int, _Destination]] = []
    devices_of: dict[tuple[Part, str], set[str]] = defaultdict(set)
    staging_order: dict[Part, int] = {}
    for engine_number, engine in enumerate(topology.engines):
        copies.append([[] for _ in engine])
        for worker_number, place in enumerate(engine):
            if place.host not in ranks_of_host:
                raise LayoutError(
                    f"engine {engine_number} is on host {place.host}, where no rank runs: start one there"
                )
            for destination in destinations[worker_number]:
                part = destination.part
                local_holders = {}
                for holder in pieces[part.piece].holders:
                    if topology.ranks[holder.rank].host == place.host:
                        local_holders[holder.rank] = holder
                if local_holders:
                    holder = local_holders[nearest(local_holders, {place.device}, size(part))]
                    copies[engine_number][worker_number].append(
                        Copy(
                            rank=holder.rank,
                            shard=holder.shard,
                            local_start=add_indices(holder.local_start, part.start),
                            shape=part.shape,
                            parameter=destination.parameter,
                            parameter_start=destination.parameter_start,
                        )
                    )
                else:
                    remote.append((engine_number, worker_number, destination))
                    devices_of[part, place.host].add(place.device)
                    staging_order[part] = destination.staging_order

    def in_sending_order(part_and_host: tuple[Part, str]) -> tuple[int, int]:
        part, _ = part_and_host
        return staging_order[part], -size(part)

    receivers: dict[Part, dict[str, int]] = defaultdict(dict)
    for part, host in sorted(devices_of, key=in_sending_order):
        receivers[part][host] = nearest(ranks_of_host[host], devices_of[part, host], size(part))
    return _Assignment(copies, remote, receivers)


def _recvs(
    topology: Topology, assignment: _Assignment, routes: Sequence[Route], schedule: Schedule
) -> tuple[tuple[tuple[Recv, ...], ...], ...]:
    """Return what each worker copies from the slots on its host, ordered by round."""
    routes_to: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, route in enumerate(routes):
        for receiver in route.receivers:
            routes_to[receiver, route.piece].append(i)
    recvs: list[list[list[Recv]]] = [[[] for _ in engine] for engine in topology.engines]
    for engine_number, worker_number, (part, parameter, parameter_start, _) in assignment.remote:
        host = topology.engines[engine_number][worker_number].host
        receiver = assignment.receivers[part][host]
        needed = Rectangle(part.start, part.shape)
        for i in routes_to[receiver, part.piece]:
            route = routes[i]
            if needed.contains(Rectangle(route.start, route.shape)):
                round_number, offset = schedule.ready[receiver, i]
                chunk_start = add_indices(parameter_start, subtract_indices(route.start, part.start))
                recv = Recv(round_number, receiver, offset, route.shape, parameter, chunk_start)
                recvs[engine_number][worker_number].append(recv)
    for engine in recvs:
        for worker in engine:
            worker.sort()
    return _frozen(recvs)


def _frozen[T](of_engines: Sequence[Sequence[Sequence[T]]]) -> tuple[tuple[tuple[T, ...], ...], ...]:
    """Convert [engine][worker] lists to tuples."""
    return tuple(tuple(map(tuple, workers)) for workers in of_engines)


def cached_plan(
    tables: Sequence[ShardTable],
    layouts: Sequence[Sequence[ParameterLayout]],
    topology: Topology,
    bucket_bytes: int,
    folder: Path,
) -> Plan:
    """Return the result of :func:`build_plan`, from a cache in ``folder``.

    The name of the cache's file is a hash of the arguments.
    """
    arguments = json.dumps([tables, layouts, topology, bucket_bytes], default=vars)
    # The hash includes the code, so a plan of another version of the code is not used.
    code = b"".join(Path(__file__).with_name(file).read_bytes() for file in ("plan.py", "planner.py", "schedule.py"))
    name = hashlib.sha256(code + arguments.encode()).hexdigest()
    path = folder / f"{name}.json"
    if path.is_file():
        return Plan.from_json(json.loads(path.read_text()))
    plan = build_plan(tables, layouts, topology, bucket_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(plan.to_json()))
    unfinished.rename(path)
    return plan
