"""Estimate the duration of a recipe's weight sync on its cluster, from the real plan and a model of the links.

``python -m recipes.preflight.weight_sync recipe=safework_72b [overrides…] [simulate.output=FILE.json]``,
on any machine.

The plan is the one that a run would make. The trainer's blocks come from the Megatron-Core model of each distinct rank,
built without memory. vLLM's layout comes from its own loaders. Bytes are counted. Times follow from the bandwidths in
conf/simulate.

The result is compared with gather-then-load. There, every GPU receives every full tensor, and its engine copies what it
needs. Tensors of other pipeline stages come over the network, the rest of the tensor-parallel group's over NVLink. All
of this is assumed to run at full speed and overlapped.
"""

import itertools
import json
import math
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from megatron_ext import platform, resolvers, settings
from megatron_ext.layout import ParallelConfig
from megatron_ext.precision import DTYPES, PrecisionConfig
from recipes.errors import ConfigError
from recipes.preflight import simulated_engines, view
from recipes.preflight.architecture import model_config
from recipes.run.logs import quiet
from rollout.weight_sync.layout import ParameterLayout, Rectangle
from rollout.weight_sync.plan import ITEMSIZE, Copy, Place, Plan, Recv, ShardTable, Topology
from rollout.weight_sync.planner import build_plan

resolvers.register()


@dataclass(frozen=True)
class Links:
    """The bandwidths and latencies of conf/simulate."""

    network_gb_s: float
    pcie_gb_s: float
    nvlink_gb_s: float
    copy_gb_s: float
    # Fixed time of one sync.
    order_ms: float
    # Fixed time of one round.
    round_us: float

    @property
    def network(self) -> float:
        """GB/s of one GPU over the network. The slower of the adapter and PCIe limits it."""
        return min(self.network_gb_s, self.pcie_gb_s)


@dataclass
class Link:
    """The bytes that cross a GPU's link in one direction in one sync, and their seconds at full speed."""

    link: str
    gpu: str
    bytes: int
    seconds: float


