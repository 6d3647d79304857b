"""One trainer rank of ``benchmarks.weight_sync``: runs the weight sync, and beside each a memcpy and a load.

``python -m benchmarks.measured_sync SETTINGS_JSON`` with torchrun's variables. Rank 0 starts the engine and writes the
answer to the file ``output`` of the settings.
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
NEVER = 2**62  # syncs from one verification to the next
POLL_SECONDS = 0.02
IDLE_SECONDS = 0.5  # a sync comes behind a training step: whoever was busy with a call before is idle by then


@cache
def demo() -> Config:
    """The demo's settings, for what a benchmark does not set."""
    with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
        return parse(compose("config", ["recipe=demo"]))


def start_engine(model: str, tensor_parallel_size: int, log: Path) -> Engine:
    """An engine of the project, as ``benchmarks.peers.engine`` extends it; all its workers share the cores."""
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

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([word.replace("rollout.engine_server", "benchmarks.peers.engine") for word in command], **options)

    with mock.patch.object(engines.subprocess, "Popen", start):
        return Engine(settings, log)


class MemoryWatch:
    """Peak memory of processes over that at the start, from /proc, by a thread that looks every 20 ms.

    Of a trainer's process all resident pages count but those of files: its parameters move into shared memory. Of an
    engine's only the anonymous ones: what it maps of the trainer's memory is no memory of its own.
    """

    def __init__(self, trainers: Sequence[int], workers: Sequence[int]) -> None:
        self.fields = dict.fromkeys(trainers, ("RssAnon", "RssShmem")) | dict.fromkeys(workers, ("RssAnon",))
        self.start = {pid: self._now(pid) for pid in self.fields}
        self.peak = dict(self.start)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def stop(self) -> dict[int, int]:
        """Process id → bytes."""
        self.ended.set()
        self.thread.join()
        return {pid: self.peak[pid] - self.start[pid] for pid in self.fields}

    def _run(self) -> None:
        while not self.ended.wait(POLL_SECONDS):
            for pid in self.fields:
                self.peak[pid] = max(self.peak[pid], self._now(pid))

    def _now(self, pid: int) -> int:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        values = {name: value for name, _, value in (line.partition(":") for line in lines)}
        return sum(int(values[field].split()[0]) for field in self.fields[pid]) * 1024


