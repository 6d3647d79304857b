"""Compares the weight sync on the CPU with two peers, Megatron-Bridge and mbridge, and with a memcpy.

A peer's sync is its export followed by vLLM's load. ``python -m benchmarks.weight_sync`` writes
``benchmarks/results/weight_sync.json`` and prints its tables. The first run uses uv to create an environment for each
peer in ``build/benchmarks``. It also creates the models. For each model, first each peer exports from its own trainer
ranks. Then our trainer ranks and one vLLM run. One repetition has a load of the peer's tensors, a call that does
nothing, a memcpy of the same bytes, a sync without packing, a complete sync, and a sync with verification.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from recipes.config import parse
from recipes.launch.prepare_model import prepare
from recipes.run import records

FOLDER = Path("build/benchmarks")
PEERS = Path("benchmarks/peers")
RESULT = Path("benchmarks/results/weight_sync.json")
PEER_GOAL = 5.0  # at least: seconds of the best peer / ours
MEMCPY_GOAL = 0.8  # at least: seconds of a memcpy / ours
SECOND_SYNC_GOAL = 1.0  # at most: seconds of our second sync / a memcpy's
TIME_LIMIT = 480  # seconds after which a group of ranks counts as hung

MEASURED = {
    "ours": "WeightSync.sync from the call until it has returned on all ranks. It includes vLLM's packing of linear "
    "layers for a CPU and no verification by checksums, which no peer has; verified_sync_seconds include it",
    "placing": "the second sync with the same plan, after a memcpy, with workers that do not pack, because a GPU needs "
    "no packing: ratio_to_memcpy and second_sync_to_memcpy use it, ratio_to_memcpy_with_packing uses ours",
    "bound": "copying: the slowest worker's copies during placing; calls: the rest of placing, with its collectives; "
    "packing: that of ours",
    "peers": "export: all ranks iterate over the peer's generator of full tensors and drop them; load: vLLM's "
    "model.load_weights of the same tensors from shared memory, slowest worker, and the same packing. A peer's seconds "
    "are the sum of both, without disk, process start, transfer or remote call. Both peers have the same loads",
    "empty_sync": "a barrier of the ranks, a call that does nothing on all of vLLM's workers, and a barrier: the time "
    "of a sync without bytes. attainable_ratio_to_memcpy is a memcpy's seconds over this plus a memcpy in two pieces",
    "memcpy": "copies the same number of bytes from the parameters to touched memory: each trainer rank copies its "
    "share, all at once, while vLLM's workers are as idle as before a sync. The C library uses non-temporal stores for "
    "pieces above 3/4 of the last-level cache",
    "memcpy_in_two_pieces": "copies the same number of bytes between the two halves of that memory, in two calls: the "
    "C library uses non-temporal stores, as it does for our copies from 32 KiB on",
}


@dataclass(frozen=True)
class Case:
    """A model, and how it is synced.

    ``ranks`` is the tensor-parallel size of the trainer, ours and the peers'. ``repetitions`` come after the first
    sync, which is reported separately. Short syncs vary more and get more repetitions.
    """

    name: str
    folder: str
    ranks: int
    vllm_tensor_parallel: tuple[int, ...]
    repetitions: int
    peers: bool


def cases(demo_folder: str) -> list[Case]:
    layers = {n: str(FOLDER / f"models/qwen2_{n}_layers") for n in (5, 10, 20)}
    # SmolLM2 has 9 heads in 3 groups. The peers cannot shard it over 2 ranks, so all shard it over 3.
    return [
        Case("smollm2_135m", demo_folder, 3, (3, 1), 24, peers=True),
        Case("qwen2_20_layers", layers[20], 2, (2, 1), 8, peers=True),
        Case("qwen2_10_layers", layers[10], 2, (2,), 16, peers=False),
        Case("qwen2_5_layers", layers[5], 2, (2,), 24, peers=False),
    ]


def main() -> None:
    made_by = figures.source("benchmarks.weight_sync", recipes=["demo"])
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        demo = parse(compose("config", ["recipe=demo"])).model
    peers = ("megatron_bridge", "mbridge")
    pythons = {peer: environment(peer, FOLDER / peer) for peer in peers}
    prepare(demo)
    all_cases = cases(demo.path)
    for case in all_cases:
        random_model(Path(case.folder))
    shutil.rmtree(FOLDER / "weight_sync", ignore_errors=True)
    load = os.getloadavg()[0]
    exports: dict[str, Any] = {}
    syncs: dict[str, Any] = {}
    for case in all_cases:
        exports[case.name], syncs[case.name] = run_case(case, pythons if case.peers else {})
    exports_of_peers = exports[next(case.name for case in all_cases if case.peers)]
    result = {
        **records.environment("cpu", max(case.ranks for case in all_cases)),
        "peer_versions": {peer: exports_of_peers[peer]["versions"] for peer in peers},
        "load_average_before": load,
        "measured": MEASURED,
        **summarise(exports, syncs),
    }
    figures.write(RESULT, "python -m benchmarks.weight_sync", made_by, result)
    Console(width=None if sys.stdout.isatty() else 140).print(*tables(result), f"{RESULT} has the raw times", sep="\n")


def log(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of an environment with exactly the packages of ``peers/<peer>.txt``.

    The environment in ``folder`` is created anew unless it has these packages.
    """
    pins = PEERS / f"{peer}.txt"
    stamp = folder / "installed.txt"
    python = folder / "bin/python"
    if stamp.is_file() and stamp.read_text() == pins.read_text():
        return python
    log(f"creating the environment of {peer} in {folder} (minutes the first time)")
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
    # --no-deps, because both depend on packages that need a CUDA compiler. The list of packages is complete.
    # --no-config, because the project's own uv settings take torch's version from its pins.
    command = [uv, "pip", "install", "--quiet", "--no-config", "--python", str(python), "--no-deps", "-r", str(pins)]
    subprocess.run(command, check=True)
    stamp.write_text(pins.read_text())
    return python


