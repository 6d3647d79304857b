"""vLLM's sleep mode on the GPU: memory goes and comes back, and only a sync makes the engine usable again."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ext import hf_checkpoint, model, parallel
from rollout.engine import Engine, EngineError, stop_engines
from rollout.sampler import generate
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests.gpu.conftest import tiny_engine
from tests.responses import PlainResponse, make_prompt, plain
from tests.settings import precision_config

KV_CACHE_GIB = 4.0
SAMPLING = Sampling(max_tokens=16, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [3 + (7 * i + j) % 200 for j in range(3 + 10 * i)]) for i in range(4)]


@pytest.fixture(scope="module")
def rollout(layout: parallel.Parallel, folder: Path, tmp_path_factory: pytest.TempPathFactory):
    """An engine that may sleep and the weight sync to it, after a sync; what its process keeps of the GPU beside
    weights and cache, in GiB."""
    settings = tiny_engine(folder, kv_cache_gib=KV_CACHE_GIB, sleep=True)
    home = tmp_path_factory.mktemp("sleep")
    policy = model.build(hf_checkpoint.config(folder), layout, precision_config())
    hf_checkpoint.load(policy.shards, folder)
    without_engine = free_gib()
    engine = Engine(settings, home / "engine_0.log")
    try:
        engine.wait_until_ready(time.monotonic() + 400)
        group = parallel.control_group()
        weight_sync = WeightSync(
            policy.shards, [engine], group, bucket_bytes=1 << 20, verify_every=1, plans=home / "plans"
        )
        weight_sync.sync(1)
        weights_gib = sum(shard.tensor.nbytes for shard in policy.shards) / 2**30
        yield engine, weight_sync, without_engine - free_gib() - KV_CACHE_GIB - weights_gib
    finally:
        stop_engines([engine])


def responses(engine: Engine) -> list[PlainResponse]:
    return plain(generate([engine], PROMPTS, SAMPLING, samples_per_prompt=2, seed=5, step=0))


# The smallest segment that torch's allocator takes from the device for a tensor of more than 1 MiB: what is lost at
# each cycle takes at least one.
SEGMENT_GIB = 20 / 1024


def seconds_of(engine: Engine, path: str, body: dict[str, list[str]]) -> float:
    started = time.monotonic()
    engine.call("POST", path, body)
    return time.monotonic() - started


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30


def test_a_sleeping_engine_gives_its_memory_back_and_wakes_to_the_same_bits(
    rollout: tuple[Engine, WeightSync, float], record_property: Callable[[str, object], None]
) -> None:
    """Three times: sleep, wake the weights, sync, wake the key-value cache. No memory is lost on the way, but for
    workspaces that the first time creates."""
    engine, weight_sync, process_gib = rollout
    record_property("engine_process_gib", process_gib)
    before = responses(engine)
    awake = free_gib()
    left = []
    switches = []
    for _ in range(3):
        switch_s = seconds_of(engine, "/sleep", {})
        assert free_gib() - awake > 0.95 * KV_CACHE_GIB
        with pytest.raises(EngineError, match="asleep: kv_cache, weights"):
            responses(engine)
        switch_s += seconds_of(engine, "/wake", {"tags": ["weights"]})
        assert free_gib() - awake > 0.9 * KV_CACHE_GIB, "the cache sleeps while the weights arrive"
        weight_sync.sync(1)
        with pytest.raises(EngineError, match="asleep: kv_cache"):
            responses(engine)
        switch_s += seconds_of(engine, "/wake", {"tags": ["kv_cache"]})
        switches.append(switch_s)
        assert responses(engine) == before
        left.append(free_gib())
    record_property("switch_s", min(switches))
    assert left[0] - left[-1] < SEGMENT_GIB


def test_weights_that_sleep_are_not_synced_and_without_a_sync_not_used(
    rollout: tuple[Engine, WeightSync, float],
) -> None:
    engine, weight_sync, _ = rollout
    engine.call("POST", "/sleep", {})
    with pytest.raises(EngineError, match="the weights are asleep"):
        engine.call("GET", "/weights/checksum")
    engine.call("POST", "/wake", {"tags": ["weights", "kv_cache"]})
    with pytest.raises(EngineError, match="the weights are stale"):
        responses(engine)
    weight_sync.sync(1)
    assert len(responses(engine)) == 8
