"""Who sends which rectangle of which tensor to whom: a pure function of shapes, made once.

Each Hugging Face tensor is cut along every boundary of the trainer's blocks into pieces that each holder has whole.
One holder of a piece sends it (the one with least to send so far), so replicas over data parallelism, tensor
parallelism (norms) or pipeline stages (tied embeddings) share the work and nothing is sent twice. Every rectangle that
a vLLM worker wants is then composed of parts of pieces.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.blocks import Block
from rollout.weight_sync.checksum import checksum_unit
from rollout.weight_sync.layout import Index, LayoutError, ParameterLayout, Rectangle, check_exact_cover

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
# Pieces start at multiples of this in a sender's buffer: any dtype, and whole cache lines.
ALIGNMENT = 64

ShardTable = list[tuple[str, Block]]
"""(shard name, block) of every block on one trainer rank."""


@dataclass(frozen=True)
class Holder:
    """A trainer rank that has a piece, and where: at ``local_start`` of its shard."""

    rank: int
    shard: str
    local_start: Index


@dataclass(frozen=True)
class Piece:
    """A rectangle of an HF tensor that travels as one: ``holders[0]`` sends it from byte ``offset`` of its buffer."""

    hf_name: str
    rectangle: Rectangle
    holders: tuple[Holder, ...]
    offset: int


@dataclass(frozen=True)
class Copy:
    """The part at ``start`` of a piece goes to ``parameter_start`` of a worker's parameter."""

    piece: int
    start: Index
    shape: Index
    parameter: str
    parameter_start: Index


@dataclass(frozen=True)
class TensorInfo:
    """An HF tensor: its shape, the dtype it travels in (that of vLLM's parameter), and the checksum's unit."""

    shape: Index
    dtype: str
    unit: int


