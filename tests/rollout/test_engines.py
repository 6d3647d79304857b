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
from rollout.sampler import assign, generate, in_order, make_requests, stream
from rollout.sampling import Sampling
from rollout.thinking import forced_positions
from rollout.weight_sync.sync import WeightSync
from tests import warm
from tests.responses import PlainResponse, make_prompt, plain
from tests.rollout.twins import Twin, tensor_parallel_shards
from tests.settings import engine_settings

TWIN = Twin(heads=4, kv_heads=2, vocab=40, tied=False, bias=False, dtype=torch.float32)
BLOCK = 32  # tokens of a block of vLLM's prefix cache on a CPU
THINK, ANSWER = (5,), (6, 7)  # marks; the second has two tokens
SAMPLING = Sampling(max_tokens=24, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [8 + (7 * i + j) % 30 for j in range(150 - 40 * i)]) for i in range(4)]
STARTUP_SECONDS = 300


@dataclass
class World:
    engines: list[Engine]
    weight_sync: WeightSync
    undisturbed: list[PlainResponse] = field(default_factory=list)

    def revive(self, version: int) -> None:
        """Start the first engine again, plan for it, sync."""
        self.engines[0].restart()
        wait_until_ready(self.engines[:1])
        self.weight_sync.attach(self.engines[:1])
        self.weight_sync.sync(version)

    def responses(self, sampling: Sampling = SAMPLING) -> list[PlainResponse]:
        return plain(generate(self.engines, PROMPTS, sampling, samples_per_prompt=4, seed=1, step=0))


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
    with warm.processes():
        engines = [Engine(settings, folder / f"engine_{i}.log") for i in range(2)]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        trainer = tensor_parallel_shards(TWIN, TWIN.model(0).state_dict(), 1, 0, torch.float32)
        wait_until_ready(engines)
        weight_sync = WeightSync(
            trainer.shards, engines, dist.group.WORLD, bucket_bytes=2**20, verify_every=1, plans=folder / "plans"
        )
        weight_sync.sync(0)
        yield World(engines, weight_sync)
    finally:
        stop_engines(engines)
        dist.destroy_process_group()


def wait_until_ready(engines: list[Engine]) -> None:
    for engine in engines:
        engine.wait_until_ready(time.monotonic() + STARTUP_SECONDS)


