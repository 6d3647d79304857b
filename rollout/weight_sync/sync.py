"""The trainer's side of the weight bridge: from each rank's shards straight into vLLM's parameters.

SPMD: every rank makes a :class:`WeightSync` and calls :meth:`WeightSync.sync`. A rank that starts engines passes
them; on every host with engines there is one such rank, so that engines are only ever called over loopback. No rank
ever holds a full tensor of another's shards.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from megatron_ext.blocks import Block, Shard, region
from megatron_ext.collectives import all_gather_json, from_rank_zero
from rollout.engine import Engine, EngineError
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.layout import LayoutError, ParameterLayout, wrap
from rollout.weight_sync.memory import here, share_tensors
from rollout.weight_sync.network import Network, finish, start
from rollout.weight_sync.plan import Piece, Place, Plan, ShardTable, Topology, cached_plan, tensor_shapes


class WeightSyncError(RuntimeError):
    """The weights did not arrive, or not exactly; raised on every rank.

    An engine whose weights have been touched refuses to generate until a sync succeeds; before that point it keeps
    the version it had.
    """


class SyncReport(TypedDict):
    """Bytes written into the workers of all engines, seconds from the call to the end, how many of these the slowest
    worker of this rank's engines took to copy the weights into place and to pack its linear layers anew (on a CPU), and
    whether it was verified."""

    bytes: int
    seconds: float
    copying_seconds: float
    packing_seconds: float
    verified: bool


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


class WeightSync:
    """The plan and this rank's part in it.

    ``shards``: this rank's parameters (none on a rank that only has engines); read anew at each sync, so they must be
    updated in place; their memory becomes visible to processes of this user on this host. ``engines``: those that this
    rank starts; all engines hold the same layout. ``group``: a gloo group of all ranks. ``bucket_bytes``: a rank's
    memory for weights on their way over the network is at most twice this; on one host there are none.
    ``verify_every``: every so many syncs, and at the first after each :meth:`attach`, the checksums of all live
    parameters are compared. ``plans``: folder in which plans are kept.

    Construction is collective. Raises WeightSyncError on every rank when the plan can't be made, naming the tensor.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        engines: Sequence[Engine],
        group: dist.ProcessGroup,
        *,
        bucket_bytes: int,
        verify_every: int,
        plans: Path,
    ) -> None:
        if dist.get_backend(group) != "gloo":
            raise ValueError(
                f"group has backend {dist.get_backend(group)!r}: give a gloo group, the table and checks are small"
            )
        self.group, self.rank = group, dist.get_rank(group)
        self.bucket_bytes, self.verify_every, self.plans = bucket_bytes, verify_every, plans
        self.tensors = {shard.name: shard.tensor.detach() for shard in shards}
        cuda = torch.cuda.is_available() and dist.get_backend() == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.network_group = dist.new_group(backend="nccl") if cuda else group
        self.tables = [_parse_table(table) for table in self._gather(lambda: _shard_table(shards))]
        self.attach(engines)

    def attach(self, engines: Sequence[Engine]) -> None:
        """Plan for these engines of this rank, after a restart too. Collective; a sync must follow."""
        self.engines = list(engines)
        topology, layouts = self._topology()
        made = self._on_rank_zero(
            lambda: cached_plan(self.tables, layouts, topology, self.bucket_bytes, self.plans).to_json()
        )
        self.plan = Plan.from_json(made)
        self.held = [
            (i, piece, self.tensors[holder.shard][region(holder.local_start, piece.shape)])
            for i, piece in enumerate(self.plan.pieces)
            for holder in piece.holders
            if holder.rank == self.rank
        ]
        readers = _readers(self.plan)
        self.network = Network(
            self.plan, self.rank, self.tensors, self.device, len(readers[self.rank]), self.network_group
        )
        addresses = self._gather(
            lambda: {
                "shards": share_tensors(self.tensors),
                "slots": share_tensors({"slots": self.network.slots}) if readers[self.rank] else None,
                "signals": share_tensors({"signals": self.network.signals.values}),
            }
        )
        mine = [e for e, owner in enumerate(self.owners) if owner == self.rank]
        orders = [_engine_share(self.plan, e, readers, addresses) for e in mine]
        self._all_do(self._ask_engines("/weights/plan", orders))
        self.syncs = 0

    def sync(self, version: int) -> SyncReport:
        """Bring all engines to the ranks' present weights and call them ``version``. Collective.

        When it is verified, the trainer's checksums of its live parameters (in vLLM's dtype) must equal those of vLLM's
        live parameters, for every tensor, and replicas on several ranks must agree. Raises WeightSyncError on every
        rank naming the first tensor that differs.
        """
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        verify = self.syncs % self.verify_every == 0
        totals = None
        if verify:
            gathered = self._gather(self._checksums)
            totals = self._on_rank_zero(lambda: self._totals(gathered))
        sequence = self.syncs
        self.syncs += 1
        order = {"version": version, "sequence": sequence, "checksums": totals}
        self.network.begin(sequence)  # workers wait for this of each rank that they copy from
        answers = self._ask_engines("/weights/update", [order] * len(self.engines))
        self.network.run(sequence)
        times: list[tuple[float, float]] = []
        self._all_do(lambda: times.extend((a["copying_seconds"], a["packing_seconds"]) for a in answers()))
        copying, packing = max(times, key=sum, default=(0.0, 0.0))
        return {
            "bytes": self.plan.placed_bytes,
            "seconds": time.perf_counter() - started,
            "copying_seconds": copying,
            "packing_seconds": packing,
            "verified": verify,
        }

    def _gather(self, function: Callable[[], Any]) -> list[Any]:
        """``function()`` of every rank; a failure on one is raised on all."""
        return self._results(self._outcome(function))

    def _all_do(self, function: Callable[[], Any]) -> None:
        """``function()`` on every rank; a failure on one is raised on all.

        Rank 0 is told how each has ended and tells all whether one has failed: a single message behind the last to end,
        which takes two thirds of the time of an all-reduce, whose messages wait for each other.
        """
        others = range(1, dist.get_world_size(self.group))
        failed = torch.zeros(1 + len(others), dtype=torch.int32)
        if self.rank == 0:
            told = start([self._message(dist.irecv, failed[rank : rank + 1], rank) for rank in others])
            outcome = self._outcome(function)
            failed[0] = "error" in outcome
            finish(told)
            verdict = failed.amax(dim=0, keepdim=True)
            finish(start([self._message(dist.isend, verdict, rank) for rank in others]))
        else:
            outcome = self._outcome(function)
            verdict = torch.tensor(["error" in outcome], dtype=torch.int32)
            dist.send(verdict, group=self.group, group_dst=0)
            dist.recv(verdict, group=self.group, group_src=0)
        if verdict:
            self._results(outcome)

    def _message(self, operation: Any, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self.group, group_peer=rank)

    def _on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """``function()`` of rank 0; its failure is a WeightSyncError with the same text on every rank."""
        told = from_rank_zero(lambda: self._outcome(function), self.group)
        if "error" in told:
            raise WeightSyncError(told["error"])
        return told["result"]

    def _outcome(self, function: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"result": function()}
        except (WeightSyncError, LayoutError) as error:
            return {"error": str(error)}
        except Exception as error:  # told to all ranks and raised there
            return {"error": f"rank {self.rank}: {type(error).__name__}: {error}"}

    def _results(self, outcome: dict[str, Any]) -> list[Any]:
        outcomes = all_gather_json(outcome, self.group)
        errors = [told["error"] for told in outcomes if "error" in told]
        if errors:
            raise WeightSyncError("; ".join(errors))
        return [told["result"] for told in outcomes]

    def _topology(self) -> tuple[Topology, list[list[ParameterLayout]]]:
        """Where all ranks and engines are (sets ``owners``, the rank of each engine), and the engines' layout."""
        body = {"tensors": tensor_shapes(self.tables)}
        told = self._ask_engines("/weights/layout", [body] * len(self.engines))
        answers: list[Any] = []
        self._all_do(lambda: answers.extend(told()))
        found = self._gather(
            lambda: {
                "place": here(self.device),
                "engines": [[answer["places"], _digest(answer["workers"])] for answer in answers],
            }
        )
        engines = [(rank, *engine) for rank, entry in enumerate(found) for engine in entry["engines"]]
        if not engines:
            raise WeightSyncError("no rank has an engine: start the generation engines before the bridge")
        if any(digest != engines[0][2] for _, _, digest in engines):
            raise WeightSyncError(
                "the engines hold their parameters in different layouts: start all with the same settings"
            )
        self.owners = [rank for rank, _, _ in engines]
        source = self.owners[0]
        (workers,) = [
            told for told in self._gather(lambda: answers[0]["workers"] if self.rank == source else None) if told
        ]
        layouts = [[ParameterLayout.from_json(parameter) for parameter in worker] for worker in workers]
        return (
            Topology(
                tuple(Place(*entry["place"]) for entry in found),
                tuple(tuple(Place(*place) for place in places) for _, places, _ in engines),
            ),
            layouts,
        )

    @torch.no_grad()
    def _checksums(self) -> dict[int, int]:
        """Of all pieces that this rank holds, by index."""
        checksums = {}
        for i, piece, values in self.held:
            info = self.plan.tensors[piece.hf_name]
            values = values.to(getattr(torch, info.dtype))
            checksums[i] = rectangle_checksum(values, piece.start, info.shape, info.unit)
        return checksums

    def _totals(self, gathered: list[dict[str, int]]) -> dict[str, int]:
        """Checksum per HF tensor. Raises WeightSyncError when ranks that hold the same piece hold different values."""
        totals: dict[str, int] = {}
        for i, piece in enumerate(self.plan.pieces):
            value = _agreed(piece, [gathered[holder.rank][str(i)] for holder in piece.holders])
            totals[piece.hf_name] = wrap(totals.get(piece.hf_name, 0) + value)
        return totals

    def _ask_engines(self, path: str, bodies: Sequence[dict[str, Any]]) -> Callable[[], list[dict[str, Any]]]:
        """Post to this rank's engines; the function that is returned waits for all answers and then raises the first
        EngineError."""
        asked = [engine.ask("POST", path, body) for engine, body in zip(self.engines, bodies, strict=True)]

        def answers() -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = []
            failures: list[EngineError] = []
            for answer in asked:
                try:
                    found.append(answer())
                except EngineError as error:
                    failures.append(error)
            if failures:
                raise failures[0]
            return found

        return answers


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _readers(plan: Plan) -> list[list[tuple[int, int]]]:
    """For each rank the (engine, worker)s that read from its slots."""
    readers: list[list[tuple[int, int]]] = [[] for _ in plan.slot_bytes]
    for e, engine in enumerate(plan.arrivals):
        for w, worker in enumerate(engine):
            for rank in sorted({arrival.rank for arrival in worker}):
                readers[rank].append((e, w))
    return readers


