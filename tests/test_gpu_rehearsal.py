"""The GPU checks' own logic, on a CPU: the ranks of a node, the arithmetic of memory and speed, the job of two nodes.

What a check asserts of a GPU's numbers is not proven here; that it computes, compares, records and fails, is.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext import platform

platform.activate("cpu")

from benchmarks.figures import source  # noqa: E402
from megatron_ext import parallel  # noqa: E402
from tests.gpu import (  # noqa: E402
    conftest,
    footprint,
    node_cases,
    small_run,
    test_decoding,
    test_fp8,
    test_memory,
    test_node,
    test_two_nodes,
)
from tests.megatron_ext.cases import Case  # noqa: E402
from tests.megatron_ext.ranks import Ranks  # noqa: E402
from tests.settings import precision_config  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30


class Recorded(dict[str, Any]):
    """In the place of pytest's ``record_property``."""

    __call__ = dict.__setitem__


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    yield from test_node.start(tmp_path_factory.mktemp("node"), "tests.gpu.node_ranks_on_cpu")


reference = test_node.reference


@pytest.mark.parametrize("case", [node_cases.LAYOUTS[-1], node_cases.PADDED], ids=lambda case: case.name)
def test_eight_ranks_hold_the_checks_bounds(case: Case, ranks: Ranks, reference: test_node.References) -> None:
    test_node.test_a_layout_over_nccl_is_as_near_to_fp32_as_one_rank(case, ranks, reference)