def process_tree(pid: int) -> list[int]:
    """``pid`` and all its descendants."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]
    return [pid, *(found for child in children for found in process_tree(child))]


class Trainer:
    """A rank with the model's shards and no gradients or optimizer: a sync needs none."""

    def __init__(self, model: str) -> None:
        import torch
        import torch.distributed as dist

        from megatron_ext import hf_checkpoint, parallel
        from megatron_ext import model as models
        from megatron_ext.models import family
        from megatron_ext.weight_map import sharding_of, shards

        dist.init_process_group("gloo")
        sizes = replace(
            demo().parallel, tensor=dist.get_world_size(), sequence=False, recompute="none", distributed_optimizer=False
        )
        precision = replace(demo().precision, name="bf16")
        place = parallel.initialize(sizes, seed=0, timeout_seconds=600)
        self.control, self.ranks, self.rank = parallel.control_group(), dist.get_world_size(), dist.get_rank()
        config = hf_checkpoint.config(model)
        arch = family(config.architectures[0])
        sharding = sharding_of(config, self.ranks, place.tensor_rank)
        text = models.language_config(arch, config, sharding, sizes, precision)
        module = models.build_chunk(config, text, place, frozen=(), stage=0).to(torch.bfloat16)
        self.shards = shards([module], arch.param_mappings(config, self.ranks, place.tensor_rank))
        hf_checkpoint.load(self.shards, model)
        self.tensors = [shard.tensor.detach() for shard in self.shards]

    def negate(self) -> None:
        """New weights, of which two in a row are the old ones, to the bit."""
        for tensor in self.tensors:
            tensor.neg_()

    def timed(self, function: Callable[[], Any]) -> float:
        """Seconds until ``function`` has ended on every rank."""
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
    """Collective. All raw times of one engine layout, in seconds; ``engine`` on rank 0.

    The engine starts with random weights. A peer's load fills it first; our syncs bring the negative of the
    checkpoint's weights and the weights themselves in turn, and the last, behind a negative, brings them again: equal
    digests then say that both sides wrote every bit. In each repetition there is a new plan and a sync, and the sync
    without packing is the second one of the plan.
    """
    import torch

    from benchmarks.memcpy import copy_bytes
    from megatron_ext.collectives import all_gather_json
    from rollout.weight_sync.sync import WeightSync

    def load() -> dict[str, Any] | None:
        if settings["exported"] is None:
            return None
        body = {"exported": settings["exported"]}
        return trainer.on_rank_zero(lambda: engine.call("POST", "/weights/update", body))  # type: ignore[union-attr]

    def digests() -> list[dict[str, str]]:
        return trainer.on_rank_zero(lambda: engine.call("GET", "/weights/digest"))["workers"]  # type: ignore[union-attr]

    @contextmanager
    def watched(phase: str) -> Iterator[None]:
        watch = MemoryWatch(pids, process_tree(engine.pid)) if engine else None
        yield
        if watch:
            found = watch.stop()
            memory[phase] = {
                "trainer_rank": max(size for pid, size in found.items() if pid in pids),
                "engine_worker": max(size for pid, size in found.items() if pid not in pids),
            }

    pids = all_gather_json(os.getpid(), trainer.control)
    memory: dict[str, Any] = {}
    loads = [load()]
    wanted = digests() if loads[0] else None
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
        planned = time.perf_counter() - started
        first = weight_sync.sync(0)

    def empty_sync() -> None:
        """All ranks are here, each worker of the engine is called and answers, all ranks hear of it."""
        torch.distributed.barrier(trainer.control)
        if engine:
            engine.call("POST", "/weights/update", {"nothing": True})

    def packs(whether: bool) -> None:
        """Whether later syncs pack; all ranks go on behind it."""
        trainer.on_rank_zero(lambda: engine.call("POST", "/weights/update", {"packs": whether}))  # type: ignore[union-attr]

    changed = wanted is None or digests() != wanted
    size = first["bytes"] // trainer.ranks
    target = torch.zeros(size, dtype=torch.uint8)
    half = size // 2
    copies, streams, empty, placings, syncs, verified = [], [], [], [], [], []
    versions = count(1)
    for _ in range(settings["repetitions"]):
        loads.append(load())
        trainer.negate()
        weight_sync.attach(weight_sync.engines)
        weight_sync.sync(next(versions))
        trainer.negate()
        packs(False)
        time.sleep(IDLE_SECONDS)
        empty.append(trainer.timed(empty_sync))
        time.sleep(IDLE_SECONDS)
        streams.append(trainer.timed(lambda: [copy_bytes([target[:half]], target[half:]) for _ in range(2)]))
        copies.append(trainer.timed(lambda: copy_bytes(trainer.tensors, target)))  # and all ranks are here
        placings.append(weight_sync.sync(next(versions)))
        packs(True)
        time.sleep(IDLE_SECONDS)
        syncs.append(weight_sync.sync(next(versions)))
        weight_sync.verify_every = 1
        verified.append(weight_sync.sync(next(versions))["seconds"])
        weight_sync.verify_every = NEVER
    trainer.negate()
    with watched("later_sync"):
        weight_sync.sync(next(versions))
    identical = None if wanted is None else changed and digests() == wanted
    return {
        "ranks": trainer.ranks,
        "bytes": first["bytes"],
        "plan_seconds": planned,
        "first_sync_verified_seconds": first["seconds"],
        "sync_seconds": [sync["seconds"] for sync in syncs],
        "placing_seconds": [sync["seconds"] for sync in placings],
        "placing_copying_seconds": [sync["copying_seconds"] for sync in placings],
        "sync_packing_seconds": [sync["packing_seconds"] for sync in syncs],
        "verified_sync_seconds": verified,
        "memcpy_seconds": copies,
        "memcpy_in_two_pieces_seconds": streams,
        "empty_sync_seconds": empty,
        "loads": None if loads[0] is None else loads,
        "identical": identical,
        "extra_memory_bytes": memory,
    }


def main() -> None:
    settings = json.loads(sys.argv[1])
    rank, logs = int(os.environ["RANK"]), Path(settings["logs"])

    def start(tensor: int) -> Engine | None:
        return start_engine(settings["model"], tensor, logs / f"engine_tp{tensor}.log") if rank == 0 else None

    layouts = settings["vllm_tensor_parallel"]
    engine = start(layouts[0])  # vLLM starts while this process imports Megatron-Core

    from megatron_ext import platform

    platform.activate("cpu")
    trainer = Trainer(settings["model"])
    answers = {}
    for i, tensor in enumerate(layouts):
        engine = engine if i == 0 else start(tensor)
        trainer.on_rank_zero(lambda: engine.wait_until_ready(time.monotonic() + 300))  # type: ignore[union-attr] # noqa: B023
        answers[str(tensor)] = measure(trainer, engine, settings, Path(settings["plans"]))
        if engine:
            engine.stop()
    if rank == 0:
        Path(settings["output"]).write_text(json.dumps(answers))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads would outlive the interpreter


if __name__ == "__main__":
    main()