def trainer_tables(
    hf_config: Any,
    sizes: ParallelConfig,
    world: int,
    precision: PrecisionConfig,
    say: Callable[[str], object] = lambda text: None,
) -> list[ShardTable]:
    """The blocks of every rank. Ranks that differ only in their data- or context-parallel rank share a table.

    ``say`` is called with what is done next.
    """
    # This must come before the next import. It switches off torch's inductor, whose import takes seconds.
    platform.activate("cpu")
    from recipes.preflight import simulated_ranks

    simulated_ranks.activate()
    tables: dict[tuple[int, int], ShardTable] = {}
    ranks = simulated_ranks.distinct_ranks(world, sizes)
    for number, rank in enumerate(ranks):
        say(f"rank {number + 1} of {len(ranks)}")
        with simulated_ranks.rank(rank, world, sizes) as here:
            shards = simulated_ranks.build(hf_config, here, precision).shards
        tables[here.pipeline_rank, here.tensor_rank] = [
            (shard.name, block) for shard in shards for block in shard.blocks
        ]
    per_stage = world // sizes.pipeline
    return [tables[rank // per_stage, rank % sizes.tensor] for rank in range(world)]


def engine_layouts(hf_config: Any, dtype: str, tensor: int) -> list[list[ParameterLayout]]:
    """The parameters' layouts of every worker of an engine with ``tensor`` GPUs."""
    from recipes.preflight import simulated_ranks

    with tempfile.TemporaryDirectory() as folder:
        hf_config.save_pretrained(folder)
        return simulated_engines.layouts(folder, dtype, tensor, 1, simulated_ranks.checkpoint_tensors(hf_config))


def topology(world: int, engines: int, tensor: int, gpus_per_node: int, disaggregated: bool) -> Topology:
    """Place ranks and engine workers on the nodes, one GPU after another.

    If the engines are disaggregated, each GPU of their nodes also has a rank without shards.
    """

    def place(gpu: int) -> Place:
        return Place(f"node {gpu // gpus_per_node}", str(gpu % gpus_per_node))

    ranks = [place(rank) for rank in range(world)]
    # Disaggregated engines begin on the first node without a trainer's rank.
    first_gpu = -(-world // gpus_per_node) * gpus_per_node if disaggregated else 0
    workers = []
    for engine in range(engines):
        engine_gpu = first_gpu + engine * tensor
        workers.append(tuple(place(engine_gpu + worker) for worker in range(tensor)))
    if disaggregated:
        ranks += itertools.chain.from_iterable(workers)
    return Topology(tuple(ranks), tuple(workers))


def links(plan: Plan, where: Topology, dtypes: dict[str, int], speeds: Links) -> list[Link]:
    """The traffic of each link that the plan uses, by GPU and direction.

    ``dtypes``: vLLM parameter → bytes per element.
    """
    used: dict[tuple[str, str], int] = defaultdict(int)

    def name(place: Place) -> str:
        return f"{place.host} GPU {place.device}"

    for engine, copies, recvs in zip(where.engines, plan.copies, plan.recvs, strict=True):
        for worker, worker_copies, worker_recvs in zip(engine, copies, recvs, strict=True):
            items: list[Copy | Recv] = [*worker_copies, *worker_recvs]
            for item in items:
                size = dtypes[item.parameter] * math.prod(item.shape)
                source = where.ranks[item.rank]
                used["copy", name(worker)] += size
                if source.device != worker.device:
                    used["nvlink out", name(source)] += size
                    used["nvlink in", name(worker)] += size
    for message in plan.messages:
        sender = name(where.ranks[message.sender])
        receiver = name(where.ranks[message.receiver])
        used["network out", sender] += message.size
        used["network in", receiver] += message.size
        if not message.forwarded:
            used["copy", sender] += message.size
    speed_of = {"copy": speeds.copy_gb_s, "nvlink": speeds.nvlink_gb_s, "network": speeds.network}
    result = []
    for (link, gpu), size in sorted(used.items()):
        speed = speed_of[link.split()[0]]
        result.append(Link(link, gpu, size, size / speed / 1e9))
    return result


def network_seconds(plan: Plan, speeds: Links) -> float:
    """Seconds of all rounds, one after another. A round takes as long as its busiest GPU sends or receives."""
    busy: dict[tuple[int, str, int], int] = defaultdict(int)
    for message in plan.messages:
        busy[message.round, "out", message.sender] += message.size
        busy[message.round, "in", message.receiver] += message.size
    most_bytes = [0] * plan.rounds
    for (round_number, _, _), size in busy.items():
        most_bytes[round_number] = max(most_bytes[round_number], size)
    return sum(most_bytes) / speeds.network / 1e9 + plan.rounds * speeds.round_us / 1e6


def gather_then_load_seconds(weights: int, sizes: ParallelConfig, speeds: Links) -> float:
    """Seconds of the busiest link if each GPU receives every full tensor and copies it to its engine.

    ``weights``: bytes of the complete model.
    """
    other_stages = weights * (sizes.pipeline - 1) / sizes.pipeline / speeds.network
    same_stage = weights * (sizes.tensor - 1) / sizes.tensor / speeds.nvlink_gb_s
    return max(other_stages, same_stage, weights / speeds.copy_gb_s) / 1e9 + speeds.order_ms / 1e3


def minimum_bytes(tables: Sequence[ShardTable], layouts: Sequence[Sequence[ParameterLayout]], where: Topology) -> int:
    """A lower bound of the bytes that any plan sends over the network.

    It counts the elements that workers need and no rank on their host holds, each element once per host.
    """
    held: dict[tuple[str, str], set[Rectangle]] = defaultdict(set)
    for place, table in zip(where.ranks, tables, strict=True):
        for _, block in table:
            held[place.host, block.hf_name].add(Rectangle(block.hf_start, block.shape))
    wanted: dict[tuple[str, str, Rectangle], int] = {}
    for engine in where.engines:
        for place, worker in zip(engine, layouts, strict=True):
            for parameter in worker:
                for region in parameter.regions:
                    wanted[place.host, region.hf_name, region.source] = ITEMSIZE[parameter.dtype]
    total = 0
    for (host, name, rectangle), itemsize in wanted.items():
        overlaps = [rectangle.intersect(block) for block in held[host, name]]
        held_elements = sum(overlap.size for overlap in overlaps if overlap)
        total += itemsize * (rectangle.size - held_elements)
    return total


def simulate(raw: DictConfig, say: Callable[[str], object] = lambda text: None) -> dict[str, Any]:
    """The complete result (JSON) for a recipe's configuration with the group ``simulate``.

    ``say`` is called with what is done next. Raises ConfigError for a setting that is not possible.
    """
    simulation = raw.simulate
    rollout = raw.rollout
    speeds = Links(**{field.name: float(simulation[field.name]) for field in fields(Links)})
    sizes = settings.read(ParallelConfig, "parallel", raw.parallel, {"recompute": "none"})
    precision = settings.read(PrecisionConfig, "precision", raw.precision, {"name": "bf16"})
    hf_config = model_config(raw.model.path)
    world = raw.cluster.ranks
    dtype = DTYPES[raw.precision.name]
    say("Megatron-Core, transformers")
    tables = trainer_tables(hf_config, sizes, world, precision, say)
    say("vLLM's workers")
    layouts = engine_layouts(hf_config, dtype, rollout.tensor)
    apart = raw.cluster.engine_nodes > 0
    where = topology(world, rollout.engines, rollout.tensor, simulation.gpus_per_node, apart)
    # The ranks on the engines' nodes hold nothing.
    tables += [[] for _ in range(len(where.ranks) - world)]
    say("the plan")
    started = time.perf_counter()
    plan = build_plan(tables, layouts, where, rollout.sync_bucket_mib << 20)
    plan_seconds = time.perf_counter() - started
    itemsizes = {parameter.name: ITEMSIZE[parameter.dtype] for worker in layouts for parameter in worker}
    used_links = links(plan, where, itemsizes, speeds)
    slowest = max(used_links, key=lambda link: link.seconds)
    weights = sum(ITEMSIZE[tensor.dtype] * math.prod(tensor.shape) for tensor in plan.tensors.values())
    seconds = max(network_seconds(plan, speeds), slowest.seconds) + speeds.order_ms / 1e3
    return {
        "recipe": str(raw.recipe.name),
        "seconds": seconds,
        "bottleneck": f"{slowest.link} of {slowest.gpu}",
        "bytes_crossed": sum(message.size for message in plan.messages),
        "bytes_minimum": minimum_bytes(tables, layouts, where),
        "bytes_placed": plan.placed_bytes,
        "bytes_of_weights": weights,
        "peer_seconds": gather_then_load_seconds(weights, sizes, speeds),
        "plan_seconds": plan_seconds,
        "rounds": plan.rounds,
        "slot_bytes": max(plan.slot_bytes),
        "links": [vars(link) for link in used_links],
    }


def show(answer: dict[str, Any]) -> None:
    """Print the busiest GPU of each kind of link and the totals."""
    console = Console()
    table = Table("link", "busiest", "GB", "seconds", title=f"weight sync of {answer['recipe']}, by the busiest GPU")
    busiest: dict[str, dict[str, Any]] = {}
    for link in answer["links"]:
        kind = link["link"]
        if kind not in busiest or link["seconds"] > busiest[kind]["seconds"]:
            busiest[kind] = link
    for kind, link in sorted(busiest.items()):
        table.add_row(kind, link["gpu"], f"{link['bytes'] / 1e9:.2f}", f"{link['seconds']:.3f}")
    console.print(table)
    console.print(
        f"{answer['seconds']:.2f} s a sync, bound by {answer['bottleneck']}; gather-then-load at the same speeds "
        f"{answer['peer_seconds']:.2f} s\n"
        f"{answer['bytes_crossed'] / 1e9:.1f} GB cross the network, at least {answer['bytes_minimum'] / 1e9:.1f} must; "
        f"{answer['bytes_placed'] / 1e9:.1f} GB are placed; {answer['rounds']} rounds, "
        f"2 x {answer['slot_bytes'] / 2**20:.0f} MiB a rank\n"
        f"plan made in {answer['plan_seconds']:.1f} s"
    )


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Estimate the sync, write ``simulate.output`` and print the result."""
    with view.progress() as say, quiet():
        try:
            answer = simulate(raw, say)
        except ConfigError as error:
            sys.exit(f"error: {error}")
    if raw.simulate.output:
        Path(raw.simulate.output).parent.mkdir(parents=True, exist_ok=True)
        Path(raw.simulate.output).write_text(json.dumps(answer, indent=2) + "\n")
    show(answer)


if __name__ == "__main__":
    # Add the group ``simulate``, which the configuration of a run does not have.
    sys.argv.insert(1, "+simulate=h100")
    main()
