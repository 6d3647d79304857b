"""The trainer's side of the weight sync, which copies from the shards of each rank directly into vLLM's parameters.

The code is SPMD: every rank constructs a :class:`WeightSync` and calls :meth:`WeightSync.sync`. A rank that starts
engines passes them to it. Every host with engines has one such rank, so engines are called on their own host only. No
rank ever gathers the full tensor of a shard.
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
from rollout import vllm_platform
from rollout.engine import Engine, EngineError
from rollout.weight_sync.checksum import rectangle_checksum
from rollout.weight_sync.layout import LayoutError, ParameterLayout, wrap
from rollout.weight_sync.memory import place_of, share_tensors
from rollout.weight_sync.network import Network, make_slots, start, wait_for
from rollout.weight_sync.plan import Piece, Place, Plan, ShardTable, Topology
from rollout.weight_sync.planner import cached_plan, tensor_shapes


class WeightSyncError(RuntimeError):
    """The weights did not arrive, or they differ from the trainer's. Raised on every rank.

    An engine whose weights the failed sync has begun to change refuses to generate until a sync succeeds. An engine
    whose weights are unchanged keeps its version.
    """


class SyncReport(TypedDict):
    """Statistics of one weight sync."""

    bytes: int
    """Bytes written into the workers of all engines."""
    seconds: float
    """Wall time of the call of :meth:`WeightSync.sync`."""
    copying_seconds: float
    """Time that the slowest worker of this rank's engines took to copy the weights into its parameters."""
    packing_seconds: float
    """Time that the same worker took to pack its linear layers again (CPU only)."""
    verified: bool
    """Whether checksums were compared."""