def random_model(folder: Path) -> None:
    """Create the model in ``folder`` if it is one of the random models and does not exist."""
    if folder.name.startswith("qwen2_") and not folder.is_dir():
        log(f"creating {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        layers = folder.name.split("_")[1]
        module = "benchmarks.peers.random_model"
        subprocess.run([sys.executable, "-m", module, layers, str(folder)], check=True, stderr=subprocess.DEVNULL)


def run_case(case: Case, pythons: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the peers' exports, each in its environment, then our sync with the peers' loads. Returns the raw times."""
    folder = FOLDER / "weight_sync" / case.name
    folder.mkdir(parents=True)
    model_bytes = sum(file.stat().st_size for file in Path(case.folder).glob("*.safetensors"))
    memory_bytes = model_bytes + 2**20  # each tensor's start is aligned
    memory = os.memfd_create("exported")
    os.ftruncate(memory, memory_bytes)
    settings: dict[str, Any] = {"model": case.folder, "repetitions": case.repetitions}

    exports: dict[str, Any] = {}
    exported = None
    for peer, python in pythons.items():
        log(f"{case.name}: {peer} exports on {case.ranks} ranks")
        output = folder / f"{peer}.json"
        peer_settings = settings | {"memory": memory, "output": str(output)}
        command = [str(python), "-m", "benchmarks.peers.exporter", peer, json.dumps(peer_settings)]
        run_ranks(command, case.ranks, folder / f"{peer}.log", pass_fds=(memory,))
        exports[peer] = json.loads(output.read_text())
        # Each peer overwrites the memory. Either content is right: both exports were compared with the checkpoint.
        exported = {"pid": os.getpid(), "fd": memory, "bytes": memory_bytes, "tensors": exports[peer]["tensors"]}

    tensor = ", ".join(map(str, case.vllm_tensor_parallel))
    log(f"{case.name}: weight sync on {case.ranks} ranks, vLLM at tensor parallel {tensor}")
    output = folder / "ours.json"
    our_settings = settings | {
        "exported": exported,
        "vllm_tensor_parallel": case.vllm_tensor_parallel,
        "output": str(output),
        "logs": str(folder),
        "plans": str(folder / "plans"),
    }
    command = [sys.executable, "-m", "benchmarks.measured_sync", json.dumps(our_settings)]
    run_ranks(command, case.ranks, folder / "ours.log")
    os.close(memory)
    return exports, json.loads(output.read_text())


def run_ranks(command: list[str], ranks: int, log_file: Path, pass_fds: Sequence[int] = ()) -> None:
    """Run ``command`` once per rank with torchrun's variables and the open file descriptors ``pass_fds``.

    The ranks' output goes to ``log_file``. Raises RuntimeError with its last lines when a rank fails or TIME_LIMIT has
    passed. No rank still runs when this returns or raises.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TORCH_COMPILE_DISABLE": "1",
        "PYTHONPATH": str(Path.cwd()),
    }
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + TIME_LIMIT
    try:
        with log_file.open("wb") as output:
            for rank in range(ranks):
                env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=output, pass_fds=pass_fds))
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()  # does nothing to a process that has ended
            process.wait()
    if any(process.returncode for process in processes):
        end_of_log = log_file.read_text(errors="replace")[-4000:]
        raise RuntimeError(f"a rank failed or took over {TIME_LIMIT} s:\n{end_of_log}\n({log_file})")


