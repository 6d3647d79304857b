"""Whose turn it is on a shared GPU, with a rollouts object made for the test: real judge over HTTP, fake engines."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron_ext import batch as batches
from megatron_ext.batch import Prompt, TokenBatch
from recipes.training.held_out import response_of
from recipes.training.rollouts import Rollouts
from rewards.client import Client
from rewards.verifiers import exact, search
from rewards.verifiers import format as thinking_format
from rewards.verifiers.served import ServedVerifier
from rollout.environment import Turns
from tests.recipes import tiny
from tests.responses import make_prompt, plain
from tests.rewards.fake_server import FakeServer, good
from tests.rewards.test_client import ROW, asking
from tests.rollout.test_environment import Script
from tests.settings import rollout_config


class FakeSleeper:
    """In the place of an engine that sleeps, for which a GPU would be needed: it only remembers that it was told so."""

    alive = True

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def call(self, method: str, path: str, body: dict[str, Any]) -> None:
        self.events.append(f"engine: {path}")


class FakeWeightSync:
    """In the place of the weight sync: it remembers the versions."""

    def __init__(self) -> None:
        self.versions: list[int] = []

    def sync(self, version: int) -> dict[str, int]:
        self.versions.append(version)
        return {"bytes": 8}


class AnswerTokenizer:
    """Token n reads "answer n"."""

    eos_token_id = 99

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return f"answer {tokens[0]}"


@pytest.fixture
def control(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


def rollouts(control: dist.ProcessGroup, events: list[str], client: Client, verifier: ServedVerifier) -> Rollouts:
    return Rollouts(
        config=rollout_config(sleep=True, engines=1),
        seed=0,
        tokenizer=AnswerTokenizer(),
        engines=[FakeSleeper(events)],  # type: ignore[list-item]
        weight_sync=FakeWeightSync(),  # type: ignore[arg-type]
        control=control,
        node=0,
        nodes=1,
        verifiers={"judge": verifier},
        client=client,
        turns=None,
        judges_share_gpus=True,
        make_room=lambda: events.append("trainer makes room"),
        heartbeat=lambda phase: None,
        on_restart=lambda engine: None,
    )


def responses(count: int) -> TokenBatch:
    return batches.build([Prompt(f"p{i}", np.array([1], np.int32)) for i in range(count)], [[i] for i in range(count)])


def test_engines_fall_asleep_before_judges_wake_and_these_sleep_when_all_is_judged(control: dist.ProcessGroup) -> None:
    """All are judged in one turn, and each has its own verdict."""

    async def behave(number: int, request: Any, body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        return good(f"Label: {'good' if int(text[-1]) % 3 else 'bad'}")

    with FakeServer(behave) as fake, asking(fake.address) as (client, verifier):
        shared = rollouts(control, fake.events, client, verifier)
        judged = shared.judge_together(responses(5), lambda response: shared.judge(ROW, response, ["judge"]))
        assert [verdicts["judge"]["score"] for verdicts in judged.verdicts] == [0.0, 1.0, 1.0, 0.0, 1.0]
        assert fake.events == ["engine: /sleep", "/wake_up", *["asked"] * 5, "/sleep"]
        assert shared.asleep


def test_engines_that_slept_get_the_weights_that_they_had(control: dist.ProcessGroup) -> None:
    async def behave(number: int, request: Any, body: dict[str, Any]) -> Any:
        return good()

    with FakeServer(behave) as fake, asking(fake.address) as (client, verifier):
        shared = rollouts(control, fake.events, client, verifier)
        assert shared.sync_weights(3) == 8
        shared.wake()
        assert shared.weight_sync.versions == [3], "awake engines are left alone"  # type: ignore[attr-defined]
        shared.sleep()
        fake.events.clear()
        shared.wake()
    assert shared.weight_sync.versions == [3, 3]  # type: ignore[attr-defined]
    assert fake.events == ["trainer makes room", "engine: /wake", "engine: /wake"]


def test_a_response_whose_environment_failed_has_a_failure_of_each_verifier(control: dist.ProcessGroup) -> None:
    async def behave(number: int, request: Any, body: dict[str, Any]) -> Any:
        return good()

    response = responses(1)
    response.failures[0] = "no search engine"
    with FakeServer(behave) as fake, asking(fake.address) as (client, verifier):
        verdicts = rollouts(control, fake.events, client, verifier).judge(ROW, response, ["judge", "format"])
    assert {name: record["reason"] for name, record in verdicts.items()} == {
        "judge": "no search engine",
        "format": "no search engine",
    }
    assert "asked" not in fake.events


VERIFIERS = {"format": thinking_format.score, "exact": exact.score, "search_format": search.format_score}
OPENED, PLAIN = tiny.OPENS_THINKING, tiny.TEMPLATE
EPISODE = "I look.</think><confidence>8</confidence><answer>Veska</answer>"


def verifying(control: dist.ProcessGroup) -> Rollouts:
    """With rules alone, no engine, and an environment that is never asked."""
    tokenizer = tiny.make_tokenizer()
    return Rollouts(
        config=rollout_config(),
        seed=0,
        tokenizer=tokenizer,
        engines=[],
        weight_sync=None,
        control=control,
        node=0,
        nodes=1,
        verifiers=dict(VERIFIERS),
        client=None,
        turns=Turns(Script([]), tokenizer, 1, "<think>"),
        judges_share_gpus=False,
        make_room=lambda: None,
        heartbeat=lambda phase: None,
        on_restart=lambda engine: None,
    )


def answered(tokenizer: Any, template: str, written: str) -> TokenBatch:
    """A response of these words to a prompt by the template."""
    message = [{"role": "user", "content": "the prompt"}]
    options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
    prompt = make_prompt("p", tokenizer.apply_chat_template(message, **options))
    tokens = [*tokenizer.encode(written, add_special_tokens=False), tokenizer.eos_token_id]
    return batches.build([prompt], [tokens], logprobs=[[-0.5] * len(tokens)], version=1)


@pytest.mark.parametrize(
    ("template", "written", "text", "expected"),
    [
        (OPENED, "so</think>Yes.", "<think>\nso</think>Yes.", {"format": 1.0, "exact": 1.0, "search_format": 0.0}),
        (OPENED, "<think>so</think>Yes.", "<think>so</think>Yes.", {"format": 1.0, "exact": 1.0}),
        (OPENED, "yes", "<think>\nyes", {"format": 0.0, "exact": 0.0}),
        (OPENED, EPISODE, f"<think>\n{EPISODE}", {"format": 1.0, "search_format": 1.0}),
        (PLAIN, "so</think>Yes.", "so</think>Yes.", {"format": 0.0, "exact": 1.0}),
        (PLAIN, "<think>so</think>Yes.", "<think>so</think>Yes.", {"format": 1.0, "exact": 1.0}),
        (PLAIN, "yes", "yes", {"format": 0.0, "exact": 1.0}),
        (PLAIN, EPISODE, EPISODE, {"format": 0.0, "search_format": 0.0}),
    ],
)
def test_verifiers_see_the_thinking_that_the_prompt_has_begun(
    control: dist.ProcessGroup, template: str, written: str, text: str, expected: dict[str, float]
) -> None:
    """Cut inside its thinking, a response has no answer. Its tokens stay as they are."""
    shared = verifying(control)
    response = answered(shared.tokenizer, template, written)
    before = plain(response)
    verdicts = shared.judge({**ROW, "answer": "yes"}, response, list(expected))
    assert {name: verdict["score"] for name, verdict in verdicts.items()} == expected
    assert shared.text(response, 0) == text
    assert plain(response) == before


@pytest.mark.parametrize(
    ("template", "written", "expected"),
    [
        (OPENED, "so</think>yes", "so"),
        (OPENED, "so", "so<|im_end|>"),
        (PLAIN, "<think>so</think>yes", "<think>so"),
        (PLAIN, "<think>so", "<think>so<|im_end|>"),
        (PLAIN, "so", ""),
    ],
)
def test_an_answer_s_thinking_tokens_are_the_model_s(
    control: dist.ProcessGroup, template: str, written: str, expected: str
) -> None:
    shared = verifying(control)
    response = response_of(shared, answered(shared.tokenizer, template, written), 0)
    assert response.thinking_tokens == len(shared.tokenizer.encode(expected, add_special_tokens=False))
    assert response.text == shared.text(answered(shared.tokenizer, template, written), 0)
