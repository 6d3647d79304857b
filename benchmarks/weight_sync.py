"""The weight sync next to Megatron-Bridge's and mbridge's export with vLLM's load, and to a bare memcpy, on the CPU.

``python -m benchmarks.weight_sync`` writes ``benchmarks/results/weight_sync.json`` and prints its tables. It makes an
environment for each peer with uv (once; kept in ``build/benchmarks``), and the models. For each model, first the peers
export, each from its own trainer ranks; then our trainer ranks and one vLLM run, where a repetition is a peer's load,
a call that does nothing, a memcpy of the same bytes, a sync without packing, a whole one, and one with verification.
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table

from recipes.config import parse
from recipes.launch.prepare_model import prepare
from recipes.run import records

FOLDER = Path("build/benchmarks")
PEERS = Path("benchmarks/peers")
RESULT = Path("benchmarks/results/weight_sync.json")
PEER_GOAL = 5.0  # best peer's seconds / ours, at least
MEMCPY_GOAL = 0.8  # memcpy's seconds / ours, at least
SECOND_SYNC_GOAL = 1.0  # our second sync's seconds / memcpy's, at most
TIME_LIMIT = 480  # seconds for one group of ranks: it hangs

MEASURED = {
    "ours": "WeightSync.sync from the call to its end on all ranks: with vLLM's packing of linear layers for a CPU, "
    "without the verification by checksums (which no peer has; verified_sync_seconds are with it)",
    "placing": "the second sync behind a plan, whose workers do not pack, as none does on a GPU, behind a memcpy: "
    "ratio_to_memcpy and second_sync_to_memcpy are made of it, ratio_to_memcpy_with_packing of ours",
    "bound": "copying: of a placing, as the slowest worker times it; calls: its rest, with the collectives; packing: "
    "of ours",
    "peers": "export: all ranks iterate the peer's generator of full tensors to its end and drop them; load: vLLM's "
    "model.load_weights of the same tensors from shared memory, slowest worker, and the same packing. The sum of "
    "both: no disk, no process start, no hand-over, no remote call. The loads are the same for both peers",
    "empty_sync": "a barrier of the ranks, a call that does nothing on all of vLLM's workers, a barrier: what a sync "
    "of no bytes takes. attainable_ratio_to_memcpy is a memcpy's seconds over these and a memcpy's in two pieces",
    "memcpy": "the same number of bytes, from the parameters to memory touched before, a share per trainer rank, all "
    "ranks at once, while vLLM's workers are as idle as before a sync. The C library goes past the caches with pieces "
    "of more than 3/4 of the last one",
    "memcpy_in_two_pieces": "the same number of bytes, from one half of that memory to the other, twice: the C library "
    "goes past the caches, as it does for ours from 32 KiB on",
}


@dataclass(frozen=True)
class Case:
    """A model, the ranks of its trainers (ours and the peers', tensor parallel), vLLM's tensor-parallel sizes, and the
    repetitions behind the first sync, which is told apart: the shorter a sync, the more it varies."""

    name: str
    folder: str
    ranks: int
    vllm_tensor_parallel: tuple[int, ...]
    repetitions: int
    peers: bool


def cases(demo_folder: str) -> list[Case]:
    """SmolLM2 has 9 heads in 3 groups: the peers can't cut it over 2 ranks, so all run it on 3."""
    layers = {n: str(FOLDER / f"models/qwen2_{n}_layers") for n in (5, 10, 20)}
    return [
        Case("smollm2_135m", demo_folder, 3, (3, 1), 24, peers=True),
        Case("qwen2_20_layers", layers[20], 2, (2, 1), 8, peers=True),
        Case("qwen2_10_layers", layers[10], 2, (2,), 16, peers=False),
        Case("qwen2_5_layers", layers[5], 2, (2,), 24, peers=False),
    ]


def main() -> None:
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        demo = parse(compose("config", ["recipe=demo"])).model
    peers = ("megatron_bridge", "mbridge")
    pythons = {peer: environment(peer, FOLDER / peer) for peer in peers}
    prepare(demo)
    found = cases(demo.path)
    for case in found:
        random_model(Path(case.folder))
    shutil.rmtree(FOLDER / "weight_sync", ignore_errors=True)
    load = os.getloadavg()[0]
    exports: dict[str, Any] = {}
    syncs: dict[str, Any] = {}
    for case in found:
        exports[case.name], syncs[case.name] = run_case(case, pythons if case.peers else {})
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.weight_sync",
        **records.environment("cpu", max(case.ranks for case in found)),
        "peer_versions": {peer: exports[found[0].name][peer]["versions"] for peer in peers},
        "load_average_before": load,
        "measured": MEASURED,
        **summarise(exports, syncs),
    }
    RESULT.parent.mkdir(exist_ok=True)
    records.write_json(RESULT, result)
    Console(width=None if sys.stdout.isatty() else 140).print(*tables(result), f"{RESULT} has the raw times", sep="\n")


