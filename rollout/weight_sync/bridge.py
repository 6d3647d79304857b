"""The trainer's side of the weight bridge: from each rank's shards straight into vLLM's parameters.

SPMD: every trainer rank makes a :class:`WeightBridge` and calls :meth:`WeightBridge.sync`. Rank 0 of the group owns the
engines. No rank ever holds a full tensor of another's shards; each packs the pieces that the plan gives it.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from megatron_ext.blocks import Block, Shard, region
from megatron_ext.collectives import all_gather_json, from_rank_zero
from rollout.engine import Engine
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.layout import LayoutError, ParameterLayout, wrap
from rollout.weight_sync.plan import Piece, Plan, ShardTable, build_plan, tensor_shapes
from rollout.weight_sync.shared_memory import SharedMemorySender


class WeightSyncError(RuntimeError):
    """The weights did not arrive, or not exactly; raised on every rank.

    An engine whose weights have been touched refuses to generate until a sync succeeds; before that point it keeps
    the version it had.
    """


class SyncReport(TypedDict):
    """Bytes written into the workers of all engines, and seconds from the call to the verified end."""

    bytes: int
    seconds: float


def on_rank_zero(function: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """``from_rank_zero`` whose failure is a WeightSyncError with the same text on every rank."""
    cause: Exception | None = None

    def outcome() -> dict[str, Any]:
        nonlocal cause
        try:
            return {"result": function()}
        except (WeightSyncError, LayoutError) as error:
            cause = error
            return {"error": str(error)}
        except Exception as error:  # told to all ranks, raised below
            cause = error
            return {"error": f"{type(error).__name__}: {error}"}

    told = from_rank_zero(outcome, group)
    if "error" in told:
        raise WeightSyncError(told["error"]) from cause
    return told["result"]


def _shard_table(shards: Sequence[Shard]) -> list[list[Any]]:
    """Blocks of this rank as JSON. Raises LayoutError for one that sticks out of its shard or a name used twice."""
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names):
        raise LayoutError(f"shard names are not unique: {sorted(n for n in set(names) if names.count(n) > 1)[0]}")
    for shard in shards:
        for block in shard.blocks:
            stop = [a + n for a, n in zip(block.local_start, block.shape, strict=True)]
            if len(stop) != shard.tensor.ndim or any(a > n for a, n in zip(stop, shard.tensor.shape, strict=True)):
                raise LayoutError(f"{block} sticks out of shard {shard.name} of shape {tuple(shard.tensor.shape)}")
    return [[shard.name, [asdict(block) for block in shard.blocks]] for shard in shards]


def _parse_table(table: list[list[Any]]) -> ShardTable:
    return [
        (name, Block(b["hf_name"], tuple(b["hf_start"]), tuple(b["local_start"]), tuple(b["shape"])))
        for name, blocks in table
        for b in blocks
    ]


class WeightBridge:
    """The plan, this rank's buffer and the engines.

    ``shards``: this rank's parameters; their tensors are read anew at each sync, so they must be updated in place.
    ``engines``: on rank 0 of ``group``, else None. ``group``: a gloo group of all trainer ranks.
    Construction is collective. Raises WeightSyncError on every rank when the plan can't be made, naming the tensor.
    """

    def __init__(self, shards: Sequence[Shard], engines: Sequence[Engine] | None, group: dist.ProcessGroup) -> None:
        if dist.get_backend(group) != "gloo":
            raise ValueError(
                f"group has backend {dist.get_backend(group)!r}: give a gloo group, the table and checks are small"
            )
        self.group = group
        self.rank = dist.get_rank(group)
        self.engines = list(engines or [])
        self.tensors = {shard.name: shard.tensor for shard in shards}
        tables = self._gather(lambda: _shard_table(shards))
        plan = on_rank_zero(lambda: self._make_plan([_parse_table(table) for table in tables]).to_json(), group)
        self.plan = Plan.from_json(plan)
        self.sender = SharedMemorySender(self.plan.buffer_bytes[self.rank])
        addresses = all_gather_json(self.sender.address, group)
        on_rank_zero(lambda: self._tell_engines("/weights/plan", {"plan": plan, "addresses": addresses}), group)
        # This rank's pieces: index, piece, and the view of the live parameter is made at each sync.
        self.held = [
            (i, piece, holder, holder is piece.holders[0])
            for i, piece in enumerate(self.plan.pieces)
            for holder in piece.holders
            if holder.rank == self.rank
        ]

    def sync(self, version: int) -> SyncReport:
        """Bring the engines to this rank's present weights and call them ``version``. Collective.

        Verified: the trainer's checksums of its live parameters (in vLLM's dtype) must equal those of vLLM's live
        parameters, for every tensor; replicas on several trainer ranks must agree. Raises WeightSyncError on every rank
        naming the first tensor that differs.
        """
        started = time.perf_counter()
        checksums = self._gather(self._pack)
        totals = on_rank_zero(lambda: self._totals(checksums), self.group)
        message = {"version": version, "checksums": totals}
        placed = on_rank_zero(lambda: self._tell_engines("/weights/update", message), self.group)
        return {"bytes": placed * self.plan.placed_bytes(), "seconds": time.perf_counter() - started}

    def close(self) -> None:
        """Free this rank's buffer. No sync may follow."""
        self.sender.close()

    def _gather(self, function: Callable[[], Any]) -> list[Any]:
        """``function()`` of every rank; a failure on one is raised on all."""
        try:
            outcome = {"result": function()}
        except Exception as error:  # told to all ranks, raised below
            outcome = {"error": f"rank {self.rank}: {type(error).__name__}: {error}"}
        outcomes = all_gather_json(outcome, self.group)
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        if errors:
            raise WeightSyncError("; ".join(errors))
        return [outcome["result"] for outcome in outcomes]

    def _make_plan(self, tables: list[ShardTable]) -> Plan:
        if not self.engines:
            raise ValueError("engines is empty on rank 0: start the generation engines before the bridge")
        body = {"tensors": tensor_shapes(tables)}
        answers = [engine.call("POST", "/weights/layout", body)["workers"] for engine in self.engines]
        if any(answer != answers[0] for answer in answers):
            raise LayoutError(
                "the engines hold their parameters in different layouts: start all with the same settings"
            )
        layouts = [[ParameterLayout.from_json(parameter) for parameter in worker] for worker in answers[0]]
        return build_plan(tables, layouts)

    @torch.no_grad()
    def _pack(self) -> dict[int, int]:
        """Copy the pieces that this rank sends into its buffer; checksums of all pieces that it holds, by index."""
        checksums = {}
        for i, piece, holder, sends in self.held:
            info = self.plan.tensors[piece.hf_name]
            dtype = getattr(torch, info.dtype)
            start = piece.rectangle.start
            values = self.tensors[holder.shard][region(holder.local_start, piece.rectangle.shape)].to(dtype)
            if sends:
                size = values.numel() * values.element_size()
                target = self.sender.buffer[piece.offset : piece.offset + size]
                target.view(dtype).view(values.shape).copy_(values)
            checksums[i] = rectangle_checksum(values, start, info.shape, info.unit)
        return checksums

    def _totals(self, gathered: list[dict[str, int]]) -> dict[str, int]:
        """Checksum per HF tensor. Raises WeightSyncError when ranks that hold the same piece hold different values."""
        totals: dict[str, int] = {}
        for i, piece in enumerate(self.plan.pieces):
            value = _agreed(piece, [gathered[holder.rank][str(i)] for holder in piece.holders])
            totals[piece.hf_name] = wrap(totals.get(piece.hf_name, 0) + value)
        return totals

    def _tell_engines(self, path: str, body: dict[str, Any]) -> int:
        """Post to all engines at once; returns how many answered. Raises the first EngineError after all have ended."""
        with ThreadPoolExecutor(max(len(self.engines), 1)) as pool:
            return len(list(pool.map(lambda engine: engine.call("POST", path, body), self.engines)))


def _agreed(piece: Piece, values: list[int]) -> int:
    if any(value != values[0] for value in values):
        ranks = [holder.rank for holder in piece.holders]
        raise WeightSyncError(
            f"{piece.hf_name} at {piece.rectangle.start}: ranks {ranks} should hold the same values and do not"
        )
    return values[0]
