"""The arithmetic of ``benchmarks.weight_sync``, its memcpy and its random model. Nothing here measures time."""

import json
import os
import subprocess
import sys

import pytest
import torch
from rich.console import Console

from benchmarks import weight_sync
from benchmarks.measured_sync import MemoryWatch, process_tree
from benchmarks.memcpy import copy_bytes
from benchmarks.peers import random_model


def export(first, later, versions=("1.0",)):
    return {
        "first_export_seconds": first,
        "later_export_seconds": later,
        "memcpy_seconds": [0.5],
        "start_seconds": 9.0,
        "bytes": 100,
        "tensors": [["a", [2], 0]],
        "versions": versions,
    }


def load(seconds, pack):
    return {"load_seconds": seconds, "pack_seconds": pack}


def sync(size, seconds, loads=None, verified=(4.0, 2.0, 3.0)):
    return {
        "ranks": 2,
        "bytes": size,
        "plan_seconds": 1.0,
        "first_sync_verified_seconds": 4.0,
        "sync_seconds": list(seconds),
        "placing_seconds": [second - 0.5 for second in seconds],
        "placing_copying_seconds": [0.25] * len(seconds),
        "sync_packing_seconds": [0.5] * len(seconds),
        "verified_sync_seconds": list(verified),
        "memcpy_seconds": [1.0, 0.5, 2.0],
        "memcpy_in_two_pieces_seconds": [0.75, 0.25, 0.5],
        "empty_sync_seconds": [0.25, 0.75, 0.5],
        "loads": loads,
        "identical": None if loads is None else True,
        "extra_memory_bytes": {},
    }


LOADS = [load(5.0, 1.0), load(2.0, 0.5), load(3.0, 0.25), load(4.0, 0.75)]
EXPORTS = {"megatron_bridge": export(9.0, [6.0, 5.0, 8.0]), "mbridge": export(12.0, [4.0, 4.0, 5.0])}


def test_a_layout_takes_medians_of_the_later_repetitions_and_the_peers_sums():
    layout = weight_sync.summarise_layout(sync(100, [3.0, 2.0, 1.0], LOADS), EXPORTS)
    assert (layout["ours_seconds"], layout["ours_verified_seconds"], layout["memcpy_seconds"]) == (2.0, 3.0, 1.0)
    assert layout["verification_seconds"] == 1.0
    assert (layout["first_sync_to_memcpy"], layout["second_sync_to_memcpy"]) == (4.0, 1.5)
    # export + load + pack: 6 + 3 + 0.5 and 4 + 3 + 0.5; first 9 + 5 + 1 and 12 + 5 + 1
    assert {peer: part["seconds"] for peer, part in layout["peers"].items()} == {"megatron_bridge": 9.5, "mbridge": 7.5}
    assert layout["best_peer"] == "mbridge"
    # Packing takes half a second of ours too.
    assert layout["placing_seconds"] == 1.5
    assert layout["bound"] == {"calls_seconds": 1.25, "copying_seconds": 0.25, "packing_seconds": 0.5}
    assert (layout["ratio_to_memcpy"], layout["ratio_to_memcpy_with_packing"]) == (1.0 / 1.5, 0.5)
    assert layout["attainable_ratio_to_memcpy"] == 1.0 / 1.0
    assert layout["ratio_to_memcpy_in_two_pieces"] == 0.5 / 1.5
    assert layout["ratio_to_best_peer"] == 3.75
    assert layout["ratio_to_best_peer_verified"] == 2.5
    assert layout["ratio_to_best_peer_first"] == 15.0 / 4.0


def test_a_layout_without_peers_has_no_peer_ratio():
    layout = weight_sync.summarise_layout(sync(100, [1.0]), {})
    assert "ratio_to_best_peer" not in layout
    assert layout["ratio_to_memcpy_with_packing"] == 1.0


def test_the_summary_holds_the_goals_against_the_worst_layout():
    syncs = {
        "smollm2": {"3": sync(50, [0.75], LOADS), "1": sync(50, [2.0], LOADS)},
        "qwen2_1_layers": {"2": sync(1_000_000_000, [1.5])},
        "qwen2_2_layers": {"2": sync(2_000_000_000, [2.5]), "1": sync(2_000_000_000, [1.0])},
        "qwen2_4_layers": {"2": sync(4_000_000_000, [4.5])},
    }
    exports = {name: EXPORTS if name == "smollm2" else {} for name in syncs}
    summary = weight_sync.summarise(exports, syncs)
    assert summary["ratio_to_best_peer"] == 3.75  # 7.5 / 2, and not 7.5 / 0.75
    assert (summary["ratio_to_memcpy"], summary["ratio_to_memcpy_with_packing"]) == (1.0 / 4.0, 1.0 / 4.5)
    assert summary["second_sync_to_memcpy"] == 4.0
    assert not any(goal["met"] for goal in summary["goals"].values())
    cost = summary["cost_against_bytes"]  # of the Qwen2 models at vLLM's TP 2: one second per GB and half a second
    assert [point["bytes"] for point in cost["points"]] == [1_000_000_000, 2_000_000_000, 4_000_000_000]
    assert cost["seconds_per_gigabyte"] == pytest.approx(1.0)
    assert cost["seconds_at_zero_bytes"] == pytest.approx(0.5)
    assert cost["largest_deviation"] == pytest.approx(0.0)
    exported = summary["models"]["smollm2"]["peer_exports"]["mbridge"]
    assert exported["later_export_seconds"] == [4.0, 4.0, 5.0]
    assert "tensors" not in exported

    console = Console(width=160)
    with console.capture() as capture:
        console.print(*weight_sync.tables(summary))
    shown = capture.get()
    assert "7.500 (mbridge)" in shown
    assert shown.count(" no ") == 3