def test_speed_and_links_are_recorded_and_have_floors(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded()
    with pytest.raises(AssertionError):  # gloo is no NVLink
        test_node.test_the_links_and_communicators_of_the_node(ranks, recorded)
    assert recorded.keys() == {"nvlink_gb_s", "all_reduce_gb_s", "communicator_gib", "all_reduce_us", "round_us"}
    assert recorded["communicator_gib"] == 0
    assert min(recorded["nvlink_gb_s"], recorded["all_reduce_us"], recorded["round_us"]) > 0
    monkeypatch.setattr(test_node, "LINKS", test_node.OmegaConf.create({"nvlink_gb_s": 0}))
    monkeypatch.setattr(test_node, "FLOORS", test_node.OmegaConf.create({"node_gb_s": 0}))
    monkeypatch.setattr(test_node, "MOST_ALL_REDUCE_US", 1e9)
    monkeypatch.setattr(test_node, "MOST_ROUND_US", 1e9)
    test_node.test_the_links_and_communicators_of_the_node(ranks, recorded)

    (of_a_rank, *others) = ranks.results(node_cases.SPEED.name)
    assert len(others) == 7 and of_a_rank["peak_flops"] is None
    # By hand: two of 64 x 256 for query and output, two for key and value (8 heads), three of 64 x 64 for one layer;
    # 48 of 64 tokens need logits.
    matrices = 4 * 64 * 256 + 3 * 64 * 64
    assert of_a_rank["flops"] == 6 * (matrices * 64 + 64 * 256 * 48) + 3 * 2 * 64**2 * 256
    monkeypatch.setattr(ranks, "results", lambda name: [{"seconds": 2.0, "flops": 8e15, "peak_flops": 1e15}] * 8)
    test_node.test_a_block_of_the_72b_model_over_all_gpus_keeps_them_busy(ranks, recorded)
    assert recorded["mfu"] == 0.5


def test_overlap_has_to_save_time_and_to_reach_its_first_figure(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of the CPU compute both; then seconds are made up: of 8 x 10^15 FLOPs on eight GPUs."""
    (of_a_rank, *others) = ranks.results(node_cases.OVERLAP.name)
    assert len(others) == 7 and of_a_rank["flops"] == ranks.results(node_cases.SPEED.name)[0]["flops"]
    seconds = {node_cases.SPEED.name: 2.4, node_cases.OVERLAP.name: 2.0}

    def results(name: str) -> list[dict[str, float]]:
        return [{"seconds": seconds[name], "flops": 8e15, "peak_flops": 1e15}] * 8

    monkeypatch.setattr(ranks, "results", results)
    recorded = Recorded()
    test_node.test_communication_hides_behind_the_products(ranks, recorded)
    assert recorded == pytest.approx({"seconds": 2.0, "seconds_apart": 2.4, "mfu": 0.5, "goal_mfu": 0.55})
    for slower in ({node_cases.SPEED.name: 1.9}, {node_cases.OVERLAP.name: 2.3}):
        seconds |= {node_cases.SPEED.name: 2.4, node_cases.OVERLAP.name: 2.0} | slower
        with pytest.raises(AssertionError):
            test_node.test_communication_hides_behind_the_products(ranks, recorded)


@pytest.fixture(scope="module")
def layout() -> Iterator[parallel.Parallel]:
    yield from conftest.only_rank("cpu")


@pytest.fixture
def fake_memory(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What ``torch.cuda`` says of the GPU's memory; a test changes it. The 72B layers are small ones."""
    memory = {"free": 70 * GIB, "allocated": 0, "reserved": 0, "peak": 0, "peak reserved": 0}
    answers = {
        "empty_cache": lambda: None,
        "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "mem_get_info": lambda: (memory["free"], 79 * GIB),
        "memory_allocated": lambda: memory["allocated"],
        "memory_reserved": lambda: memory["reserved"],
        "max_memory_allocated": lambda: memory["peak"],
        "max_memory_reserved": lambda: memory["peak reserved"],
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    small = test_fp8.LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, tie_word_embeddings=False,
    )  # fmt: skip
    for module in (test_fp8, footprint):
        monkeypatch.setattr(module, "LAYERS_72B", small)
        monkeypatch.setattr(module, "TOKENS", 64)
    monkeypatch.setattr(test_fp8.batch, "__defaults__", (16, torch.device("cpu")))
    return memory


def test_a_peak_is_held_against_the_estimate(layout: parallel.Parallel, fake_memory: dict[str, int]) -> None:
    recorded = Recorded()

    def peak_is(share: float) -> None:
        fake_memory["peak"] = int(share * recorded.get("estimate_gib", 0) * GIB)
        test_fp8.test_the_peak_of_memory_is_the_estimate("bf16", layout, recorded)

    with pytest.raises(AssertionError):
        peak_is(1.0)  # of an estimate that is not known yet
    peak_is(1.0)
    peak_is(1.04)
    for share in (0.89, 1.05):
        with pytest.raises(AssertionError):
            peak_is(share)


def test_the_speed_of_a_block_is_flops_over_seconds(
    layout: parallel.Parallel, fake_memory: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(test_fp8.FP8, "blockwise", precision_config("bf16"))
    ticks = iter([0.0, 10.0, 0.0, 5.0])
    monkeypatch.setattr(test_fp8, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    matrices = 64 * (2 * 2 * 32 + 2 * 32) + 3 * 64 * 64
    flops = 6 * (matrices * 64 + 64 * 256 * 48) + 3 * 2 * 64**2 * 64
    monkeypatch.setattr(test_fp8, "SPEED", test_fp8.OmegaConf.create({"peak_tflops": 2 * flops / 1e12, "mfu": 0.5}))
    recorded = Recorded()
    test_fp8.test_a_block_of_the_72b_model_keeps_the_gpu_busy(layout, recorded)
    assert recorded == pytest.approx({"bf16_ms": 1000, "fp8_ms": 500, "mfu": 0.5, "goal_mfu": 0.55})
    monkeypatch.setattr(test_fp8, "FIRST_MFU", 0.51)
    ticks = iter([0.0, 10.0, 0.0, 5.0])
    with pytest.raises(AssertionError):
        test_fp8.test_a_block_of_the_72b_model_keeps_the_gpu_busy(layout, recorded)


def test_the_bandwidth_of_decoding_is_bytes_over_the_difference_of_steps(
    layout: parallel.Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of the 72B model: query and output 8,192 x 8,192 each, key and value 8,192 x 1,024, the feed-forward
    layer three of 8,192 x 29,568; in BF16. A step takes 3 ms and a layer's bytes at 2,680 GB/s."""
    layer_bytes = 2 * 8192 * (2 * 8192 + 2 * 1024 + 3 * 29568)

    def decoding_step(config: Any, layout: parallel.Parallel, folder: Path, cuda_graphs: bool) -> test_decoding.Step:
        assert folder.is_dir() and (config.vocab_size, config.hidden_size) == (256, 8192) and cuda_graphs
        return test_decoding.Step(3.0 + config.num_hidden_layers * layer_bytes / 2680e9 * 1000, engine_gib=1.0)

    monkeypatch.setattr(test_decoding, "decoding_step", decoding_step)
    recorded = Recorded()
    test_memory.test_an_engine_reads_whole_72b_layers_at_half_the_assumed_speed_or_more(layout, tmp_path, recorded)
    assert recorded == {"hbm_share": pytest.approx(0.8)}


def test_what_graphs_take_is_the_difference_to_an_engine_without_them(
    layout: parallel.Parallel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nineteen graphs of 32 MiB each. More than the recipes leave free is a failure, and so is a step that takes no
    less time."""
    made_up = {True: test_decoding.Step(3.0, 2.5 + 19 / 32), False: test_decoding.Step(20.0, 2.5)}
    monkeypatch.setattr(test_decoding, "decoding_step", lambda config, layout, folder, graphs: made_up[graphs])

    def check(name: str) -> Recorded:
        (tmp_path / name).mkdir()
        recorded = Recorded()
        test_decoding.test_an_engines_step_of_80_narrow_layers(layout, tmp_path / name, recorded)
        return recorded

    assert check("sound") == {"decode_ms": 3.0, "decode_ms_without_graphs": 20.0, "graph_gib": pytest.approx(1 / 32)}
    for name, step in (("slow", test_decoding.Step(20.0, 3.1)), ("large", test_decoding.Step(3.0, 2.5 + 6.8))):
        made_up[True] = step
        with pytest.raises(AssertionError):
            check(name)


def test_files_are_written_read_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight files of 3 MB by a clock that says that writing takes 12 ms and reading 6 ms."""
    monkeypatch.setattr(test_memory, "FILE_BYTES", 3_000_000)
    monkeypatch.setattr(test_memory, "BLOCK_BYTES", 1_000_000)
    ticks = iter([1.0, 1.012, 2.0, 2.006])
    monkeypatch.setattr(test_memory, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    monkeypatch.setattr(test_memory, "ROOT", tmp_path)
    recorded = Recorded()
    test_memory.test_files_are_written_and_read(recorded)
    assert recorded == pytest.approx({"write_gb_s": 2.0, "read_gb_s": 4.0})
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_a_process_keeps_is_told_apart(
    layout: parallel.Parallel, fake_memory: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free were 70 GiB; after the context 69. The step takes 1 GiB more beside the allocator, which holds 20 GiB at a
    peak of 18; of what is left in it, libraries have half a GiB."""

    def step(layout: parallel.Parallel) -> None:
        fake_memory.update({"free": 48 * GIB, "allocated": GIB // 2, "reserved": 20 * GIB})
        fake_memory.update({"peak": 18 * GIB, "peak reserved": 20 * GIB})

    footprint.step(layout)  # a real one
    fake_memory["free"] = 69 * GIB
    monkeypatch.setattr(footprint, "step", step)
    assert footprint.measure(70 * GIB, layout) == {
        "device_memory_gib": 79,
        "context_gib": 1,
        "workspace_gib": 1.5,
        "fragmentation_gib": 2,
    }


SBATCH = """#!/bin/sh
echo "$@" > "$FAKE/sbatch"
mkdir -p "$FAKE/run"
cp "$FAKE/first" "$FAKE/run/metrics.jsonl"
echo 7
"""
SCANCEL = """#!/bin/sh
echo "$@" > "$FAKE/scancel"
cp "$FAKE/all" "$FAKE/run/metrics.jsonl"
cp "$FAKE/log" slurm-7.log
"""
SQUEUE = """#!/bin/sh
[ -e "$FAKE/scancel" ] || echo RUNNING
"""
LOG = """\
GB/s within a node: at least 391; between nodes: node1-node2 46.1
requeued (restart 1 of at most 20): preemption was requested
GB/s within a node: at least 388; between nodes: node1-node2 44.7
"""


def step_rows(count: int) -> str:
    """Of a run; made up."""
    rows = [
        {"step": step, "kl/reference": 0.0 if step == 1 else 0.1, "train_inference_mismatch/mean": 0.01}
        | {"grad_norm": 1.0, "sync/bytes": 10, "time/train": 2.0}
        for step in range(1, count + 1)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_job_of_two_nodes_is_submitted_signalled_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch, scancel and squeue are fakes, which leave what a run leaves."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "first").write_text(step_rows(1))
    (tmp_path / "all").write_text(step_rows(test_two_nodes.STEPS))
    (tmp_path / "log").write_text(LOG)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    job = test_two_nodes.run_job(tmp_path, tmp_path / "run", test_two_nodes.SBATCH, ["seed=3"])
    assert "--nodes=2 --ntasks-per-node=8" in (tmp_path / "sbatch").read_text()
    assert (tmp_path / "scancel").read_text() == "--batch --signal=USR1 7\n"
    events = [
        ("start", None),
        ("checkpoint", 3),
        ("stop", None),
        ("resume", None),
        ("checkpoint", 40),
        ("finish", None),
    ]
    lines = [json.dumps({"time": time, "kind": kind, "step": step}) for time, (kind, step) in enumerate(events)]
    (job.run_dir / "events.jsonl").write_text("\n".join(lines) + "\n")
    test_two_nodes.test_weights_cross_between_the_nodes(job, {"machine": {"processes": 16}})
    test_two_nodes.test_the_job_is_requeued_and_goes_on_from_its_checkpoint(job)
    recorded = Recorded()
    test_two_nodes.test_the_links_between_the_nodes_hold_their_floor(job, recorded)
    assert (recorded["within_gb_s"], recorded["network_gb_s"]) == (388, 44.7)
    assert recorded["seconds_of_the_last_step"] == {"time/train": 2.0}

    (job.run_dir / "metrics.jsonl").write_text(step_rows(39))
    with pytest.raises(AssertionError):
        test_two_nodes.test_weights_cross_between_the_nodes(job, {"machine": {"processes": 16}})
    again = test_two_nodes.Job(job.run_dir, job.log + "requeued (restart 2 of at most 20): it failed\n")
    with pytest.raises(AssertionError):
        test_two_nodes.test_the_job_is_requeued_and_goes_on_from_its_checkpoint(again)


def test_outcomes_and_figures_are_recorded(tmp_path: Path) -> None:
    """By the hook of the checks' conftest. A check that runs again replaces its own entry alone."""
    file = tmp_path / "results" / "made.json"
    item: Any = SimpleNamespace(config=SimpleNamespace(getoption=lambda name: file))
    machine = {"machine": {"device": "8 x NVIDIA made-up"}}

    def ran(check: str, outcome: str, **figures: float) -> None:
        properties = [*figures.items(), ("environment", machine)]
        report: Any = SimpleNamespace(
            when="call", nodeid=f"tests/gpu/{check}", outcome=outcome, duration=1.23, user_properties=properties
        )
        hook = conftest.pytest_runtest_makereport(item)
        next(hook)
        with pytest.raises(StopIteration) as ended:
            hook.send(report)
        assert ended.value.value is report

    ran("test_made.py::test_one[a/b]", "failed")
    ran("test_made.py::test_two", "failed")
    ran("test_made.py::test_one[a/b]", "passed", speed_gb_s=5.5)
    entries = json.loads(file.read_text())
    assert all(entry.pop("date").startswith("20") for entry in entries.values())
    assert all(entry.pop("source") == source(module=None) for entry in entries.values())
    assert entries == {
        "test_made.py::test_one[a/b]": {"outcome": "passed", "seconds": 1.2, **machine, "figures": {"speed_gb_s": 5.5}},
        "test_made.py::test_two": {"outcome": "failed", "seconds": 1.2, **machine, "figures": {}},
    }


def test_the_small_run_is_a_configuration_that_is_accepted(tmp_path: Path) -> None:
    """On one node in both layouts, and on two."""
    from hydra import compose, initialize_config_dir

    from recipes.config import parse
    from tests.gpu.test_node_recipe import GPUS, LAYOUTS
    from tests.recipes import tiny

    tiny.make(tmp_path, **small_run.MODEL)
    sizes = [[f"cluster.ranks={GPUS}", *layout] for layout in LAYOUTS.values()]
    sizes.append(["cluster.nodes=2", "cluster.ranks=16", *test_two_nodes.LAYOUT])
    for more in sizes:
        arguments = small_run.overrides(tmp_path, tmp_path / "run", 3, *more)
        folder, *overrides = arguments
        search_path = f"hydra.searchpath=[file://{folder.partition('=')[2]}]"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = parse(compose("config", [search_path, *overrides]))
        assert config.rollout.sleep and config.optimizer.offload and config.rollout.sync_verify_every == 1
