"""A plan of the weight sync: which rank provides which rectangle of which tensor to which worker.

``planner.py`` builds the plan. It cuts each Hugging Face tensor along every boundary of the trainer's blocks into
pieces, so that a rank holds a piece completely or not at all. A vLLM worker gets its part of a piece in one of two
ways:

* If a rank on the worker's host holds the piece, the worker copies directly from that rank's parameter (``Copy``).
* Otherwise the part crosses the network once for each host, in a numbered round. One rank packs it into its slot
  (``Send``). A ``Message`` carries it to a slot of a rank on the worker's host. The worker reads it there (``Recv``).

Ranks that hold the same piece (data-parallel replicas, norms, tied embeddings) share the work. In each round a rank
packs and receives at most ``bucket_bytes``, and at most two rounds are in flight.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from megatron_ext.blocks import Block
from rollout.weight_sync.layout import Index

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}

ShardTable = list[tuple[str, Block]]
"""(shard name, block) of every block on one trainer rank."""


class Place(NamedTuple):
    """The names of a host and of a device on it. Processes on one host can map each other's memory."""

    host: str
    device: str


@dataclass(frozen=True)
class Topology:
    """The place of each rank and of each worker. Every host that has workers needs a rank."""

    ranks: tuple[Place, ...]
    # [engine][worker].
    engines: tuple[tuple[Place, ...], ...]


class Holder(NamedTuple):
    """A trainer rank that holds a piece, at ``local_start`` of one of its shards."""

    rank: int
    shard: str
    local_start: Index


class Piece(NamedTuple):
    """A rectangle of an HF tensor that each holder has completely."""

    hf_name: str
    start: Index
    shape: Index
    holders: tuple[Holder, ...]


class Copy(NamedTuple):
    """A copy from ``local_start`` of a rank's shard to ``parameter_start`` of a worker's parameter."""

    rank: int
    shard: str
    local_start: Index
    shape: Index
    parameter: str
    parameter_start: Index


class Recv(NamedTuple):
    """A copy from a rank's slot to ``parameter_start`` of a worker's parameter, once ``round`` is ready.

    The rectangle is packed at byte ``offset`` of the slot.
    """

    round: int
    rank: int
    offset: int
    shape: Index
    parameter: str
    parameter_start: Index


class Send(NamedTuple):
    """In ``round``, the rank packs a rectangle of its shard, converted to ``dtype``, at byte ``offset`` of its slot."""

    round: int
    offset: int
    shard: str
    local_start: Index
    shape: Index
    dtype: str


class Message(NamedTuple):
    """In ``round``, ``size`` bytes go from the sender's slot to the receiver's slot.

    The sender packed them in this round. If ``forwarded``, it instead received them in the round before, so they are in
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
    """An HF tensor."""

    shape: Index
    # The dtype in which it is sent, which is that of vLLM's parameter.
    dtype: str
    # The unit of its checksum, see ``checksum.checksum_unit``.
    unit: int


@dataclass(frozen=True)
class Plan:
    """Everything that a weight sync moves."""

    tensors: dict[str, TensorInfo]
    pieces: tuple[Piece, ...]
    copies: tuple[tuple[tuple[Copy, ...], ...], ...]
    """[engine][worker]: what the worker copies from shards on its host."""
    recvs: tuple[tuple[tuple[Recv, ...], ...], ...]
    """[engine][worker]: what the worker copies from slots on its host, ordered by round."""
    sends: tuple[tuple[Send, ...], ...]
    """[rank]: what the rank packs, ordered by round."""
    messages: tuple[Message, ...]
    """Ordered by round."""
    slot_bytes: tuple[int, ...]
    """[rank]: the size of each of the rank's two slots."""
    placed_bytes: int
    """The bytes that the workers of all engines write in one sync."""

    @property
    def rounds(self) -> int:
        return 1 + max((message.round for message in self.messages), default=-1)

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Plan":
        """The inverse of :meth:`to_json`, after a round trip through JSON, which turns tuples into lists."""
        pieces = []
        for name, start, shape, holders in data["pieces"]:
            pieces.append(Piece(name, tuple(start), tuple(shape), read_rows(Holder, holders)))
        tensors = {}
        for name, (shape, dtype, unit) in data["tensors"].items():
            tensors[name] = TensorInfo(tuple(shape), dtype, unit)
        return Plan(
            tensors=tensors,
            pieces=tuple(pieces),
            copies=tuple(_read_workers(Copy, workers) for workers in data["copies"]),
            recvs=tuple(_read_workers(Recv, workers) for workers in data["recvs"]),
            sends=tuple(read_rows(Send, rank) for rank in data["sends"]),
            messages=read_rows(Message, data["messages"]),
            slot_bytes=tuple(data["slot_bytes"]),
            placed_bytes=data["placed_bytes"],
        )


def read_rows[T](kind: Callable[..., T], rows: Iterable[Sequence[Any]]) -> tuple[T, ...]:
    """Convert each row of JSON to ``kind``. A list in a row is an index."""
    result = []
    for row in rows:
        values = [tuple(value) if isinstance(value, list) else value for value in row]
        result.append(kind(*values))
    return tuple(result)


def _read_workers[T](kind: Callable[..., T], workers: Iterable[Iterable[Sequence[Any]]]) -> tuple[tuple[T, ...], ...]:
    """Convert the rows of each worker of an engine."""
    return tuple(read_rows(kind, rows) for rows in workers)
