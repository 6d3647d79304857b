"""The simulated sync of a recipe: bytes by hand, times by the links."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.blocks import Block
from recipes.preflight.weight_sync import Links, gather_then_load_seconds, links, network_seconds, topology
from rollout.weight_sync.layout import ParameterLayout, Region
from rollout.weight_sync.plan import Place, Topology
from rollout.weight_sync.planner import build_plan
from tests.settings import parallel_config

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = 2 * 8_292_166_656  # Qwen2.5-VL-7B in BF16
SPEEDS = Links(network_gb_s=50, pcie_gb_s=40, nvlink_gb_s=400, copy_gb_s=1000, order_ms=20, round_us=100)


def test_engines_on_two_nodes_of_their_own_receive_the_model_once_each(tmp_path: Path) -> None:
    """16 trainer GPUs and 16 engines of one GPU: what crosses is twice the model, by all adapters alike."""
    sizes = ("cluster.ranks=16", "rollout.engines=16", "cluster.engine_nodes=2", "simulate.order_ms=0")
    command = [sys.executable, "-m", "recipes.preflight.weight_sync", "recipe=safework_7b", *sizes]
    output = tmp_path / "sync.json"
    # As on a terminal. Torch writes a line about a CUDA that it does not find.
    environment = os.environ | {"FORCE_COLOR": "1", "CUDA_HOME": "/nowhere"}
    shown = subprocess.run(
        [*command, f"simulate.output={output}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    answer = json.loads(output.read_text())
    assert answer["bytes_minimum"] == 2 * WEIGHTS == 2 * answer["bytes_of_weights"]
    assert answer["bytes_minimum"] <= answer["bytes_crossed"] < 1.001 * answer["bytes_minimum"]
    assert answer["bytes_placed"] == 16 * WEIGHTS
    by_kind = {
        kind: [link["bytes"] for link in answer["links"] if link["link"] == kind]
        for kind in ("network in", "network out")
    }
    for kind, amounts in by_kind.items():
        assert len(amounts) == 16 and sum(amounts) == answer["bytes_crossed"]
        assert max(amounts) < 1.1 * WEIGHTS / 8, f"{kind} is dealt out over a node's eight adapters"
    assert answer["slot_bytes"] <= 512 << 20
    assert WEIGHTS / 8 / 45e9 < answer["seconds"] < 1.5 * WEIGHTS / 8 / 45e9
    assert "of safework_7b" in shown.stdout and "Warning" not in shown.stdout
    assert re.search(r"rank \d of \d", shown.stdout) and "vLLM's workers" in shown.stdout
    assert shown.stderr == ""


def test_links_are_counted_by_direction_and_gpu() -> None:
    """One KiB: a rank on another GPU of the node gives it to the worker; on another node it crosses, then NVLink."""
    shape = (16, 16)
    worker = [ParameterLayout("p", shape, "float32", (Region((0, 0), "t", (0, 0), shape),), ())]
    table = [("s", Block("t", (0, 0), (0, 0), shape))]
    where = Topology((Place("a", "0"), Place("b", "0")), ((Place("a", "1"),), (Place("b", "0"),)))
    plan = build_plan([table, []], [worker], where, 1 << 20)
    by_link = {(link.link, link.gpu): link for link in links(plan, where, {"p": 4}, SPEEDS)}
    assert {key: link.bytes for key, link in by_link.items()} == {
        ("copy", "a GPU 1"): 1024,
        ("nvlink out", "a GPU 0"): 1024,
        ("nvlink in", "a GPU 1"): 1024,
        ("copy", "a GPU 0"): 1024,  # packed
        ("network out", "a GPU 0"): 1024,
        ("network in", "b GPU 0"): 1024,
        ("copy", "b GPU 0"): 1024,
    }
    assert by_link["network out", "a GPU 0"].seconds == pytest.approx(1024 / 40e9), "the slower of adapter and PCIe"
    assert network_seconds(plan, SPEEDS) == pytest.approx(1024 / 40e9 + 100e-6)


def test_gather_then_load_is_bound_by_its_slowest_link() -> None:
    gb = 10**9
    assert gather_then_load_seconds(80 * gb, parallel_config(tensor=8, pipeline=4), SPEEDS) == pytest.approx(
        60 / 40 + 0.02
    )
    assert gather_then_load_seconds(80 * gb, parallel_config(tensor=8), SPEEDS) == pytest.approx(70 / 400 + 0.02)


def test_places_fill_nodes_and_disaggregated_has_ranks_without_shards() -> None:
    where = topology(world=12, engines=2, tensor=4, gpus_per_node=8, disaggregated=True)
    assert len(where.ranks) == 12 + 8 and where.ranks[11] == Place("node 1", "3")
    assert where.engines == (
        tuple(Place("node 2", str(i)) for i in range(4)),
        tuple(Place("node 2", str(i)) for i in range(4, 8)),
    )
    assert topology(16, 2, 8, 8, disaggregated=False).engines[1][0] == Place("node 1", "0")
