"""Every family from every layout of the trainer to every layout of vLLM: bits as vLLM's own loaders put them.

The trainer's shards come from the real weight maps of real Megatron-Core models, the expected parameters from vLLM's
own model classes and loaders (grid_twins.py); between them are the real plan and an executor of it (grid_executor.py).
"""

import itertools
import json
import math
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_ext.blocks import Block, region
from rollout.weight_sync.layout import ParameterLayout, Rectangle, Region
from rollout.weight_sync.plan import Place, Plan, Topology
from rollout.weight_sync.planner import build_plan
from rollout.weight_sync.schedule import ALIGNMENT
from tests import warm
from tests.rollout import grid_twins
from tests.rollout.grid_executor import execute
from tests.rollout.grid_twins import FAMILIES, ROOT, TRAINERS

CELLS = [(name, *engine) for name, family in FAMILIES.items() for engine in family.engines]
BUCKET = 1 << 17  # several rounds


class Grid:
    """Both sides: ``checkpoint[family]`` and ``vllm`` as ``grid_twins.vllm`` makes it."""

    def __init__(self, folder: Path) -> None:
        grid_twins.write_configs(folder)
        run("trainer", folder)
        self.trainer = json.loads((folder / "trainer.json").read_text())
        self.checkpoint = {name: checkpoint(answer["shapes"]) for name, answer in self.trainer.items()}
        for name, tensors in self.checkpoint.items():
            save_file(tensors, folder / name / "model.safetensors")
        run("vllm", folder)
        self.vllm: dict[Any, dict[str, Any]] = torch.load(folder / "vllm.pt", weights_only=False)

    def ranks(self, family: str, layout: str) -> tuple[list[Any], list[dict[str, torch.Tensor]]]:
        """Tables and local parameters of the trainer's ranks: NaN where no block is, FP32 as in the checkpoint."""
        tables: list[list[tuple[str, Block]]] = []
        local: list[dict[str, torch.Tensor]] = []
        for shards in self.trainer[family][layout]:
            tables.append([])
            local.append({})
            for name, shape, rows in shards:
                local[-1][name] = torch.full(shape, math.nan)
                for block in grid_twins.blocks(rows):
                    tables[-1].append((name, block))
                    values = self.checkpoint[family][block.hf_name][region(block.hf_start, block.shape)]
                    local[-1][name][region(block.local_start, block.shape)] = values
        return tables, local


def run(program: str, folder: Path) -> None:
    command = [sys.executable, "-m", "tests.rollout.grid_twins", program, str(folder)]
    with warm.processes():
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400
        )
    assert done.returncode == 0, done.stdout[-4000:]


def checkpoint(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """FP32 with more bits than BF16 has, each tensor other values."""
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return Grid(tmp_path_factory.mktemp("grid"))


def one_host(ranks: int, workers: int) -> Topology:
    """Everything together, two engines."""
    return Topology(
        tuple(Place("h", str(n)) for n in range(ranks)), (tuple(Place("h", str(n)) for n in range(workers)),) * 2
    )


def two_hosts(ranks: int, workers: int) -> Topology:
    """Half of the ranks on each; three engines: one here, one there, one with every other worker on each."""
    hosts = tuple(Place(f"h{2 * rank // ranks}", str(rank % 8)) for rank in range(ranks))
    last = hosts[-1].host
    engines = ["h0"] * workers, [last] * workers, [("h0", last)[w % 2] for w in range(workers)]
    return Topology(hosts, tuple(tuple(Place(host, str(w)) for w, host in enumerate(engine)) for engine in engines))


def apart(ranks: int, workers: int) -> Topology:
    """The trainer on two hosts; three engines on hosts of their own, where a rank without shards receives."""
    trainer = tuple(Place(f"t{2 * rank // ranks}", str(rank % 8)) for rank in range(ranks))
    engines = tuple(tuple(Place(f"e{e}", str(w)) for w in range(workers)) for e in range(3))
    return Topology((*trainer, *(engine[0] for engine in engines)), engines)


TOPOLOGIES = (one_host, two_hosts, apart)


@pytest.mark.parametrize(("family", "tensor", "pipeline"), CELLS)
def test_vllms_parameters_are_those_that_its_own_loaders_make(
    grid: Grid, family: str, tensor: int, pipeline: int
) -> None:
    engine_layouts = grid.vllm[family, tensor, pipeline]
    checkpoint_elements = sum(values.numel() for values in grid.checkpoint[family].values())
    for n, layout in enumerate(TRAINERS):
        tables, local = grid.ranks(family, layout)
        topology = TOPOLOGIES[(n + CELLS.index((family, tensor, pipeline))) % 3](len(tables), tensor * pipeline)
        receivers = len(topology.ranks) - len(tables)
        plan = build_plan([*tables, *([[]] * receivers)], engine_layouts["layouts"], topology, BUCKET)
        if len({place.host for place in topology.ranks}) == 1:
            assert plan.rounds == 0, "nothing is packed or sent on one host"
        if receivers:
            assert arrived(plan) == [checkpoint_elements] * len(topology.engines), (
                "each element crosses once for a host"
            )
        received = execute(plan, topology, local, engine_layouts["layouts"])
        for e, w in itertools.product(range(len(topology.engines)), range(tensor * pipeline)):
            expected = engine_layouts["parameters"][w]
            assert received[e][w].keys() == expected.keys()
            for name, values in received[e][w].items():
                assert not values.isnan().any(), f"from {layout}, worker {w}: {name} has holes"
                assert torch.equal(bits(values), bits(expected[name])), f"from {layout}, worker {w}: {name} differs"


def arrived(plan: Plan) -> list[int]:
    """Elements that each engine's workers take from slots; what several of them take from one place counts once."""
    places = [{(a.rank, a.round, a.offset): math.prod(a.shape) for a in itertools.chain(*e)} for e in plan.recvs]
    return [sum(engine.values()) for engine in places]


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view({2: torch.int16, 4: torch.int32}[values.element_size()])


@pytest.mark.parametrize(("family", "tensor", "pipeline"), CELLS)
def test_a_trace_without_memory_is_that_of_live_parameters(grid: Grid, family: str, tensor: int, pipeline: int) -> None:
    engine_layouts = grid.vllm[family, tensor, pipeline]
    assert len(engine_layouts["layouts"]) == tensor * pipeline
    assert engine_layouts["layouts"] == engine_layouts["live"]


def cells(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Rectangle]:
    """Up to three intervals along every dimension, and the rectangles that they make."""
    axes = []
    for extent in shape:
        cuts = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=2))})
        axes.append(list(itertools.pairwise(cuts)))
    return [Rectangle(tuple(a for a, _ in x), tuple(b - a for a, b in x)) for x in itertools.product(*axes)]


