"""A plan: which rank gives which rectangle of which tensor to which worker. ``planner.py`` builds it.

Each Hugging Face tensor is cut along every boundary of the trainer's blocks into pieces, so that a rank holds a piece
completely or not at all. A vLLM worker gets its part of a piece in one of two ways:

* A rank on the worker's host holds the piece: the worker copies from the rank's parameter in place (``Copy``).
* Otherwise the part crosses the network once for each host, in a numbered round: one rank packs it into its slot
  (``Send``), a ``Message`` carries it to a slot of a rank on the worker's host, and the worker reads it there
  (``Recv``).

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
    """A host's name and, on it, a device's. Processes on one host can map each other's memory."""

    host: str
    device: str


@dataclass(frozen=True)
class Topology:
    """The place of each rank and of each worker of each engine. Every host that has workers needs a rank."""

    ranks: tuple[Place, ...]
    engines: tuple[tuple[Place, ...], ...]


class Holder(NamedTuple):
    """A trainer rank that holds a piece, and where: at ``local_start`` of its shard."""

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
    """The rectangle at ``local_start`` of a rank's shard goes to ``parameter_start`` of a worker's parameter."""

    rank: int
    shard: str
    local_start: Index
    shape: Index
    parameter: str
    parameter_start: Index


class Recv(NamedTuple):
    """The packed rectangle at byte ``offset`` of the rank's slot goes to ``parameter_start`` of a worker's parameter,
    once ``round`` is ready."""

    round: int
    rank: int
    offset: int
    shape: Index
    parameter: str
    parameter_start: Index


class Send(NamedTuple):
    """In ``round`` the rank packs a rectangle of its shard, as ``dtype``, to byte ``offset`` of its slot."""

    round: int
    offset: int
    shard: str
    local_start: Index
    shape: Index
    dtype: str


class Message(NamedTuple):
    """In ``round``, ``size`` bytes go from the sender's slot to the receiver's.

    The sender packed them in this round. Or, if ``forwarded``, it received them in the round before: then they are in
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
    """An HF tensor: its shape, the dtype in which it is sent (that of vLLM's parameter), and the checksum's unit."""

    shape: Index
    dtype: str
    unit: int


@dataclass(frozen=True)
class Plan:
    """Everything that a sync moves."""

    tensors: dict[str, TensorInfo]
    pieces: tuple[Piece, ...]
    copies: tuple[tuple[tuple[Copy, ...], ...], ...]
    """[engine][worker]: what it copies from shards on its host."""
    recvs: tuple[tuple[tuple[Recv, ...], ...], ...]
    """[engine][worker], by round: what it copies from slots on its host."""
    sends: tuple[tuple[Send, ...], ...]
    """[rank], by round."""
    messages: tuple[Message, ...]
    """By round."""
    slot_bytes: tuple[int, ...]
    """[rank]: bytes of each of its two slots."""
    placed_bytes: int
    """What the workers of all engines write in one sync."""

    @property
    def rounds(self) -> int:
        return 1 + max((message.round for message in self.messages), default=-1)

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Plan":
        """Inverse of :meth:`to_json` after a round trip through JSON, which turns tuples into lists."""
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
    """``kind`` of each row of JSON, whose lists are indices."""
    result = []
    for row in rows:
        values = [tuple(value) if isinstance(value, list) else value for value in row]
        result.append(kind(*values))
    return tuple(result)


def _read_workers[T](kind: Callable[..., T], workers: Iterable[Iterable[Sequence[Any]]]) -> tuple[tuple[T, ...], ...]:
    """The rows of each worker of an engine."""
    return tuple(read_rows(kind, rows) for rows in workers)
