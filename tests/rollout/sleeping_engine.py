"""``python -m tests.rollout.sleeping_engine SETTINGS SAMPLING FOLDER``: a vLLM that sleeps on a CPU, and whose sleep
leaves nothing defined.

A CPU's worker has no sleep. Here it has that of vLLM's GPU worker, over a fake of the allocator: what sleeps on a GPU
is filled with NaN. That is every tensor that is alive when the model has been loaded and was not before, whoever holds
it, and the key-value cache. What vLLM keeps on the host by itself (level 2: the model's buffers) comes back, as on a
GPU.

Trainer rank and engine are this one process. The results go to ``FOLDER/NAME.json``, by :data:`VARIANTS`.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.batch import TokenBatch
from megatron_ext.blocks import Shard
from rollout import engine_server
from rollout.engine import EngineSettings
from rollout.sampler import make_requests
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests.responses import make_prompt, plain
from tests.rollout import vllm_processes
from tests.rollout.speculating import count_drafts
from tests.rollout.twins import TIED, ShardMaker, tensor_parallel_shards

# vLLM's scheduling that is tested on a CPU otherwise, and the one that vLLM has on a GPU unless told not to;
# speculative decoding.
VARIANTS = ("synchronous", "asynchronous", "speculative")
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 180 for j in range(3 + 10 * i)]) for i in range(4)]


class UndefinedMemory:
    """A fake in the place of vLLM's ``SleepModeBackend``."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors

    def suspend(self, level: int) -> None:
        for tensor in self.tensors:
            tensor.detach().fill_(float("nan"))

    def resume(self, tags: list[str] | None) -> None:
        """The memory is there again, with what happens to be in it."""


def floating_tensors() -> dict[int, torch.Tensor]:
    """All that are alive and have memory, one for each storage."""
    tensors = {}
    for candidate in gc.get_objects():
        is_tensor = type(candidate) is torch.Tensor or isinstance(candidate, torch.nn.Parameter)
        if (
            is_tensor
            and candidate.is_floating_point()
            and not candidate.is_meta
            and candidate.untyped_storage().nbytes()
        ):
            tensors[candidate.untyped_storage()._cdata] = candidate
    return tensors


def make_cpu_workers_sleep() -> dict[int, torch.Tensor]:
    """From now on vLLM's CPU worker sleeps as its GPU worker does. Returns where the tensors of the model that is
    loaded next will be."""
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    for method in ("sleep", "wake_up"):
        setattr(CPUWorker, method, getattr(Worker, method))
    # A GPU's worker checks that sleeping freed memory. On a CPU this is the host's, which other processes take too.
    torch.accelerator.get_memory_info = lambda *device: (0, 0)
    of_the_model: dict[int, torch.Tensor] = {}

    def load_model(worker: Any, **options: Any) -> None:
        of_the_model.clear()
        before = floating_tensors()
        Worker.load_model(worker, **options)
        of_the_model.update({key: tensor for key, tensor in floating_tensors().items() if key not in before})

    CPUWorker.load_model = load_model
    return of_the_model