def say(text: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {text}", flush=True)


def environment(peer: str, folder: Path) -> Path:
    """The interpreter of the environment with exactly the packages of ``peers/<peer>.txt``; made if it has others."""
    pins, stamp = PEERS / f"{peer}.txt", folder / "installed.txt"
    python = folder / "bin/python"
    if stamp.is_file() and stamp.read_text() == pins.read_text():
        return python
    say(f"making the environment of {peer} in {folder} (minutes the first time)")
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True)
    # Without dependencies: both ask for packages that need a GPU's compiler. The list is complete. And without the
    # project's own settings for uv, which take torch's version from its pins.
    command = [uv, "pip", "install", "--quiet", "--no-config", "--python", str(python), "--no-deps", "-r", str(pins)]
    subprocess.run(command, check=True)
    stamp.write_text(pins.read_text())
    return python


def random_model(folder: Path) -> None:
    """Make ``folder`` when it is one of the random models and absent."""
    if folder.name.startswith("qwen2_") and not folder.is_dir():
        say(f"making {folder}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        layers = folder.name.split("_")[1]
        module = "benchmarks.peers.random_model"
        subprocess.run([sys.executable, "-m", module, layers, str(folder)], check=True, stderr=subprocess.DEVNULL)


def run_case(case: Case, pythons: Mapping[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The peers' exports, each in its environment, then ours with the peers' loads: raw answers."""
    folder = FOLDER / "weight_sync" / case.name
    folder.mkdir(parents=True)
    size = sum(file.stat().st_size for file in Path(case.folder).glob("*.safetensors")) + 2**20  # and alignment
    memory = os.memfd_create("exported")
    os.ftruncate(memory, size)
    exports = {}
    settings: dict[str, Any] = {"model": case.folder, "repetitions": case.repetitions}
    for peer, python in pythons.items():
        say(f"{case.name}: {peer} exports on {case.ranks} ranks")
        own = settings | {"memory": memory, "output": str(folder / f"{peer}.json")}
        command = [str(python), "-m", "benchmarks.peers.exporter", peer, json.dumps(own)]
        run_ranks(command, case.ranks, folder / f"{peer}.log", keep=(memory,))
        exports[peer] = json.loads(Path(own["output"]).read_text())
    exported = None
    if exports:  # the last peer's tensors are in the memory; both were compared with the checkpoint
        exported = {"pid": os.getpid(), "fd": memory, "bytes": size, "tensors": exports[peer]["tensors"]}
    tensor = ", ".join(map(str, case.vllm_tensor_parallel))
    say(f"{case.name}: weight sync on {case.ranks} ranks, vLLM at tensor parallel {tensor}")
    own = settings | {
        "exported": exported,
        "vllm_tensor_parallel": case.vllm_tensor_parallel,
        "output": str(folder / "ours.json"),
        "logs": str(folder),
        "plans": str(folder / "plans"),
    }
    run_ranks([sys.executable, "-m", "benchmarks.measured_sync", json.dumps(own)], case.ranks, folder / "ours.log")
    os.close(memory)
    return exports, json.loads(Path(own["output"]).read_text())


def run_ranks(command: list[str], ranks: int, log: Path, keep: Sequence[int] = ()) -> None:
    """Run ``command`` once per rank, with torchrun's variables and file descriptors ``keep``; output goes to ``log``.

    Raises RuntimeError with the log's end when a rank fails or TIME_LIMIT passes; no rank is left behind.
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
        with log.open("wb") as output:
            for rank in range(ranks):
                env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=env, stdout=output, stderr=output, pass_fds=keep))
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.poll() for process in processes):
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()  # nothing to a process that has ended
            process.wait()
    if any(process.returncode for process in processes):
        raise RuntimeError(
            f"a rank failed or took over {TIME_LIMIT} s:\n{log.read_text(errors='replace')[-4000:]}\n({log})"
        )


def summarise(exports: Mapping[str, Any], syncs: Mapping[str, Any]) -> dict[str, Any]:
    """Medians and ratios of every model and layout, and the worst ratios of all: what the goals are held against.

    Args:
        exports: model → peer → the exporter's answer; no peer for a model that only shows the cost against bytes.
        syncs: model → vLLM's tensor-parallel size → the answer of ``measured_sync``.
    """
    models: dict[str, Any] = {
        model: {
            "peer_exports": {
                peer: {name: value for name, value in export.items() if name not in ("tensors", "versions")}
                for peer, export in exports[model].items()
            },
            "vllm_tensor_parallel": {tensor: layout(sync, exports[model]) for tensor, sync in by_tensor.items()},
        }
        for model, by_tensor in syncs.items()
    }
    layouts = [found for model in models.values() for found in model["vllm_tensor_parallel"].values()]
    to_peer = min(found["ratio_to_best_peer"] for found in layouts if "ratio_to_best_peer" in found)
    to_memcpy = min(found["ratio_to_memcpy"] for found in layouts)
    second = max(found["second_sync_to_memcpy"] for found in layouts)
    sizes = [
        (found["bytes"], found["ours_seconds"])
        for name, model in models.items()
        for tensor, found in model["vllm_tensor_parallel"].items()
        if name.startswith("qwen2_") and tensor == "2"
    ]
    return {
        "ratio_to_best_peer": to_peer,
        "ratio_to_memcpy": to_memcpy,
        "second_sync_to_memcpy": second,
        "ratio_to_memcpy_with_packing": min(found["ratio_to_memcpy_with_packing"] for found in layouts),
        "goals": {
            "ratio_to_best_peer": {"at_least": PEER_GOAL, "met": to_peer >= PEER_GOAL},
            "ratio_to_memcpy": {"at_least": MEMCPY_GOAL, "met": to_memcpy >= MEMCPY_GOAL},
            "second_sync_to_memcpy": {"at_most": SECOND_SYNC_GOAL, "met": second <= SECOND_SYNC_GOAL},
        },
        "cost_against_bytes": line(sizes),
        "models": models,
    }