def test_met_goals_are_said():
    syncs = {"smollm2": {"1": sync(50, [1.25], LOADS)}, "qwen2_1_layers": {"2": sync(10, [1.0])}}
    syncs["qwen2_2_layers"] = {"2": sync(20, [1.25])}
    summary = weight_sync.summarise({"smollm2": EXPORTS, "qwen2_1_layers": {}, "qwen2_2_layers": {}}, syncs)
    assert summary["ratio_to_best_peer"] == 6.0
    assert (summary["ratio_to_memcpy"], summary["second_sync_to_memcpy"]) == (1.0 / 0.75, 0.75)
    assert all(goal["met"] for goal in summary["goals"].values())


def test_a_fitted_line_says_how_far_the_worst_point_is():
    # Least squares through (1, 1), (2, 4), (3, 1): the constant 2; the deviations are 1/1, 2/4, 1/1.
    line = weight_sync.fit_line([(1, 1.0), (2, 4.0), (3, 1.0)])
    assert line["seconds_per_gigabyte"] == pytest.approx(0.0)
    assert line["largest_deviation"] == pytest.approx(1.0)


def test_copy_bytes_fills_the_target_and_starts_again():
    sources = [torch.arange(5, dtype=torch.int16), torch.tensor([1.5], dtype=torch.bfloat16)]
    period = torch.cat([source.view(torch.uint8) for source in sources])
    target = torch.full((20,), 77, dtype=torch.uint8)
    copy_bytes(sources, target[:19])
    assert target.tolist() == [*period.tolist(), *period.tolist()[:7], 77]
    with pytest.raises(ValueError, match="nothing to copy"):
        copy_bytes([torch.empty(0)], target)


def test_the_random_model_is_the_72b_in_small():
    small = random_model.config(3)
    large = json.loads(random_model.ARCHITECTURE.read_text())
    assert small["hidden_size"] / small["num_attention_heads"] == large["hidden_size"] / large["num_attention_heads"]
    assert small["num_attention_heads"] / small["num_key_value_heads"] == 8
    hidden = small["hidden_size"]
    keys = 128 * small["num_key_value_heads"]
    attention = 2 * hidden * hidden + 2 * keys * hidden
    mlp = 3 * small["intermediate_size"] * hidden
    biases = hidden + 2 * keys
    norms = 2 * hidden
    layer = attention + mlp + biases + norms
    embeddings = 2 * small["vocab_size"] * hidden
    assert embeddings + 3 * layer + hidden == 242_439_680  # as transformers counts the parameters
    assert embeddings + 20 * layer + hidden == 1_175_064_576


def test_memory_is_watched_per_process():
    """A process that has just begun takes new pages; this one may have free pages of its own."""
    size = 32 << 20
    program = f"input(); grown = b'x' * {size}; print('grown', flush=True); input()"
    grows = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        watch = MemoryWatch([grows.pid], [os.getpid()])
        grows.stdin.write("grow\n")
        grows.stdin.flush()
        assert grows.stdout.readline() == "grown\n"
        assert size <= watch.stop()[grows.pid] < 2 * size
    finally:
        grows.kill()
        grows.communicate()
    assert process_tree(os.getpid())[0] == os.getpid()


def test_ranks_get_their_numbers_and_a_failing_one_ends_all(tmp_path):
    program = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])"
    )
    weight_sync.run_ranks([sys.executable, "-c", program, str(tmp_path)], 3, tmp_path / "log")
    assert sorted((path.name, path.read_text()) for path in tmp_path.glob("[0-9]")) == [(str(r), "3") for r in range(3)]
    failing = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('rank 1 says why'); time.sleep(60)"
    with pytest.raises(RuntimeError, match="rank 1 says why"):
        weight_sync.run_ranks([sys.executable, "-c", failing], 2, tmp_path / "log")


def test_every_pin_is_exact_and_both_peers_run_on_one_core_and_torch():
    pins = {}
    for peer in ("megatron_bridge", "mbridge"):
        lines = [line for line in (weight_sync.PEERS / f"{peer}.txt").read_text().splitlines() if line[0] != "#"]
        pins[peer] = dict(line.split("==") for line in lines)
    assert pins["megatron_bridge"]["torch"] == pins["mbridge"]["torch"]
    assert pins["megatron_bridge"]["megatron-core"] == pins["mbridge"]["megatron-core"]
    assert "megatron-bridge" in pins["megatron_bridge"]
    assert "mbridge" not in pins["megatron_bridge"]
