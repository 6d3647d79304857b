"""Real vLLM on the CPU with an environment in the middle of responses: two FP32 engines, fed by one trainer rank.

The tests share the engines and run in order: the last ones kill them.
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.batch import TokenBatch
from rollout.engine import Engine, EngineError, stop_engines
from rollout.environment import Turns, segments
from rollout.generation import Fleet, Generation
from rollout.sampler import make_requests, stream
from rollout.sampling import Sampling
from rollout.weight_sync.sync import WeightSync
from tests import warm
from tests.recipes.tiny import make_tokenizer
from tests.responses import PlainResponse, make_prompt, plain
from tests.rollout.letters import Letters, answer
from tests.rollout.twins import Twin, tensor_parallel_shards
from tests.settings import engine_settings

TWIN = Twin(heads=4, kv_heads=2, vocab=300, tied=False, bias=False, dtype=torch.float32)
SAMPLING = Sampling(max_tokens=60, stop_token_ids=(2,))
PROMPTS = [make_prompt(f"p{i}", [8 + (7 * i + j) % 200 for j in range(70 - 20 * i)]) for i in range(3)]
REQUESTS = make_requests(PROMPTS, 4, seed=1, step=0)
MAX_TURNS = 3
STARTUP_SECONDS = 300


@dataclass
class World:
    engines: list[Engine]
    weight_sync: WeightSync
    tokenizer: Any
    undisturbed: list[PlainResponse] = field(default_factory=list)
    num_replies: int = 0  # in the undisturbed responses

    def generate(self, environment: Letters, resync: Any = pytest.fail) -> TokenBatch:
        fleet = Fleet(self.engines, turns=Turns(environment, self.tokenizer, MAX_TURNS, "<think>"))
        return Generation(fleet, REQUESTS, SAMPLING).collect(dist.group.WORLD, resync)

    def episodes(self, environment: Letters, resync: Any = pytest.fail) -> list[PlainResponse]:
        return plain(self.generate(environment, resync))

    def revive(self) -> None:
        self.engines[0].restart()
        self.engines[0].wait_until_ready(time.monotonic() + STARTUP_SECONDS)
        self.weight_sync.attach(self.engines[:1])
        self.weight_sync.sync(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("turns")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder / "model")
    settings = engine_settings(
        model=str(TWIN.save(folder / "model", seed=0)),
        dtype="float32",
        max_model_len=160,
        max_num_seqs=8,
        max_num_batched_tokens=512,
        kv_cache_gib=0.05,
        environment={"name": "search"},
    )
    with warm.processes():
        engines = [Engine(settings, folder / f"engine_{i}.log") for i in range(2)]
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    try:
        trainer = tensor_parallel_shards(TWIN, TWIN.model(0).state_dict(), 1, 0, torch.float32)
        for engine in engines:
            engine.wait_until_ready(time.monotonic() + STARTUP_SECONDS)
        weight_sync = WeightSync(
            trainer.shards, engines, dist.group.WORLD, bucket_bytes=2**20, verify_every=1, plans=folder / "plans"
        )
        weight_sync.sync(0)
        yield World(engines, weight_sync, tokenizer)
    finally:
        stop_engines(engines)
        dist.destroy_process_group()


def gap(response: PlainResponse) -> float:
    """Largest distance of the sampled tokens' log-probs to those of one plain forward of the complete sequence."""
    ids = torch.tensor([response.prompt + response.tokens])
    with torch.no_grad():
        logprobs = TWIN.model(0)(ids).logits[0].log_softmax(-1)
    first = len(response.prompt) - 1
    expected = logprobs[first:-1].gather(-1, ids[0, first + 1 :, None])[:, 0]
    difference = (expected - torch.tensor(response.logprobs)).abs()
    difference[response.forced] = 0
    return float(difference.max())


