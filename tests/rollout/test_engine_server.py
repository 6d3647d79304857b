"""Which order of sleep, wake and sync an engine accepts, with a vLLM that only records its calls."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import batch as batches
from rollout.engine_server import EngineLoop, Refused
from rollout.sampling import Sampling
from tests.settings import engine_settings


class Llm:
    """What :class:`EngineLoop` calls of vLLM's engine; the workers answer every call with nothing."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.busy = False

    def collective_rpc(self, method: str, args: tuple[str, ...] = ()) -> list[str]:
        return [json.dumps({"checksums": []})]

    def has_unfinished_requests(self) -> bool:
        return self.busy

    def reset_prefix_cache(self) -> bool:
        return True

    def reset_encoder_cache(self) -> None:
        pass

    def sleep(self, level: int) -> None:
        self.calls.append(("sleep", level))

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(("wake", tags))


@pytest.fixture
def loop(tmp_path: Path) -> EngineLoop:
    (tmp_path / "config.json").write_text("{}")
    settings = engine_settings(
        model=str(tmp_path),
        dtype="bfloat16",
        max_model_len=8,
        max_num_seqs=1,
        max_num_batched_tokens=8,
        kv_cache_gib=1.0,
        platform="cuda",
        sleep=True,
    )
    loop = EngineLoop(settings, Llm())
    loop.weights.version = 1
    return loop


def sync(loop: EngineLoop) -> None:
    loop.change_weights(lambda _: setattr(loop.weights, "stale", False) or {}, None)


def refusal(loop: EngineLoop) -> str:
    with pytest.raises(Refused) as refused:
        loop.add_batch(batches.build([], []), Sampling(max_tokens=1, stop_token_ids=(2,)), None, print)
    return str(refused.value)


def test_weights_wake_before_the_sync_and_the_cache_behind_it(loop: EngineLoop) -> None:
    loop.between_batches(loop.sleep, {})
    assert loop.health()["asleep"] == ["kv_cache", "weights"]
    assert refusal(loop).startswith("asleep: kv_cache, weights: wake and sync")
    with pytest.raises(Refused, match="the weights are asleep: POST /wake"):
        sync(loop)
    loop.wake({"tags": ["weights"]})
    sync(loop)
    assert refusal(loop).startswith("asleep: kv_cache: wake")
    loop.wake({"tags": ["kv_cache"]})
    loop.wake({"tags": ["weights", "kv_cache"]})  # nothing is asleep: nothing happens
    assert loop.llm.calls == [("sleep", 2), ("wake", ["weights"]), ("wake", ["kv_cache"])]
    assert loop.health()["asleep"] == [] and loop._usable_version() == 1


def test_weights_that_slept_are_stale_until_a_sync(loop: EngineLoop) -> None:
    loop.sleep({})
    loop.wake({"tags": ["weights", "kv_cache"]})
    assert loop.health()["stale"] and "or the engine slept, so the weights are stale: sync again" in refusal(loop)


def test_an_engine_falls_asleep_between_batches_only(loop: EngineLoop) -> None:
    loop.llm.busy = True
    with pytest.raises(Refused, match="requests are still running"):
        loop.between_batches(loop.sleep, {})
    assert loop.llm.calls == [] and loop.health()["asleep"] == []