def schedule(asynchronous: bool) -> None:
    """From now on vLLM schedules so on a CPU, whose platform would refuse to do it asynchronously."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config.__func__

    def check_and_schedule(platform: Any, config: Any) -> None:
        check(platform, config)
        config.scheduler_config.async_scheduling = asynchronous

    CpuPlatform.check_and_update_config = classmethod(check_and_schedule)


def let_sleep(loop: engine_server.EngineLoop, of_the_model: dict[int, torch.Tensor]) -> None:
    """Give the engine of this process the fake of sleeping memory."""
    worker = loop.llm.model_executor.driver_worker.worker
    worker._sleep_mode_backend = UndefinedMemory([*of_the_model.values(), *worker.model_runner.kv_caches])
    loop.settings = replace(loop.settings, loads_weights=False, rollout=replace(loop.settings.rollout, sleep=True))


def fall_asleep_and_wake(loop: engine_server.EngineLoop, sync: Callable[[], object]) -> None:
    """As a run does it: the weights wake, a sync brings them, the key-value cache wakes."""
    worker = loop.llm.model_executor.driver_worker.worker
    model = worker.get_model()
    loop.between_batches(loop.sleep, None)
    assert all(tensor.isnan().all() for tensor in (*model.parameters(), *worker.model_runner.kv_caches))
    loop.between_batches(loop.wake, {"tags": ["weights"]})
    sync()
    loop.between_batches(loop.wake, {"tags": ["kv_cache"]})


def weight_sync_within(loop: engine_server.EngineLoop, shards: list[Shard], folder: Path) -> WeightSync:
    """From a trainer that is this process, too, in the process group that vLLM has made."""
    assert dist.group.WORLD is not None
    engines: list[Any] = [LocalEngine(loop)]
    return WeightSync(shards, engines, dist.group.WORLD, bucket_bytes=1 << 20, verify_every=1, plans=folder)


class LocalEngine:
    """The engine of this process in the place of one behind a socket, for a WeightSync."""

    def __init__(self, loop: engine_server.EngineLoop) -> None:
        self.loop = loop
        self.handlers = {
            "/weights/layout": loop.weights.layout,
            "/weights/plan": loop.weights.set_plan,
            "/weights/update": loop.weights.update,
        }

    def begin_call(self, method: str, path: str, body: Any) -> Callable[[], Any]:
        guard = self.loop.update_weights if path == "/weights/update" else self.loop.change_weights
        answer = guard(self.handlers[path], json.loads(json.dumps(body)))
        return lambda: json.loads(json.dumps(answer))


class Engine:
    """vLLM, and a trainer that has the weights of two seeds."""

    def __init__(self, settings: EngineSettings, sampling: Sampling, folder: Path, asynchronous: bool) -> None:
        of_the_model = make_cpu_workers_sleep()
        schedule(asynchronous)
        self.loop = engine_server.EngineLoop(settings, engine_server.build_llm_engine(settings))
        assert self.loop.llm.vllm_config.scheduler_config.async_scheduling == asynchronous
        self.sampling = sampling
        let_sleep(self.loop, of_the_model)
        self.maker: ShardMaker = tensor_parallel_shards(TIED, TIED.model(0).state_dict(), 1, 0, torch.float32)
        self.weight_sync = weight_sync_within(self.loop, self.maker.shards, folder)

    def sync(self, seed: int) -> None:
        self.maker.weights = TIED.model(seed).state_dict()
        self.maker.fill()
        self.weight_sync.sync(seed)

    def responses(self) -> list[Any]:
        requests = make_requests(PROMPTS, 2, seed=5, step=0)
        return [asdict(response) for response in plain(vllm_processes.generate(self.loop, requests, self.sampling))]

    def addresses(self) -> dict[str, int]:
        """Of all that a CUDA graph of the model would point at."""
        worker = self.loop.llm.model_executor.driver_worker.worker
        model = worker.get_model()
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors |= {f"cache {i}": cache for i, cache in enumerate(worker.model_runner.kv_caches)}
        return {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def state(self) -> dict[str, Any]:
        return {
            "digests": self.loop.weights.digest()["workers"],
            "responses": self.responses(),
            "addresses": self.addresses(),
        }


def run(engine: Engine) -> dict[str, Any]:
    """Sleep twice; break a batch off in the middle and sync at once, sleep at once; and generate in between."""
    engine.sync(0)
    results: dict[str, Any] = {"first": engine.state()}
    for time in ("once", "twice"):
        fall_asleep_and_wake(engine.loop, lambda: engine.sync(0))
        results[f"slept {time}"] = engine.state()
    break_off(engine)
    engine.sync(1)
    results["other"] = engine.state()
    break_off(engine)
    engine.sync(0)
    results["broken off"] = engine.state()
    break_off(engine)
    fall_asleep_and_wake(engine.loop, lambda: engine.sync(0))
    results["broken off and slept"] = engine.state()
    return results


def break_off(engine: Engine) -> None:
    """Drop a batch after three of vLLM's steps."""
    requests: TokenBatch = make_requests(PROMPTS, 2, seed=6, step=0)
    ids = engine.loop.add_batch(requests, engine.sampling, None, lambda message: None)
    for _ in range(3):
        engine.loop._step()
    engine.loop.abort(ids)
    assert not engine.loop.llm.has_unfinished_requests()


def variant(name: str, settings: EngineSettings, sampling: Sampling) -> tuple[EngineSettings, Sampling]:
    """Those of one of :data:`VARIANTS`. What is sampled coolly repeats tokens, after which something is drafted."""
    if name != "speculative":
        return settings, sampling
    speculative = replace(settings.rollout.speculative, method="ngram", lookup_min=1)
    return replace(settings, rollout=replace(settings.rollout, speculative=speculative)), replace(
        sampling, temperature=0.2
    )


def main(argument: str, given: str, folder: str) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    os.environ[engine_server.ENGINE_PID] = str(os.getpid())
    for name in VARIANTS:
        settings, sampling = variant(name, EngineSettings.from_json(argument), vllm_processes.sampling_from(given))
        engine = Engine(settings, sampling, Path(folder), asynchronous=name == "asynchronous")
        counts = count_drafts(engine.loop)
        Path(folder, f"{name}.json").write_text(json.dumps({**run(engine), "drafted": counts["drafted"]}))
        engine.loop.llm.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(*sys.argv[1:])