def test_the_environment_s_tokens_stand_where_a_turn_ended_and_all_others_are_sampled(world: World) -> None:
    batch = world.generate(Letters())
    world.undisturbed = plain(batch)
    assert batch.keys == REQUESTS.keys
    kept = 0
    for i, response in enumerate(world.undisturbed):
        said = segments(world.tokenizer, batch.select([i]), "<think>")
        assert response.forced == [place for place, logprob in enumerate(response.logprobs) if logprob == 0]
        sampled = [place not in response.forced for place in range(len(response.tokens))]
        pieces = [
            (by_model, [token for _, token in run])
            for by_model, run in groupby(zip(sampled, response.tokens, strict=True), key=itemgetter(0))
        ]
        for place, (by_model, ids) in enumerate(pieces):
            if by_model:
                assert not stopped(world, ids[:-1]), "a turn ends with the first token that completes a stop"
                assert place + 1 == len(pieces) or stopped(world, ids)
            else:
                assert ids == world.tokenizer.encode(answer(said[:place]), add_special_tokens=False)
                assert said[place].text == answer(said[:place])
        replies = sum(segment.by_environment for segment in said)
        assert replies == sum(not by_model for by_model, _ in pieces)
        assert replies <= MAX_TURNS
        world.num_replies += replies
        assert response.finish_reason in ("stop", "length", "turns")
        assert len(response.tokens) <= SAMPLING.max_tokens
        assert response.versions == [0] * len(response.tokens)
        assert gap(response) < 2e-4
        text = world.tokenizer.decode(response.tokens)
        kept += world.tokenizer.encode(text, add_special_tokens=False) != response.tokens
    assert world.num_replies > len(batch), "several turns in a response"
    assert kept, "encoding the text again would have given other ids"
    assert "turns" in batch.finish_reasons


def stopped(world: World, ids: Sequence[int]) -> bool:
    return any(letter in world.tokenizer.decode(ids, skip_special_tokens=True) for letter in Letters().stops)


def test_the_same_requests_give_the_same_bits_whatever_the_environment_s_pace(world: World) -> None:
    assert world.episodes(Letters(on_reply=lambda n: time.sleep(0.02 * (n % 3)))) == world.undisturbed


def test_a_failed_reply_marks_its_response_and_no_other(world: World) -> None:
    responses = world.episodes(Letters(fails=True))
    failed = {response.key for response in responses if response.finish_reason == "failed"}
    for response, complete in zip(responses, world.undisturbed, strict=True):
        assert (response.failure == "gone") == (response.key in failed)
        assert response.tokens == complete.tokens[: len(response.tokens)]
    assert 0 < len(failed) < len(responses)


def test_a_killed_engine_s_episodes_go_on_in_the_other(world: World) -> None:
    def kill(count: int) -> None:
        if count == 10:  # in the middle of the first turns' replies
            os.kill(world.engines[1].pid, signal.SIGKILL)

    responses = world.episodes(Letters(on_reply=kill))
    assert [engine.alive for engine in world.engines] == [True, False]
    assert [r.tokens for r in responses] == [r.tokens for r in world.undisturbed]
    assert max(map(gap, responses)) < 2e-4


def test_when_none_is_left_one_is_started_and_goes_on_after_the_turns_there_are(world: World) -> None:
    killed_at: list[int] = []

    def kill(count: int) -> None:
        if count == len(REQUESTS) + 2:  # in the second turns: the first ones are not made again
            killed_at.append(count)
            os.kill(world.engines[0].pid, signal.SIGKILL)
            world.engines[0].process.wait()

    environment = Letters(on_reply=kill)
    responses = world.episodes(environment, resync=world.revive)
    assert killed_at and world.engines[0].starts == 2
    assert [r.tokens for r in responses] == [r.tokens for r in world.undisturbed]
    assert max(map(gap, responses)) < 2e-4
    ended = sum(response.finish_reason == "length" for response in responses)
    assert environment.replied <= world.num_replies + ended


def test_stops_need_an_engine_with_a_tokenizer(world: World) -> None:
    sampling = replace(SAMPLING, stops=("e",))
    assert list(world.engines[0].generate(REQUESTS.select([]), sampling)) == []
    with pytest.raises(EngineError):
        list(stream([], REQUESTS, SAMPLING))