def gap(response: PlainResponse) -> torch.Tensor:
    """Of the sampled tokens' log-probs to a plain forward's, [response]."""
    ids = torch.tensor([response.prompt + response.tokens])
    with torch.no_grad():
        logprobs = TWIN.model(0)(ids).logits[0].log_softmax(-1)
    first = len(response.prompt) - 1
    expected = logprobs[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0]
    difference = (expected - torch.tensor(response.logprobs)).abs()
    difference[response.forced] = 0
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
    responses = world.responses()
    after = [engine.health() for engine in world.engines]
    assert max(gap(response).max() for response in responses) < 2e-4
    asked, cached = (
        sum(b[key] - a[key] for a, b in zip(before, after, strict=True))
        for key in ("prompt_tokens", "cached_prompt_tokens")
    )
    assert asked == sum(4 * len(prompt.token_ids) for prompt in PROMPTS)
    assert cached == sum(3 * ((len(prompt.token_ids) - 1) // BLOCK * BLOCK) for prompt in PROMPTS)


def test_thinking_ends_at_its_budget(world: World) -> None:
    """The end mark comes after at most 6 tokens of thinking, whoever began it; only there a token is forced."""
    prompts = []
    for prompt, opened in zip(PROMPTS, [(), THINK] * 2, strict=True):
        prompts.append(make_prompt(prompt.prompt_id, [*prompt.token_ids, *opened]))
    bounded = replace(SAMPLING, thinking_budget=6)
    responses = plain(generate(world.engines, prompts, bounded, samples_per_prompt=8, seed=3, step=0))
    unbounded = plain(generate(world.engines, prompts, SAMPLING, samples_per_prompt=8, seed=3, step=0))
    forced_at = set()
    for response, other in zip(responses, unbounded, strict=True):
        tokens = response.tokens
        thinking = 0 if response.prompt[-1] == THINK[0] else None
        forced: list[int] = []
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
        assert response.forced == forced
        assert all(response.logprobs[position] == 0 for position in forced)
        assert gap(response).max() < 2e-4
        forced_at |= {position - forced[0] for position in forced} if forced else set()
        until = forced[0] if forced else len(tokens)
        assert tokens[:until] == other.tokens[:until], "up to there the noise is the same"
        assert other.forced == []
    assert forced_at >= {0, 1}


def test_a_cpu_engine_does_not_sleep(world: World) -> None:
    with pytest.raises(EngineError, match=r"rollout\.sleep is false: this engine keeps its memory"):
        world.engines[0].call("POST", "/sleep", {})
    world.engines[0].call("POST", "/wake", {"tags": ["weights"]})
    assert world.engines[0].health()["asleep"] == []


def test_rounds_make_the_complete_response_with_its_log_probs_and_versions(world: World) -> None:
    """Five tokens a batch, the second with other weights' version, until all have ended."""
    sampling = replace(SAMPLING, round_tokens=5)
    requests = make_requests(PROMPTS, 2, seed=1, step=0)
    finished: dict[Any, PlainResponse] = {}
    for version in range(1, 8):
        world.weight_sync.sync(version)
        batch = Generation(Fleet(world.engines), requests, sampling).collect(dist.group.WORLD, pytest.fail)
        unfinished = []
        for i, (request, response) in enumerate(zip(plain(requests), plain(batch), strict=True)):
            assert response.key == request.key and response.prompt == request.prompt
            added = len(response.tokens) - len(request.tokens)
            assert 1 <= added <= 5 and response.versions[-added:] == [version] * added
            assert response.tokens[:-added] == request.tokens
            may_go_on = added == 5 and response.tokens[-1] != 2 and len(response.tokens) < 24
            assert (response.finish_reason == "unfinished") == may_go_on
            if may_go_on:
                unfinished.append(i)
            else:
                finished[response.key] = response
        requests = replace(batch, seeds=requests.seeds + version).select(unfinished)
        if not unfinished:
            break
    assert version == 5 and len(finished) == 8
    for response in finished.values():
        assert gap(response).max() < 2e-4
        assert response.versions == [1 + i // 5 for i in range(len(response.tokens))]


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
    """Of each engine's two prompts the one whose responses are all finished first: the shorter in the full batch."""
    sampling = replace(SAMPLING, stop_token_ids=tuple(range(2, 6)))
    full = world.responses(sampling)
    requests = make_requests(PROMPTS, 4, seed=1, step=0)
    first, second = (plain(in_order(requests.keys, stream(world.engines, requests, sampling, 2))) for _ in range(2))
    keys = {response.key for response in first}
    assert first == second == [response for response in full if response.key in keys]
    longest = {p.prompt_id: max(len(r.logprobs) for r in full if r.prompt_id == p.prompt_id) for p in PROMPTS}
    parts = [{requests.keys[place][0] for place in part} for part in assign(requests, 2, sampling)]
    assert [len(part) for part in parts] == [2, 2]
    counts = Counter(response.prompt_id for response in first)
    shortest = {min(part, key=longest.__getitem__) for part in parts}
    assert {prompt_id for prompt_id, count in counts.items() if count == 4} == shortest
    assert [engine.health()["unfinished_requests"] for engine in world.engines] == [0, 0]
    assert world.responses(sampling) == full


def without_versions(responses: list[PlainResponse]) -> list[PlainResponse]:
    """And without verdicts."""
    return [replace(response, versions=[], verdicts={}) for response in responses]


def tokens(responses: list[PlainResponse]) -> list[list[int]]:
    return [response.tokens for response in responses]


def last_versions(responses: list[PlainResponse]) -> set[int]:
    return {response.versions[-1] for response in responses}


def test_a_killed_engine_s_responses_are_made_by_the_other(world: World) -> None:
    undisturbed = world.responses()
    world.undisturbed = without_versions(undisturbed)
    requests = make_requests(PROMPTS, 4, seed=1, step=0)
    first = threading.Event()
    generation = Generation(Fleet(world.engines), requests, SAMPLING, lambda _: first.set() or {})
    assert first.wait(120)
    os.kill(world.engines[1].pid, signal.SIGKILL)
    survived = plain(generation.collect(dist.group.WORLD, pytest.fail))
    assert tokens(survived) == tokens(undisturbed)
    assert max(gap(response).max() for response in survived) < 2e-4
    assert [engine.alive for engine in world.engines] == [True, False]
    assert tokens(world.responses()) == tokens(undisturbed)
    places = assign(requests, 2, SAMPLING)[0]
    assert len(places) == 8
    assert [survived[place] for place in places] == [undisturbed[place] for place in places], "bit for bit"


def test_an_engine_that_hangs_is_killed_started_again_and_synced_and_makes_the_batch(world: World) -> None:
    """The last one, stopped in the middle of a batch: alive, and silent."""
    (version,) = last_versions(world.responses())
    requests = make_requests(PROMPTS, 4, seed=1, step=0)
    first = threading.Event()
    generation = Generation(Fleet(world.engines), requests, SAMPLING, lambda _: first.set() or {})
    assert first.wait(120)
    os.kill(world.engines[0].pid, signal.SIGSTOP)
    with pytest.raises(EngineDied, match=r"made no progress for rollout\.stall_timeout=10 seconds and was killed"):
        generation.running.result(120)
    with pytest.raises(EngineDied, match="none of the 2 engines is alive"):
        world.responses()
    answer = world.engines[0].begin_call("GET", "/health")  # the other engines are asked all the same
    with pytest.raises(EngineError, match="Connection refused"):
        answer()
    responses = plain(generation.collect(dist.group.WORLD, lambda: world.revive(version + 1)))
    assert [engine.starts for engine in world.engines] == [2, 1]
    assert last_versions(responses) == {version, version + 1}
    assert tokens(responses) == tokens(world.undisturbed)
    assert max(gap(response).max() for response in responses) < 2e-4
    places = assign(requests, 2, SAMPLING)[0]
    asked = requests.select(places)
    again = plain(in_order(asked.keys, world.engines[0].generate(asked, SAMPLING)))
    assert without_versions(again) == [world.undisturbed[place] for place in places], (
        "the new process's bits are the old's"
    )


def test_forced_positions_of_thinking_in_pieces() -> None:
    """A mark cut by the end of a round, and one that the prompt has closed again."""
    marks = (THINK, ANSWER)
    assert forced_positions([9, 5, 8], [8, 8, 6, 7, 9], marks, 3) == (2, 3)
    assert forced_positions([9, 5, 8, 6, 7], [8, 8, 8, 8], marks, 1) == ()
    assert forced_positions([9], [5, 6, 7, 5, 8, 8, 6], marks, 2) == (6,)
    assert forced_positions([5, 8], [6, 7, 9], marks, 3) == ()
