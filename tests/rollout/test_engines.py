"""Two vLLM replicas on the CPU in FP32, fed by one trainer rank: shared prompts, bounds on thinking, death and restart.

The tests share the engines and run in order: the last ones kill them.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rollout.engine import Engine, EngineDied, EngineError, environment, stop_engines
from rollout.generation import Fleet, Generation
from rollout.sample import Prompt, Request, Sample, Sampling
from rollout.sampler import assign, generate, in_order, make_requests, stream
from rollout.thinking import forced_positions
from rollout.weight_sync.sync import WeightSync
from tests.rollout.twins import Twin, tensor_parallel_shards
from tests.settings import engine_settings

TWIN = Twin(heads=4, kv_heads=2, vocab=40, tied=False, bias=False, dtype=torch.float32)
BLOCK = 32  # tokens of a block of vLLM's prefix cache on a CPU
THINK, ANSWER = (5,), (6, 7)  # marks; the second has two tokens
SAMPLING = Sampling(max_tokens=24, stop_token_ids=(2,))
PROMPTS = [Prompt(f"p{i}", tuple(8 + (7 * i + j) % 30 for j in range(150 - 40 * i))) for i in range(4)]
STARTUP_SECONDS = 300


@dataclass
class World:
    engines: list[Engine]
    weight_sync: WeightSync
    undisturbed: list[Sample] = field(default_factory=list)

    def revive(self, version: int) -> None:
        """Start the first engine again, plan for it, sync."""
        self.engines[0].restart()
        wait_until_ready(self.engines[:1])
        self.weight_sync.attach(self.engines[:1])
        self.weight_sync.sync(version)

    def samples(self, sampling: Sampling = SAMPLING, **changes: Any) -> list[Sample]:
        return generate(self.engines, PROMPTS, sampling, **{"samples_per_prompt": 4, "seed": 1, "step": 0} | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("engines")
    settings = engine_settings(
        model=str(TWIN.save(folder / "model", seed=0)),
        dtype="float32",
        max_model_len=224,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_gib=0.05,
        thinking=(THINK, ANSWER),
        stall_timeout=10.0,
    )
    engines = [Engine(settings, folder / f"engine_{i}.log") for i in range(2)]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        made = tensor_parallel_shards(TWIN, TWIN.model(0).state_dict(), 1, 0, torch.float32)
        wait_until_ready(engines)
        weight_sync = WeightSync(
            made.shards, engines, dist.group.WORLD, bucket_bytes=2**20, verify_every=1, plans=folder / "plans"
        )
        weight_sync.sync(0)
        yield World(engines, weight_sync)
    finally:
        stop_engines(engines)
        dist.destroy_process_group()


def wait_until_ready(engines: list[Engine]) -> None:
    for engine in engines:
        engine.wait_until_ready(time.monotonic() + STARTUP_SECONDS)


def gap(sample: Sample) -> torch.Tensor:
    """Of the sampled tokens' log-probs to a plain forward's, [response]."""
    ids = torch.tensor([sample.prompt_token_ids + sample.response_token_ids])
    with torch.no_grad():
        logprobs = TWIN.model(0)(ids).logits[0].log_softmax(-1)
    first = len(sample.prompt_token_ids) - 1
    found = logprobs[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0]
    difference = (found - torch.tensor(sample.logprobs)).abs()
    difference[list(sample.forced)] = 0
    return difference


def test_an_engine_s_memory_is_in_huge_pages_where_the_kernel_gives_them(world: World) -> None:
    script = "held = bytearray(64 << 20); print(open('/proc/self/smaps_rollup').read())"
    env = environment(world.engines[0].settings)
    memory = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True).stdout
    (huge,) = [int(line.split()[1]) for line in memory.splitlines() if line.startswith("AnonHugePages")]
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    gives = setting.exists() and "[never]" not in setting.read_text()
    assert (huge >= 32 << 10) == gives


def test_a_groups_prompt_is_computed_once(world: World) -> None:
    before = [engine.health() for engine in world.engines]
    samples = world.samples()
    after = [engine.health() for engine in world.engines]
    assert max(gap(sample).max() for sample in samples) < 2e-4
    asked, cached = (
        sum(b[key] - a[key] for a, b in zip(before, after, strict=True))
        for key in ("prompt_tokens", "cached_prompt_tokens")
    )
    assert asked == sum(4 * len(prompt.token_ids) for prompt in PROMPTS)
    assert cached == sum(3 * ((len(prompt.token_ids) - 1) // BLOCK * BLOCK) for prompt in PROMPTS)


def test_thinking_ends_at_its_budget(world: World) -> None:
    """The end mark comes behind at most 6 tokens of thinking, whoever began it; only there a token is forced."""
    prompts = [
        replace(p, token_ids=(*p.token_ids, *opened)) for p, opened in zip(PROMPTS, [(), THINK] * 2, strict=True)
    ]
    bounded = replace(SAMPLING, thinking_budget=6)
    samples = generate(world.engines, prompts, bounded, samples_per_prompt=8, seed=3, step=0)
    free = generate(world.engines, prompts, SAMPLING, samples_per_prompt=8, seed=3, step=0)
    forced_at = set()
    for sample, other in zip(samples, free, strict=True):
        tokens, thinking = list(sample.response_token_ids), 0 if sample.prompt_token_ids[-1:] == THINK else None
        forced = []
        i = 0
        while i < len(tokens):
            if thinking is None:
                thinking = 0 if tokens[i] == THINK[0] else None
                i += 1
            elif thinking == 6:
                assert tokens[i : i + 2] == list(ANSWER)[: len(tokens) - i]
                forced += range(i, min(i + 2, len(tokens)))
                thinking, i = None, i + 2
            else:
                thinking, i = thinking + 1, i + 1
                if tokens[i - 2 : i] == list(ANSWER) and thinking >= 2:
                    thinking = None
        assert sample.forced == tuple(forced)
        assert all(sample.logprobs[position] == 0 for position in forced)
        assert gap(sample).max() < 2e-4
        forced_at |= {position - forced[0] for position in forced} if forced else set()
        until = forced[0] if forced else len(tokens)
        assert tokens[:until] == list(other.response_token_ids[:until]), "up to there the noise is the same"
        assert other.forced == ()
    assert forced_at >= {0, 1}


def test_a_cpu_engine_does_not_sleep(world: World) -> None:
    with pytest.raises(EngineError, match=r"rollout\.sleep is false: this engine keeps its memory"):
        world.engines[0].call("POST", "/sleep", {})
    world.engines[0].call("POST", "/wake", {"tags": ["weights"]})
    assert world.engines[0].health()["asleep"] == []


def test_rounds_make_the_whole_response_with_its_log_probs_and_versions(world: World) -> None:
    """Five tokens a batch, the second with other weights' version, until all have ended."""
    sampling = replace(SAMPLING, round_tokens=5)
    requests: list[Request] = make_requests(PROMPTS, 2, seed=1, step=0)
    finished: dict[Any, Sample] = {}
    for version in range(1, 8):
        world.weight_sync.sync(version)
        found = Generation(Fleet(world.engines), requests, sampling).collect(dist.group.WORLD, pytest.fail)[0]
        for request, sample in zip(requests, found, strict=True):
            made = len(sample.response_token_ids) - len(request.begun_token_ids)
            assert 1 <= made <= 5 and sample.weight_versions[-made:] == (version,) * made
            assert sample.response_token_ids[:-made] == request.begun_token_ids
            assert (sample.finish_reason == "unfinished") == (
                made == 5 and sample.response_token_ids[-1] != 2 and len(sample.response_token_ids) < 24
            )
            if sample.finish_reason != "unfinished":
                finished[sample.key] = sample
        requests = [
            replace(r, begun=s, seed=r.seed + version)
            for r, s in zip(requests, found, strict=True)
            if s.finish_reason == "unfinished"
        ]
        if not requests:
            break
    assert version == 5 and len(finished) == 8
    for sample in finished.values():
        assert gap(sample).max() < 2e-4
        assert sample.weight_versions == tuple(1 + i // 5 for i in range(len(sample.response_token_ids)))


def test_a_request_is_served_before_anybody_waits_for_its_answer(world: World) -> None:
    engine = world.engines[0]
    progress = engine.health()["progress"]
    answer = engine.begin_call("GET", "/weights/checksum")
    deadline = time.monotonic() + 30
    while engine.health()["progress"] == progress and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.health()["progress"] == progress + 1
    assert answer() == engine.call("GET", "/weights/checksum")


def test_a_batch_that_is_cut_ends_with_the_same_prompts_each_time(world: World) -> None:
    """Of each engine's two prompts the one whose samples are all finished first: the shorter in the whole batch."""
    sampling = replace(SAMPLING, stop_token_ids=tuple(range(2, 6)))
    whole = world.samples(sampling)
    requests = make_requests(PROMPTS, 4, seed=1, step=0)
    first, second = (sorted(stream(world.engines, requests, sampling, 2), key=lambda s: s.key) for _ in range(2))
    assert first == second == [s for s in whole if s.key in {f.key for f in first}]
    longest = {p.prompt_id: max(len(s.logprobs) for s in whole if s.prompt_id == p.prompt_id) for p in PROMPTS}
    parts = [sorted({r.prompt_id for r in part}) for part in assign(requests, 2, sampling)]
    assert [len(part) for part in parts] == [2, 2]
    found = Counter(s.prompt_id for s in first)
    shortest = {min(part, key=longest.__getitem__) for part in parts}
    assert {prompt_id for prompt_id, count in found.items() if count == 4} == shortest
    assert [engine.health()["unfinished_requests"] for engine in world.engines] == [0, 0]
    assert world.samples(sampling) == whole


def versionless(samples: list[Sample]) -> list[Sample]:
    return [replace(sample, weight_versions=()) for sample in samples]


def test_a_killed_engines_samples_are_made_by_the_other(world: World) -> None:
    undisturbed = world.samples()
    world.undisturbed = versionless(undisturbed)
    requests = make_requests(PROMPTS, 4, seed=1, step=0)
    first = threading.Event()
    generation = Generation(Fleet(world.engines), requests, SAMPLING, lambda sample: first.set())
    assert first.wait(120)
    os.kill(world.engines[1].pid, signal.SIGKILL)
    survived = generation.collect(dist.group.WORLD, pytest.fail)[0]
    assert [s.response_token_ids for s in survived] == [s.response_token_ids for s in undisturbed]
    assert max(gap(sample).max() for sample in survived) < 2e-4
    assert [engine.alive for engine in world.engines] == [True, False]
    assert [s.response_token_ids for s in world.samples()] == [s.response_token_ids for s in undisturbed]
    parts = assign(requests, 2, SAMPLING)
    own = {request.key for request in parts[0]}
    assert [s for s in survived if s.key in own] == [s for s in undisturbed if s.key in own], "bit for bit"


def test_an_engine_that_hangs_is_killed_started_again_and_synced_and_makes_the_batch(world: World) -> None:
    """The last one, stopped in the middle of a batch: alive, and silent."""
    (version,) = {sample.weight_version for sample in world.samples()}
    requests = make_requests(PROMPTS, 4, seed=1, step=0)
    first = threading.Event()
    generation = Generation(Fleet(world.engines), requests, SAMPLING, lambda sample: first.set())
    assert first.wait(120)
    os.kill(world.engines[0].pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match=r"made no progress for rollout\.stall_timeout=10 seconds and was killed"):
        generation.running.result(120)
    with pytest.raises(EngineDied, match="none of the 2 engines is alive"):
        world.samples()
    told = world.engines[0].begin_call("GET", "/health")  # the other engines are asked all the same
    with pytest.raises(EngineError, match="Connection refused"):
        told()
    samples = generation.collect(dist.group.WORLD, lambda: world.revive(version + 1))[0]
    assert [engine.starts for engine in world.engines] == [2, 1]
    assert {sample.weight_version for sample in samples} == {version, version + 1}
    assert [s.response_token_ids for s in samples] == [s.response_token_ids for s in world.undisturbed]
    assert max(gap(sample).max() for sample in samples) < 2e-4
    own = assign(requests, 2, SAMPLING)[0]
    again = in_order(own, world.engines[0].generate(own, SAMPLING))
    assert versionless(again) == in_order(own, world.undisturbed), "the new process's bits are those of the old one"


def test_forced_positions_of_thinking_in_pieces() -> None:
    """A mark cut by the end of a round, and one that the prompt has closed again."""
    marks = (THINK, ANSWER)
    assert forced_positions([9, 5, 8], [8, 8, 6, 7, 9], marks, 3) == (2, 3)
    assert forced_positions([9, 5, 8, 6, 7], [8, 8, 8, 8], marks, 1) == ()
    assert forced_positions([9], [5, 6, 7, 5, 8, 8, 6], marks, 2) == (6,)
    assert forced_positions([5, 8], [6, 7, 9], marks, 3) == ()