def layout(sync: Mapping[str, Any], exports: Mapping[str, Any]) -> dict[str, Any]:
    """One model in one layout: medians of the later repetitions, the ratios, and the raw times."""

    def median(name: str) -> float:
        return statistics.median(sync[f"{name}_seconds"])

    ours, verified, memcpy = median("sync"), median("verified_sync"), median("memcpy")
    in_two_pieces, empty = median("memcpy_in_two_pieces"), median("empty_sync")
    placing, copying = median("placing"), median("placing_copying")
    found: dict[str, Any] = {
        "bytes": sync["bytes"],
        "ours_seconds": ours,
        "ours_verified_seconds": verified,
        "verification_seconds": verified - ours,
        "memcpy_seconds": memcpy,
        "placing_seconds": placing,
        "empty_sync_seconds": empty,
        "bound": {
            "calls_seconds": placing - copying,
            "copying_seconds": copying,
            "packing_seconds": median("sync_packing"),
        },
        "ratio_to_memcpy": memcpy / placing,
        "attainable_ratio_to_memcpy": memcpy / (in_two_pieces + empty),
        "ratio_to_memcpy_in_two_pieces": in_two_pieces / placing,
        "ratio_to_memcpy_with_packing": memcpy / ours,
        "first_sync_to_memcpy": sync["first_sync_verified_seconds"] / memcpy,
        "second_sync_to_memcpy": placing / memcpy,
        "identical": sync["identical"],
        "extra_memory_bytes": sync["extra_memory_bytes"],
    }
    if exports:
        first, *later = sync["loads"]
        load, pack = (statistics.median(each[f"{name}_seconds"] for each in later) for name in ("load", "pack"))
        found["peers"] = {
            peer: {
                "seconds": statistics.median(export["later_export_seconds"]) + load + pack,
                "export_seconds": statistics.median(export["later_export_seconds"]),
                "load_seconds": load,
                "pack_seconds": pack,
                "first_seconds": export["first_export_seconds"] + first["load_seconds"] + first["pack_seconds"],
            }
            for peer, export in exports.items()
        }
        best = min(found["peers"], key=lambda peer: found["peers"][peer]["seconds"])
        seconds = found["peers"][best]["seconds"]
        found |= {
            "best_peer": best,
            "ratio_to_best_peer": seconds / ours,
            "ratio_to_best_peer_verified": seconds / verified,
            "ratio_to_best_peer_first": min(p["first_seconds"] for p in found["peers"].values())
            / sync["first_sync_verified_seconds"],
        }
    return found | {"raw": sync}


def line(points: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Least squares of seconds against bytes, and how far the worst point is from it, as a share of its seconds."""
    sizes, seconds = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(sizes, seconds)
    return {
        "points": [{"bytes": n, "seconds": t, "gigabytes_per_second": n / t / 1e9} for n, t in points],
        "seconds_per_gigabyte": slope * 1e9,
        "seconds_at_zero_bytes": intercept,
        "largest_deviation": max(abs(intercept + slope * n - t) / t for n, t in points),
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Seconds and ratios of each model and layout; the goals."""
    shown = Table(
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
    )
    shown.title = "medians; ratios are the other's seconds over ours"
    for name, model in result["models"].items():
        for tensor, found in model["vllm_tensor_parallel"].items():
            peer = found.get("best_peer")
            shown.add_row(
                name,
                f"{found['raw']['ranks']} → {tensor}",
                f"{found['bytes'] / 1e9:.3f}",
                *(f"{found[key]:.3f}" for key in ("memcpy_seconds", "ours_seconds", "ours_verified_seconds")),
                f"{found['peers'][peer]['seconds']:.3f} ({peer})" if peer else "",
                f"{found['ratio_to_best_peer']:.2f}" if peer else "",
                f"{found['ratio_to_memcpy']:.2f} ({found['attainable_ratio_to_memcpy']:.2f})",
                f"{found['ratio_to_memcpy_with_packing']:.2f}",
                ", ".join(f"{1e3 * seconds:.0f}" for seconds in found["bound"].values()),
            )
    goals = Table("", "goal", "found (worst of all rows)", "met")
    for name, goal in result["goals"].items():
        bound = f"≥ {goal['at_least']}" if "at_least" in goal else f"≤ {goal['at_most']}"
        goals.add_row(name, bound, f"{result[name]:.2f}", "yes" if goal["met"] else "no")
    return [shown, goals]


if __name__ == "__main__":
    main()