def _engine_share(plan: Plan, e: int, readers: list[list[tuple[int, int]]], addresses: list[Any]) -> dict[str, Any]:
    """What engine ``e`` has to know, see ``WeightSyncWorker.bridge_plan``."""
    workers: list[dict[str, Any]] = [
        {
            "copies": copies,
            "arrivals": arrivals,
            "readers": {rank: readers[rank].index((e, w)) for rank in sorted({a.rank for a in arrivals})},
        }
        for w, (copies, arrivals) in enumerate(zip(plan.copies[e], plan.arrivals[e], strict=True))
    ]
    shards = sorted({copy.rank for copies in plan.copies[e] for copy in copies})
    slots = sorted({rank for worker in workers for rank in worker["readers"]})
    return {
        "tensors": plan.tensors,
        "rounds": plan.rounds,
        "workers": workers,
        "shards": {rank: addresses[rank]["shards"] for rank in shards},
        "slots": {rank: addresses[rank]["slots"] for rank in slots},
        "signals": {rank: addresses[rank]["signals"] for rank in sorted({*shards, *slots})},
    }


def _agreed(piece: Piece, values: list[int]) -> int:
    if any(value != values[0] for value in values):
        ranks = [holder.rank for holder in piece.holders]
        raise WeightSyncError(f"{piece.hf_name} at {piece.start}: ranks {ranks} should hold the same values and do not")
    return values[0]