class WeightSync:
    """The plan of the weight sync and this rank's part in it.

    Construction is collective. Raises WeightSyncError on every rank, naming the tensor, when no plan exists.

    Arguments:

    * ``shards``: the parameters of this rank, none on a rank that only has engines. Each sync reads their present
      values, so they must be updated in place. Their memory becomes visible to other processes of the same user on this
      host.
    * ``engines``: the engines that this rank starts. All engines must have the same layout.
    * ``group``: a gloo group of all ranks.
    * ``bucket_bytes``: the maximum size of each of a rank's two slots for weights that cross the network. On a single
      host nothing does.
    * ``verify_every``: the checksums of all live parameters are compared once every ``verify_every`` syncs, and at the
      first sync after each :meth:`attach`.
    * ``plans``: the folder in which plans are cached.
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
        self.group = group
        self.rank = dist.get_rank(group)
        self.bucket_bytes = bucket_bytes
        self.verify_every = verify_every
        self.plans = plans
        self.tensors = {shard.name: shard.tensor.detach() for shard in shards}
        self.slots: torch.Tensor | None = None
        self.platform = vllm_platform.of_trainer()
        self.device = self.platform.current_device()
        self.network_group = self.platform.network_group(group)
        self.tables = [_parse_table(table) for table in self._gather(lambda: _shard_table(shards))]
        self.attach(engines)

    def attach(self, engines: Sequence[Engine]) -> None:
        """Collective: make the plan for these engines of this rank. Call it again after a restart of engines.

        A sync must follow.
        """
        self.engines = list(engines)
        topology, layouts = self._topology()

        def make_plan() -> dict[str, Any]:
            return cached_plan(self.tables, layouts, topology, self.bucket_bytes, self.plans).to_json()

        self.plan = Plan.from_json(self._on_rank_zero(make_plan))
        # For each piece that this rank holds: its number, the piece, and a view of its values in this rank's shard.
        self.local_pieces: list[tuple[int, Piece, torch.Tensor]] = []
        for i, piece in enumerate(self.plan.pieces):
            for holder in piece.holders:
                if holder.rank == self.rank:
                    values = self.tensors[holder.shard][region(holder.local_start, piece.shape)]
                    self.local_pieces.append((i, piece, values))
        readers = _readers(self.plan)
        num_readers = len(readers[self.rank])
        self.slots = make_slots(self.plan, self.rank, self.device, self.slots)
        self.network = Network(self.plan, self.rank, self.tensors, self.slots, num_readers, self.network_group)

        def addresses_of_rank() -> dict[str, Any]:
            return {
                "shards": share_tensors(self.tensors),
                "slots": share_tensors({"slots": self.network.slots}) if num_readers else None,
                "signals": share_tensors({"signals": self.network.signals.values}),
            }

        addresses = self._gather(addresses_of_rank)
        engines_of_rank = [e for e, owner in enumerate(self.owners) if owner == self.rank]
        shares = [_engine_share(self.plan, e, readers, addresses) for e in engines_of_rank]
        self._on_all_ranks(self._post_to_engines("/weights/plan", shares))
        self.syncs = 0

    def sync(self, version: int) -> SyncReport:
        """Collective: copy the present weights of the ranks to all engines, as version ``version``.

        A verified sync compares checksums for every tensor: those of the trainer's live parameters, in vLLM's dtype,
        with those of vLLM's live parameters. It also compares the trainer's replicas with each other. Raises
        WeightSyncError on every rank, naming the first tensor that differs.
        """
        started = time.perf_counter()
        self.platform.synchronize_device(self.device)
        verify = self.syncs % self.verify_every == 0
        totals = None
        if verify:
            checksums_of_ranks = self._gather(self._checksums)
            totals = self._on_rank_zero(lambda: self._totals(checksums_of_ranks))
        sequence = self.syncs
        self.syncs += 1
        request = {"version": version, "sequence": sequence, "checksums": totals}
        # Each worker waits for this signal from the ranks that it copies from.
        self.network.begin(sequence)
        wait_for_answers = self._post_to_engines("/weights/update", [request] * len(self.engines))
        self.network.run(sequence)
        times: list[tuple[float, float]] = []

        def collect_times() -> None:
            for answer in wait_for_answers():
                times.append((answer["copying_seconds"], answer["packing_seconds"]))

        self._on_all_ranks(collect_times)
        copying, packing = max(times, key=sum, default=(0.0, 0.0))
        return {
            "bytes": self.plan.placed_bytes,
            "seconds": time.perf_counter() - started,
            "copying_seconds": copying,
            "packing_seconds": packing,
            "verified": verify,
        }

    # Collectives that turn the failure of one rank into an error on all

    def _gather(self, function: Callable[[], Any]) -> list[Any]:
        """Collective: return the results of ``function()`` on every rank. A failure on one rank is raised on all."""
        return self._results(self._outcome(function))

    def _on_all_ranks(self, function: Callable[[], Any]) -> None:
        """Collective: call ``function`` on every rank. A failure on one rank is raised on all.

        Every rank sends rank 0 whether it failed, and rank 0 then sends to all whether any rank failed. This takes two
        thirds of the time of an all-reduce, whose messages wait for each other.
        """
        others = range(1, dist.get_world_size(self.group))
        failed = torch.zeros(1 + len(others), dtype=torch.int32)
        if self.rank == 0:
            receiving = start([self._message(dist.irecv, failed[rank : rank + 1], rank) for rank in others])
            outcome = self._outcome(function)
            failed[0] = "error" in outcome
            wait_for(receiving)
            any_failed = failed.amax(dim=0, keepdim=True)
            wait_for(start([self._message(dist.isend, any_failed, rank) for rank in others]))
        else:
            outcome = self._outcome(function)
            any_failed = torch.tensor(["error" in outcome], dtype=torch.int32)
            dist.send(any_failed, group=self.group, group_dst=0)
            dist.recv(any_failed, group=self.group, group_src=0)
        if any_failed:
            self._results(outcome)

    def _message(self, operation: Any, tensor: torch.Tensor, rank: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self.group, group_peer=rank)

    def _on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Collective: return the result of ``function()`` on rank 0.

        If it fails there, a WeightSyncError with the same text is raised on every rank.
        """
        outcome = from_rank_zero(lambda: self._outcome(function), self.group)
        if "error" in outcome:
            raise WeightSyncError(outcome["error"])
        return outcome["result"]

    def _outcome(self, function: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"result": function()}
        except (WeightSyncError, LayoutError) as error:
            return {"error": str(error)}
        except Exception as error:
            # The error is sent to all ranks, which raise it.
            return {"error": f"rank {self.rank}: {type(error).__name__}: {error}"}

    def _results(self, outcome: dict[str, Any]) -> list[Any]:
        outcomes = all_gather_json(outcome, self.group)
        errors = [outcome["error"] for outcome in outcomes if "error" in outcome]
        if errors:
            raise WeightSyncError("; ".join(errors))
        return [outcome["result"] for outcome in outcomes]

    # The engines

    def _topology(self) -> tuple[Topology, list[list[ParameterLayout]]]:
        """Collective: return the places of all ranks and engines, and the layouts of the workers of an engine.

        Also sets ``owners``, the rank of each engine. The layouts are those of the first engine, because all engines
        must have the same.
        """
        body = {"tensors": tensor_shapes(self.tables)}
        wait_for_answers = self._post_to_engines("/weights/layout", [body] * len(self.engines))
        answers: list[Any] = []
        self._on_all_ranks(lambda: answers.extend(wait_for_answers()))

        def describe() -> dict[str, Any]:
            return {
                "place": place_of(self.device, self.platform),
                "engines": [[answer["places"], _digest(answer["workers"])] for answer in answers],
            }

        descriptions = self._gather(describe)
        self.owners: list[int] = []
        places_of_engines: list[list[Any]] = []
        digests: list[str] = []
        for rank, description in enumerate(descriptions):
            for places, digest in description["engines"]:
                self.owners.append(rank)
                places_of_engines.append(places)
                digests.append(digest)
        if not self.owners:
            raise WeightSyncError("no rank has an engine: start the generation engines before the weight sync")
        if any(digest != digests[0] for digest in digests):
            raise WeightSyncError(
                "the engines hold their parameters in different layouts: start all with the same settings"
            )
        first_owner = self.owners[0]
        workers_by_rank = self._gather(lambda: answers[0]["workers"] if self.rank == first_owner else None)
        layouts = []
        for worker in workers_by_rank[first_owner]:
            layouts.append([ParameterLayout.from_json(parameter) for parameter in worker])
        ranks = [Place(*description["place"]) for description in descriptions]
        engines = []
        for places in places_of_engines:
            engines.append(tuple(Place(*place) for place in places))
        return Topology(tuple(ranks), tuple(engines)), layouts

    def _post_to_engines(self, path: str, bodies: Sequence[dict[str, Any]]) -> Callable[[], list[dict[str, Any]]]:
        """Send a POST request to each of this rank's engines, and return a function that waits for the answers.

        That function waits for all engines before it raises the first EngineError.
        """
        calls = [engine.begin_call("POST", path, body) for engine, body in zip(self.engines, bodies, strict=True)]

        def wait_for_answers() -> list[dict[str, Any]]:
            answers: list[dict[str, Any]] = []
            failures: list[EngineError] = []
            for wait_for_answer in calls:
                try:
                    answers.append(wait_for_answer())
                except EngineError as error:
                    failures.append(error)
            if failures:
                raise failures[0]
            return answers

        return wait_for_answers

    # Checksums

    @torch.no_grad()
    def _checksums(self) -> dict[int, int]:
        """Return the checksums of all pieces that this rank holds, by piece number."""
        checksums = {}
        for i, piece, values in self.local_pieces:
            info = self.plan.tensors[piece.hf_name]
            values = values.to(getattr(torch, info.dtype))
            checksums[i] = rectangle_checksum(values, piece.start, info.shape, info.unit)
        return checksums

    def _totals(self, checksums_of_ranks: list[dict[str, int]]) -> dict[str, int]:
        """Return the checksum of each HF tensor.

        Raises WeightSyncError when ranks that hold the same piece hold different values.
        """
        totals: dict[str, int] = {}
        for i, piece in enumerate(self.plan.pieces):
            # JSON has turned the keys into strings.
            values = [checksums_of_ranks[holder.rank][str(i)] for holder in piece.holders]
            if any(value != values[0] for value in values):
                ranks = [holder.rank for holder in piece.holders]
                raise WeightSyncError(
                    f"{piece.hf_name} at {piece.start}: ranks {ranks} should hold the same values and do not"
                )
            totals[piece.hf_name] = wrap(totals.get(piece.hf_name, 0) + values[0])
        return totals


