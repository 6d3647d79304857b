"""One trainer rank of ``benchmarks.weight_sync``: times weight syncs, each next to a memcpy and a peer's load.

Run ``python -m benchmarks.measured_sync SETTINGS_JSON`` with torchrun's variables. Rank 0 starts the engine and writes
the answer to the file that the setting ``output`` names.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir

from recipes.config import Config, parse
from rollout import engine as engines
from rollout.engine import Engine, EngineSettings

BUCKET_BYTES = 512 << 20
NEVER = 2**62  # as verify_every, larger than any number of syncs
POLL_SECONDS = 0.02
IDLE_SECONDS = 0.5  # before a measurement, because in a run all processes are idle when a sync follows a training step


@cache
def demo() -> Config:
    """The demo's configuration, for all settings that the benchmark does not change."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return parse(compose("config", ["recipe=demo"]))


def start_engine(model: str, tensor_parallel_size: int, log: Path) -> Engine:
    """Start an engine whose server is ``benchmarks.peers.engine``. Its workers share the cores."""
    rollout = replace(
        demo().rollout,
        tensor=tensor_parallel_size,
        max_num_seqs=4,
        max_num_batched_tokens=128,
        kv_cache_gib=0.1,
        threads=max(len(os.sched_getaffinity(0)) // tensor_parallel_size, 1),
    )
    settings = EngineSettings(rollout, model, dtype="bfloat16", max_model_len=128, platform="cpu")
    popen = subprocess.Popen

    def start_peers_engine(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        command = [word.replace("rollout.engine_server", "benchmarks.peers.engine") for word in command]
        return popen(command, **options)

    with mock.patch.object(engines.subprocess, "Popen", start_peers_engine):
        return Engine(settings, log)


class MemoryWatch:
    """Peak memory of processes above their memory at the start. A thread reads /proc every 20 ms.

    A trainer's process counts with its anonymous and shared pages, because its parameters move into shared memory. An
    engine's process counts with its anonymous pages only: the trainer's memory that it maps is not its own.
    """

    def __init__(self, trainers: Sequence[int], workers: Sequence[int]) -> None:
        self.fields = dict.fromkeys(trainers, ("RssAnon", "RssShmem")) | dict.fromkeys(workers, ("RssAnon",))
        self.start = {pid: self._memory(pid) for pid in self.fields}
        self.peak = dict(self.start)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> dict[int, int]:
        """Process id → bytes."""
        self.ended.set()
        self.thread.join()
        self._read()
        return {pid: self.peak[pid] - self.start[pid] for pid in self.fields}

    def _run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        for pid in self.fields:
            self.peak[pid] = max(self.peak[pid], self._memory(pid))

    def _memory(self, pid: int) -> int:
        """Bytes that the process uses now."""
        kibibytes = 0
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in self.fields[pid]:
                kibibytes += int(value.split()[0])
        return kibibytes * 1024


def process_tree(pid: int) -> list[int]:
    """``pid`` and the process ids of all its descendants."""
    pids = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):  # one file for each thread of the process
        for child in children.read_text().split():
            pids += process_tree(int(child))
    return pids


class Trainer:
    """A rank with its shards of the model. It has no gradients and no optimizer, which a sync does not need."""

    def __init__(self, model: str) -> None:
        import torch
        import torch.distributed as dist

        from megatron_ext import hf_checkpoint, parallel
        from megatron_ext import model as models
        from megatron_ext.models import family
        from megatron_ext.weight_map import sharding_of, shards

        dist.init_process_group("gloo")
        self.ranks = dist.get_world_size()
        parallel_config = replace(
            demo().parallel, tensor=self.ranks, sequence=False, recompute="none", distributed_optimizer=False
        )
        precision = replace(demo().precision, name="bf16")
        layout = parallel.initialize(parallel_config, seed=0, timeout_seconds=600)
        self.control = parallel.control_group()
        config = hf_checkpoint.config(model)
        model_family = family(config.architectures[0])
        sharding = sharding_of(config, self.ranks, layout.tensor_rank)
        language_config = models.language_config(model_family, config, sharding, parallel_config, precision, stage=0)
        module = models.build_chunk(config, language_config, layout, frozen=(), stage=0).to(torch.bfloat16)
        self.shards = shards([module], model_family.param_mappings(config, self.ranks, layout.tensor_rank))
        hf_checkpoint.load(self.shards, model)
        self.tensors = [shard.tensor.detach() for shard in self.shards]

    def negate(self) -> None:
        """Change every weight. Two calls restore the weights exactly."""
        for tensor in self.tensors:
            tensor.neg_()

    def timed(self, function: Callable[[], Any]) -> float:
        """Seconds until ``function`` has returned on every rank."""
        import torch.distributed as dist

        dist.barrier(self.control)
        started = time.perf_counter()
        function()
        dist.barrier(self.control)
        return time.perf_counter() - started

    def on_rank_zero(self, function: Callable[[], Any]) -> Any:
        from megatron_ext.collectives import from_rank_zero

        return from_rank_zero(function, self.control)


def measure(trainer: Trainer, engine: Engine | None, settings: dict[str, Any], plans: Path) -> dict[str, Any]:
    """Collective. All raw times, in seconds, of one tensor-parallel size of the engine, which exists on rank 0 only.

    The engine starts with random weights. A peer's load writes the checkpoint's weights first. Our syncs then write
    their negatives and the weights themselves in turn. The last sync writes the weights after a sync of the negatives.
    If the digests then equal those after the peer's load, both sides wrote the same bits everywhere. Each repetition
    makes a new plan with a first sync. The sync without packing is the plan's second one.
    """
    import torch

    from benchmarks.memcpy import copy_bytes
    from megatron_ext.collectives import all_gather_json
    from rollout.weight_sync.sync import WeightSync

    def update_engine(body: dict[str, Any]) -> Any:
        return trainer.on_rank_zero(lambda: engine.call("POST", "/weights/update", body))  # type: ignore[union-attr]

    def load() -> dict[str, Any] | None:
        """Load the peer's tensors, if there are any."""
        if settings["exported"] is None:
            return None
        return update_engine({"exported": settings["exported"]})

    def set_packing(packs: bool) -> None:
        """Set whether later syncs pack the linear layers."""
        update_engine({"packs": packs})

    def digests() -> list[dict[str, str]]:
        return trainer.on_rank_zero(lambda: engine.call("GET", "/weights/digest"))["workers"]  # type: ignore[union-attr]

    def empty_sync() -> None:
        """Do what a sync does besides its copies: a barrier of the ranks and a call to each engine worker."""
        torch.distributed.barrier(trainer.control)
        if engine:
            engine.call("POST", "/weights/update", {"nothing": True})

    pids = all_gather_json(os.getpid(), trainer.control)
    extra_memory: dict[str, Any] = {}

    @contextmanager
    def watched(phase: str) -> Iterator[None]:
        """Record the extra memory of the processes, on the rank that has the engine."""
        watch = MemoryWatch(pids, process_tree(engine.pid)) if engine else None
        yield
        if watch:
            peaks = watch.stop()
            extra_memory[phase] = {
                "trainer_rank": max(size for pid, size in peaks.items() if pid in pids),
                "engine_worker": max(size for pid, size in peaks.items() if pid not in pids),
            }

    loads = [load()]
    digests_after_load = digests() if loads[0] else None
    trainer.negate()
    started = time.perf_counter()
    with watched("plan_and_first_sync"):
        weight_sync = WeightSync(
            trainer.shards,
            [engine] if engine else [],
            trainer.control,
            bucket_bytes=BUCKET_BYTES,
            verify_every=NEVER,
            plans=plans,
        )
        plan_seconds = time.perf_counter() - started
        first_sync = weight_sync.sync(0)
    first_sync_changed_weights = digests_after_load is None or digests() != digests_after_load

    bytes_per_rank = first_sync["bytes"] // trainer.ranks
    target = torch.zeros(bytes_per_rank, dtype=torch.uint8)  # touches the pages
    first_half = target[: bytes_per_rank // 2]
    second_half = target[bytes_per_rank // 2 :]

    def memcpy() -> None:
        copy_bytes(trainer.tensors, target)

    def memcpy_in_two_pieces() -> None:
        for _ in range(2):
            copy_bytes([first_half], second_half)

    memcpy_seconds = []
    two_pieces_seconds = []
    empty_sync_seconds = []
    placings = []
    syncs = []
    verified_syncs = []
    versions = count(1)
    for _ in range(settings["repetitions"]):
        loads.append(load())
        # A new plan, and its first sync.
        trainer.negate()
        weight_sync.attach(weight_sync.engines)
        weight_sync.sync(next(versions))
        # Its second sync, without packing.
        trainer.negate()
        set_packing(False)
        time.sleep(IDLE_SECONDS)
        empty_sync_seconds.append(trainer.timed(empty_sync))
        time.sleep(IDLE_SECONDS)
        two_pieces_seconds.append(trainer.timed(memcpy_in_two_pieces))
        memcpy_seconds.append(trainer.timed(memcpy))
        placings.append(weight_sync.sync(next(versions)))
        set_packing(True)
        time.sleep(IDLE_SECONDS)
        syncs.append(weight_sync.sync(next(versions)))
        weight_sync.verify_every = 1
        verified_syncs.append(weight_sync.sync(next(versions)))
        weight_sync.verify_every = NEVER
    trainer.negate()
    with watched("later_sync"):
        weight_sync.sync(next(versions))
    identical = None
    if digests_after_load is not None:
        identical = first_sync_changed_weights and digests() == digests_after_load
    return {
        "ranks": trainer.ranks,
        "bytes": first_sync["bytes"],
        "plan_seconds": plan_seconds,
        "first_sync_verified_seconds": first_sync["seconds"],
        "sync_seconds": [sync["seconds"] for sync in syncs],
        "placing_seconds": [sync["seconds"] for sync in placings],
        "placing_copying_seconds": [sync["copying_seconds"] for sync in placings],
        "sync_packing_seconds": [sync["packing_seconds"] for sync in syncs],
        "verified_sync_seconds": [sync["seconds"] for sync in verified_syncs],
        "memcpy_seconds": memcpy_seconds,
        "memcpy_in_two_pieces_seconds": two_pieces_seconds,
        "empty_sync_seconds": empty_sync_seconds,
        "loads": None if loads[0] is None else loads,
        "identical": identical,
        "extra_memory_bytes": extra_memory,
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank = int(os.environ["RANK"])
    logs = Path(settings["logs"])

    def start(tensor_parallel_size: int) -> Engine | None:
        if rank != 0:
            return None
        return start_engine(settings["model"], tensor_parallel_size, logs / f"engine_tp{tensor_parallel_size}.log")

    def wait_until_ready(engine: Engine | None) -> None:
        trainer.on_rank_zero(lambda: engine.wait_until_ready(time.monotonic() + 300))  # type: ignore[union-attr]

    first_size, *other_sizes = settings["vllm_tensor_parallel"]
    engine = start(first_size)  # vLLM starts while this process imports Megatron-Core

    from megatron_ext import platform

    platform.activate("cpu")
    trainer = Trainer(settings["model"])
    answers = {}
    for tensor_parallel_size in (first_size, *other_sizes):
        if tensor_parallel_size in other_sizes:
            engine = start(tensor_parallel_size)
        wait_until_ready(engine)
        answers[str(tensor_parallel_size)] = measure(trainer, engine, settings, Path(settings["plans"]))
        if engine:
            engine.stop()
    if rank == 0:
        Path(settings["output"]).write_text(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would outlive the interpreter


if __name__ == "__main__":
    main()