@dataclass(frozen=True)
class Plan:
    """``buffer_bytes[rank]``: size of each sender's buffer; ``copies[w]``: what worker ``w`` of an engine places."""

    tensors: dict[str, TensorInfo]
    pieces: tuple[Piece, ...]
    buffer_bytes: tuple[int, ...]
    copies: tuple[tuple[Copy, ...], ...]

    def placed_bytes(self) -> int:
        """Bytes that the workers of one engine write in one sync."""
        sizes = (
            math.prod(copy.shape) * ITEMSIZE[self.tensors[self.pieces[copy.piece].hf_name].dtype]
            for copies in self.copies
            for copy in copies
        )
        return sum(sizes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Plan":
        tensors = {n: TensorInfo(tuple(t["shape"]), t["dtype"], t["unit"]) for n, t in data["tensors"].items()}
        pieces = tuple(
            Piece(
                p["hf_name"],
                Rectangle(tuple(p["rectangle"]["start"]), tuple(p["rectangle"]["shape"])),
                tuple(Holder(h["rank"], h["shard"], tuple(h["local_start"])) for h in p["holders"]),
                p["offset"],
            )
            for p in data["pieces"]
        )
        copies = tuple(
            tuple(
                Copy(c["piece"], tuple(c["start"]), tuple(c["shape"]), c["parameter"], tuple(c["parameter_start"]))
                for c in worker
            )
            for worker in data["copies"]
        )
        return Plan(tensors, pieces, tuple(data["buffer_bytes"]), copies)


def _block_rectangle(block: Block) -> Rectangle:
    return Rectangle(tuple(block.hf_start), tuple(block.shape))


def tensor_shapes(tables: Sequence[ShardTable]) -> dict[str, Index]:
    """Shape of every HF tensor that the trainer's blocks speak of: the furthest element of any block."""
    shapes: dict[str, Index] = {}
    for _, block in itertools.chain.from_iterable(tables):
        stop = _block_rectangle(block).stop
        if not stop:
            raise LayoutError(f"{block.hf_name}: tensors without dimensions are not supported; give it shape (1,)")
        known = shapes.get(block.hf_name, stop)
        if len(known) != len(stop):
            raise LayoutError(f"{block.hf_name}: blocks with {len(known)} and with {len(stop)} dimensions")
        shapes[block.hf_name] = tuple(map(max, known, stop))
    return shapes


def _cells(shape: Index, rectangles: Sequence[Rectangle]) -> Iterator[Rectangle]:
    """The grid that all boundaries of ``rectangles`` cut a tensor of ``shape`` into."""
    axes = []
    for d, extent in enumerate(shape):
        cuts = sorted({0, extent, *(r.start[d] for r in rectangles), *(r.stop[d] for r in rectangles)})
        axes.append(list(itertools.pairwise(cuts)))
    for intervals in itertools.product(*axes):
        yield Rectangle(tuple(a for a, _ in intervals), tuple(b - a for a, b in intervals))


def _held_cells(
    hf_name: str, shape: Index, held: Sequence[tuple[int, str, Block]]
) -> Iterator[tuple[Rectangle, list[Holder]]]:
    """Cells of a tensor with their holders. Raises LayoutError for a cell that nobody holds."""
    for cell in _cells(shape, [_block_rectangle(block) for _, _, block in held]):
        holders = []
        for rank, shard, block in held:
            if _block_rectangle(block).contains(cell):
                inside = zip(block.local_start, block.hf_start, cell.start, strict=True)
                holders.append(Holder(rank, shard, tuple(local + c - b for local, b, c in inside)))
        if not holders:
            raise LayoutError(f"{hf_name} of shape {shape}: no trainer rank holds {cell}")
        yield cell, holders


def _wanted(layouts: Sequence[Sequence[ParameterLayout]], shapes: Mapping[str, Index]) -> dict[str, TensorInfo]:
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
    for name, shape in shapes.items():
        if not rectangles[name]:
            raise LayoutError(f"{name}: vLLM takes no element of it; the trainer's names or the model folder are wrong")
        check_exact_cover(f"{name}, as vLLM's workers take it,", shape, sorted(rectangles[name], key=lambda r: r.start))
        if len(dtypes[name]) > 1 or not dtypes[name] <= ITEMSIZE.keys():
            raise LayoutError(f"{name}: vLLM holds it as {sorted(dtypes[name])}; one of {sorted(ITEMSIZE)} is needed")
    infos = {}
    for name, shape in shapes.items():
        (dtype,) = dtypes[name]
        ends = [shape[-1], *(r.start[-1] for r in rectangles[name]), *(r.stop[-1] for r in rectangles[name])]
        infos[name] = TensorInfo(shape, dtype, checksum_unit(ITEMSIZE[dtype], ends))
    return infos


def build_plan(tables: Sequence[ShardTable], layouts: Sequence[Sequence[ParameterLayout]]) -> Plan:
    """Compose the trainer's blocks (one table per rank) with the parameters of an engine's workers.

    Raises LayoutError naming the tensor when an element that vLLM needs is held by nobody, when vLLM's workers overlap
    or leave a part of a tensor out, or when a tensor is known to one side only.
    """
    shapes = tensor_shapes(tables)
    infos = _wanted(layouts, shapes)
    held: dict[str, list[tuple[int, str, Block]]] = {name: [] for name in shapes}
    for rank, table in enumerate(tables):
        for shard, block in table:
            held[block.hf_name].append((rank, shard, block))
    cells = [(name, *cell) for name, shape in shapes.items() for cell in _held_cells(name, shape, held[name])]
    # Large ones first, each to the holder with least to send: within one piece of the best balance.
    cells.sort(key=lambda cell: -cell[1].size * ITEMSIZE[infos[cell[0]].dtype])
    used = [0] * len(tables)
    pieces = []
    for name, rectangle, holders in cells:
        sender = min(holders, key=lambda holder: (used[holder.rank], holder.rank))
        others = [holder for holder in holders if holder is not sender]
        pieces.append(Piece(name, rectangle, (sender, *others), used[sender.rank]))
        size = rectangle.size * ITEMSIZE[infos[name].dtype]
        used[sender.rank] += -(-size // ALIGNMENT) * ALIGNMENT
        last = (rectangle.start[-1], rectangle.stop[-1])
        unit = min(infos[name].unit, checksum_unit(ITEMSIZE[infos[name].dtype], last))
        infos[name] = TensorInfo(infos[name].shape, infos[name].dtype, unit)
    by_name: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        by_name.setdefault(piece.hf_name, []).append(i)
    copies = tuple(tuple(_copies(worker, pieces, by_name)) for worker in layouts)
    return Plan(infos, tuple(pieces), tuple(used), copies)


def _copies(
    worker: Sequence[ParameterLayout], pieces: Sequence[Piece], by_name: Mapping[str, Sequence[int]]
) -> Iterator[Copy]:
    for parameter in worker:
        for region in parameter.regions:
            for i in by_name[region.hf_name]:
                piece = pieces[i].rectangle
                part = piece.intersect(region.source)
                if part:
                    in_piece = tuple(a - b for a, b in zip(part.start, piece.start, strict=True))
                    target = zip(region.start, part.start, region.hf_start, strict=True)
                    yield Copy(i, in_piece, part.shape, parameter.name, tuple(p + a - b for p, a, b in target))