def _shard_table(shards: Sequence[Shard]) -> list[list[Any]]:
    """Return this rank's blocks as JSON.

    Raises LayoutError for a block that is not inside its shard, and for a shard name that occurs twice.
    """
    names = [shard.name for shard in shards]
    if len(set(names)) != len(names):
        repeated = sorted(name for name in set(names) if names.count(name) > 1)
        raise LayoutError(f"shard names are not unique: {repeated[0]}")
    for shard in shards:
        for block in shard.blocks:
            shape = tuple(shard.tensor.shape)
            stop = [start + extent for start, extent in zip(block.local_start, block.shape, strict=True)]
            if len(stop) != len(shape) or any(end > size for end, size in zip(stop, shape, strict=True)):
                raise LayoutError(f"{block} sticks out of shard {shard.name} of shape {shape}")
    return [[shard.name, [asdict(block) for block in shard.blocks]] for shard in shards]


def _parse_table(table: list[list[Any]]) -> ShardTable:
    """Inverse of :func:`_shard_table` after a round trip through JSON."""
    result = []
    for shard_name, blocks in table:
        for block in blocks:
            hf_start = tuple(block["hf_start"])
            local_start = tuple(block["local_start"])
            shape = tuple(block["shape"])
            result.append((shard_name, Block(block["hf_name"], hf_start, local_start, shape)))
    return result


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _readers(plan: Plan) -> list[list[tuple[int, int]]]:
    """Return, for each rank, the workers that read from its slots, as pairs (engine, worker)."""
    readers: list[list[tuple[int, int]]] = [[] for _ in plan.slot_bytes]
    for engine, workers in enumerate(plan.recvs):
        for worker, recvs in enumerate(workers):
            for rank in sorted({recv.rank for recv in recvs}):
                readers[rank].append((engine, worker))
    return readers


def _engine_share(
    plan: Plan, engine: int, readers: list[list[tuple[int, int]]], addresses: list[Any]
) -> dict[str, Any]:
    """Return an engine's share of the plan, which is the message of ``WeightSyncWorker.weight_sync_plan``."""
    workers: list[dict[str, Any]] = []
    for worker, (copies, recvs) in enumerate(zip(plan.copies[engine], plan.recvs[engine], strict=True)):
        ranks = sorted({recv.rank for recv in recvs})
        reader_numbers = {rank: readers[rank].index((engine, worker)) for rank in ranks}
        workers.append({"copies": copies, "recvs": recvs, "readers": reader_numbers})
    ranks_of_shards = sorted({copy.rank for copies in plan.copies[engine] for copy in copies})
    ranks_of_slots = sorted({rank for worker in workers for rank in worker["readers"]})
    return {
        "tensors": plan.tensors,
        "rounds": plan.rounds,
        "workers": workers,
        "shards": {rank: addresses[rank]["shards"] for rank in ranks_of_shards},
        "slots": {rank: addresses[rank]["slots"] for rank in ranks_of_slots},
        "signals": {rank: addresses[rank]["signals"] for rank in sorted({*ranks_of_shards, *ranks_of_slots})},
    }