def some(draw: st.DrawFn, count: int) -> set[int]:
    return draw(st.sets(st.integers(0, count - 1), min_size=1))


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[Any, ...]:
    """Tensors; tables and shards of up to four ranks, and layouts of up to three workers, that cut them along all
    dimensions, hold parts several times and put each anywhere; and where ranks, workers and engines are."""
    shapes = draw(st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4))
    tensors = checkpoint({f"t{i}": list(shape) for i, shape in enumerate(shapes)})
    ranks, workers = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    tables: list[list[tuple[str, Block]]] = [[] for _ in range(ranks)]
    local: list[dict[str, torch.Tensor]] = [{} for _ in range(ranks)]
    layouts: list[list[ParameterLayout]] = [[] for _ in range(workers)]
    for name, tensor in tensors.items():
        offset = st.tuples(*(st.integers(0, 2) for _ in tensor.shape))
        for i, cell in enumerate(cells(draw, tuple(tensor.shape))):
            for rank in some(draw, ranks):
                at = draw(offset)
                shard = torch.full([n + a for n, a in zip(cell.shape, at, strict=True)], math.nan)
                shard[region(at, cell.shape)] = tensor[region(cell.start, cell.shape)]
                tables[rank].append((f"{name}/{i}", Block(name, cell.start, at, cell.shape)))
                local[rank][f"{name}/{i}"] = shard
        dtype = draw(st.sampled_from(["float32", "bfloat16"]))
        for i, cell in enumerate(cells(draw, tuple(tensor.shape))):
            for worker in some(draw, workers):
                at = draw(offset)
                shape = tuple(n + a for n, a in zip(cell.shape, at, strict=True))
                part = Region(at, name, cell.start, cell.shape)
                layouts[worker].append(ParameterLayout(f"{name}/{i}", shape, dtype, (part,), ()))
    place = st.builds(Place, st.sampled_from(["h0", "h1", "h2"]), st.sampled_from(["0", "1"]))
    hosts = tuple(draw(place) for _ in range(ranks))
    engines = draw(st.lists(st.tuples(*[st.sampled_from(hosts)] * workers), min_size=1, max_size=3))
    return tensors, tables, local, layouts, Topology(hosts, tuple(engines))


@given(two_sides(), st.sampled_from([ALIGNMENT, 4 * ALIGNMENT, BUCKET]))
@settings(max_examples=100, deadline=None)
def test_any_rectangles_compose(sides: tuple[Any, ...], bucket: int) -> None:
    tensors, tables, local, layouts, topology = sides
    plan = build_plan(tables, layouts, topology, bucket)
    assert max(plan.slot_bytes) <= bucket
    for engine in execute(plan, topology, local, layouts):
        for parameters, worker in zip(engine, layouts, strict=True):
            for layout in worker:
                (part,) = layout.regions
                expected = torch.full(layout.shape, math.nan, dtype=getattr(torch, layout.dtype))
                expected[region(part.start, part.shape)] = tensors[part.hf_name][region(part.hf_start, part.shape)].to(
                    expected.dtype
                )
                torch.testing.assert_close(parameters[layout.name], expected, rtol=0, atol=0, equal_nan=True)