def summarise(exports: Mapping[str, Any], syncs: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and ratios of every model and layout, and the worst ratios, which the goals apply to.

    Args:
        exports: model → peer → the exporter's answer; a model that only shows the cost per byte has no peers.
        syncs: model → vLLM's tensor-parallel size → the answer of ``measured_sync``.
    """
    models: dict[str, Any] = {
        model: {
            "peer_exports": {
                peer: {name: value for name, value in export.items() if name not in ("tensors", "versions")}
                for peer, export in exports[model].items()
            },
            "vllm_tensor_parallel": {
                tensor: summarise_layout(sync, exports[model]) for tensor, sync in by_tensor.items()
            },
        }
        for model, by_tensor in syncs.items()
    }
    layouts = [layout for model in models.values() for layout in model["vllm_tensor_parallel"].values()]
    to_peer = min(layout["ratio_to_best_peer"] for layout in layouts if "ratio_to_best_peer" in layout)
    to_memcpy = min(layout["ratio_to_memcpy"] for layout in layouts)
    second_sync = max(layout["second_sync_to_memcpy"] for layout in layouts)
    # The cost per byte: models of one architecture and several sizes, in the layout that all of them have.
    points = [
        (layout["bytes"], layout["ours_seconds"])
        for name, model in models.items()
        for tensor, layout in model["vllm_tensor_parallel"].items()
        if name.startswith("qwen2_") and tensor == "2"
    ]
    return {
        "ratio_to_best_peer": to_peer,
        "ratio_to_memcpy": to_memcpy,
        "second_sync_to_memcpy": second_sync,
        "ratio_to_memcpy_with_packing": min(layout["ratio_to_memcpy_with_packing"] for layout in layouts),
        "goals": {
            "ratio_to_best_peer": {"at_least": PEER_GOAL, "met": to_peer >= PEER_GOAL},
            "ratio_to_memcpy": {"at_least": MEMCPY_GOAL, "met": to_memcpy >= MEMCPY_GOAL},
            "second_sync_to_memcpy": {"at_most": SECOND_SYNC_GOAL, "met": second_sync <= SECOND_SYNC_GOAL},
        },
        "cost_against_bytes": fit_line(points),
        "models": models,
    }


def summarise_layout(sync: Mapping[str, Any], exports: Mapping[str, Any]) -> dict[str, Any]:
    """One model in one layout: medians of the repetitions after the first sync, the ratios, and the raw times."""

    def median(name: str) -> float:
        return statistics.median(sync[f"{name}_seconds"])

    ours = median("sync")
    verified = median("verified_sync")
    memcpy = median("memcpy")
    memcpy_in_two_pieces = median("memcpy_in_two_pieces")
    empty_sync = median("empty_sync")
    placing = median("placing")
    copying = median("placing_copying")
    summary: dict[str, Any] = {
        "bytes": sync["bytes"],
        "ours_seconds": ours,
        "ours_verified_seconds": verified,
        "verification_seconds": verified - ours,
        "memcpy_seconds": memcpy,
        "placing_seconds": placing,
        "empty_sync_seconds": empty_sync,
        "bound": {
            "calls_seconds": placing - copying,
            "copying_seconds": copying,
            "packing_seconds": median("sync_packing"),
        },
        "ratio_to_memcpy": memcpy / placing,
        "attainable_ratio_to_memcpy": memcpy / (memcpy_in_two_pieces + empty_sync),
        "ratio_to_memcpy_in_two_pieces": memcpy_in_two_pieces / placing,
        "ratio_to_memcpy_with_packing": memcpy / ours,
        "first_sync_to_memcpy": sync["first_sync_verified_seconds"] / memcpy,
        "second_sync_to_memcpy": placing / memcpy,
        "identical": sync["identical"],
        "extra_memory_bytes": sync["extra_memory_bytes"],
    }
    if exports:
        peers = {peer: peer_seconds(export, sync["loads"]) for peer, export in exports.items()}
        best_peer = min(peers, key=lambda peer: peers[peer]["seconds"])
        best_seconds = peers[best_peer]["seconds"]
        best_first_seconds = min(peer["first_seconds"] for peer in peers.values())
        summary |= {
            "peers": peers,
            "best_peer": best_peer,
            "ratio_to_best_peer": best_seconds / ours,
            "ratio_to_best_peer_verified": best_seconds / verified,
            "ratio_to_best_peer_first": best_first_seconds / sync["first_sync_verified_seconds"],
        }
    return summary | {"raw": sync}


def peer_seconds(export: Mapping[str, Any], loads: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """A peer's export plus vLLM's load and packing: medians, and the first time separately."""
    first_load, *later_loads = loads
    export_seconds = statistics.median(export["later_export_seconds"])
    load_seconds = statistics.median(load["load_seconds"] for load in later_loads)
    pack_seconds = statistics.median(load["pack_seconds"] for load in later_loads)
    return {
        "seconds": export_seconds + load_seconds + pack_seconds,
        "export_seconds": export_seconds,
        "load_seconds": load_seconds,
        "pack_seconds": pack_seconds,
        "first_seconds": export["first_export_seconds"] + first_load["load_seconds"] + first_load["pack_seconds"],
    }


def fit_line(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Least-squares line through (bytes, seconds).

    "largest_deviation" is that of the worst point, relative to its seconds.
    """
    sizes, seconds = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(sizes, seconds)
    return {
        "points": [{"bytes": n, "seconds": t, "gigabytes_per_second": n / t / 1e9} for n, t in points],
        "seconds_per_gigabyte": slope * 1e9,
        "seconds_at_zero_bytes": intercept,
        "largest_deviation": max(abs(intercept + slope * n - t) / t for n, t in points),
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """A table of the seconds and ratios of each model and layout, and one of the goals."""
    layouts = Table(
        "model",
        "TP →\nvLLM TP",
        "GB",
        "memcpy s",
        "ours s",
        "verified s",
        "best peer s",
        "÷ peer",
        "÷ memcpy\n(attainable)",
        "with\npacking",
        "calls, copying,\npacking ms",
        title="medians; ratios are the other's seconds over ours",
    )
    for name, model in result["models"].items():
        for tensor, layout in model["vllm_tensor_parallel"].items():
            peer = layout.get("best_peer")
            layouts.add_row(
                name,
                f"{layout['raw']['ranks']} → {tensor}",
                f"{layout['bytes'] / 1e9:.3f}",
                *(f"{layout[key]:.3f}" for key in ("memcpy_seconds", "ours_seconds", "ours_verified_seconds")),
                f"{layout['peers'][peer]['seconds']:.3f} ({peer})" if peer else "",
                f"{layout['ratio_to_best_peer']:.2f}" if peer else "",
                f"{layout['ratio_to_memcpy']:.2f} ({layout['attainable_ratio_to_memcpy']:.2f})",
                f"{layout['ratio_to_memcpy_with_packing']:.2f}",
                ", ".join(f"{1e3 * seconds:.0f}" for seconds in layout["bound"].values()),
            )
    goals = Table("", "goal", "worst of all rows", "met")
    for name, goal in result["goals"].items():
        bound = f"≥ {goal['at_least']}" if "at_least" in goal else f"≤ {goal['at_most']}"
        goals.add_row(name, bound, f"{result[name]:.2f}", "yes" if goal["met"] else "no")
    return [layouts, goals]


if __name__ == "__main__":
    main()
