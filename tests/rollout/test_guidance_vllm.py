"""Guided decoding before real vLLM: a server that generates, and one with an exported value model."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from megatron_ext import hf_checkpoint
from megatron_ext.blocks import Block, Shard
from megatron_ext.scalar_head import value_head
from recipes.page.conversation import Branch, Conversation
from recipes.page.writing import open_writer
from recipes.serve import read_setup
from rewards.serve import kill
from rollout.deliberation.deliberating import open_deliberator
from rollout.environment import Segment
from rollout.guidance.clients import ValuesUnavailable
from rollout.guidance.decoding import Question, Step
from rollout.guidance.opening import only_scoring, open_guide
from rollout.guidance.reading import REPLACEMENT
from rollout.guidance.serve import make_app
from rollout.guidance.settings import GuidanceConfig
from rollout.search import Search
from rollout.settings import EnvironmentConfig
from tests import served
from tests.recipes import page_load, tiny
from tests.rollout.fake_guidance import guidance, listening
from tests.rollout.fake_searcher import SEARCH, deliberation

PRINCIPLES = ["safety", "value", "knowledge"]
WEIGHTS = {"safety": 2.0, "value": 1.0, "knowledge": 1.0}
CONTEXT = 1024
BLOCK = 128  # tokens, of vLLM's cache on a CPU
MESSAGES = [{"role": "user", "content": "the benign prompt"}]
ASKED: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 60, "seed": 3}


@dataclass
class World:
    """The two servers, and what transformers makes of the value model."""

    generator: served.WarmServer
    values: served.WarmServer
    tokenizer: Any
    value_model: Any

    def config(self, **changes: Any) -> GuidanceConfig:
        fields: dict[str, Any] = {
            "generator__address": self.generator.server.addresses[0],
            "values__address": self.values.server.addresses[0],
            "values__principles": PRINCIPLES,
            "weights": WEIGHTS,
            "max_segment_tokens": 8,
        }
        return guidance(**(fields | changes))

    def prompt_ids(self) -> list[int]:
        text = self.tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text)["input_ids"])

    def expected_values(self, token_ids: Sequence[int]) -> list[float]:
        with torch.no_grad():
            return list(self.value_model(torch.tensor([list(token_ids)])).logits[0].sigmoid().tolist())

    def sampling(self) -> dict[str, Any]:
        """Of ASCII and the end of an answer alone: other tokens of a random model are no text."""
        others = set(self.tokenizer.all_special_ids) - {self.tokenizer.eos_token_id}
        others |= {token for token in range(len(self.tokenizer)) if not self.tokenizer.decode([token]).isascii()}
        return {"temperature": 1.0, "logit_bias": {str(token): -100.0 for token in sorted(others)}}

    def text(self, token_ids: Sequence[int]) -> str:
        """As vLLM shows it: without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def make_value_model(model: Path, folder: Path) -> None:
    """The generator with a head of three values, written as a run writes its export."""
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    width = json.loads((model / "config.json").read_text())["hidden_size"]
    tensors["score.weight"] = torch.randn(len(PRINCIPLES), width, generator=torch.Generator().manual_seed(0)) / 4
    shards = []
    for name, tensor in tensors.items():
        start = (0,) * tensor.dim()
        shards.append(Shard(name, tensor, (Block(name, start, start, tuple(tensor.shape)),)))
    hf_checkpoint.export(shards, model, folder, writes=True, head=value_head(PRINCIPLES))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("guidance")
    tiny.make(folder)
    config_file = folder / "model" / "config.json"
    changed = json.loads(config_file.read_text()) | {"max_position_embeddings": CONTEXT}
    config_file.write_text(json.dumps(changed))
    make_value_model(folder / "model", folder / "values")
    models = [served.Model(folder / "model", "generate"), served.Model(folder / "values", "pooling")]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    value_model = AutoModelForSequenceClassification.from_pretrained(folder / "values", dtype=torch.float32)
    with served.serving(models, folder) as (generator, values):
        yield World(generator, values, tokenizer, value_model)


async def answered(world: World, config: GuidanceConfig) -> tuple[list[Step], dict[str, Any]]:
    """The steps of an answer in process, and its summary."""
    async with open_guide(config) as opened:
        prompt = tuple(world.prompt_ids())
        question = Question(opened.model, prompt, ASKED["max_tokens"], world.sampling(), seed=ASKED["seed"])
        answer = opened.guide.answer(question)
        return [step async for step in answer.steps()], answer.summary()


def check_values(world: World, steps: Sequence[Step]) -> None:
    """Each step's values are those that transformers gives the prefix which ends with the step's text. Whitespace and
    the token that ends the answer may come after that."""
    prefix = world.prompt_ids()
    for step in steps:
        prefix += step.token_ids
        if step.values is not None:
            assert list(step.values) == PRINCIPLES
            values = list(step.values.values())
            candidates = []
            for length in range(len(prefix), len(prefix) - len(step.token_ids) - 1, -1):
                if world.text(prefix[length:]).strip():
                    break
                candidates.append(world.expected_values(prefix[:length]))
            assert any(values == pytest.approx(expected, abs=2e-5) for expected in candidates), (step, candidates)
            expected = sum(WEIGHTS[name] * value for name, value in step.values.items()) / sum(WEIGHTS.values())
            assert step.score == pytest.approx(expected)


def decisions_in(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def middle_score(steps: Sequence[Step]) -> float:
    """Between two scores: another order of sums in a server does not turn one that is above into one below."""
    scores = sorted(step.score for step in steps if step.score is not None)
    middle = len(scores) // 2
    return (scores[middle - 1] + scores[middle]) / 2


def test_monitor_steers_what_is_below_the_threshold_in_process_and_as_an_endpoint(world: World, tmp_path: Path) -> None:
    unguided, _ = asyncio.run(answered(world, only_scoring(world.config())))
    assert {step.origin for step in unguided} == {"draft"}
    check_values(world, unguided)

    # Nearly every segment is below it. On a busy machine a server may not sample the same tokens twice: what follows
    # compares no two answers.
    threshold = max(step.score for step in unguided if step.score is not None)
    config = world.config(threshold=threshold, candidates=3, log=str(tmp_path / "log.jsonl"))
    steps, summary = asyncio.run(answered(world, config))
    check_values(world, steps)
    log = decisions_in(tmp_path / "log.jsonl")
    accepted = [entry for entry in log if entry["decision"] == "accept"]
    chosen = [entry for entry in log if entry["decision"] == "choose"]
    assert len(chosen) == summary["steered"] > 0
    assert all(entry["candidates"][0]["score"] >= threshold for entry in accepted if entry["candidates"][0]["values"])
    for entry in chosen:
        scores = [candidate["score"] for candidate in entry["candidates"]]
        assert [candidate["origin"] for candidate in entry["candidates"]] == ["draft", *["sampled"] * 3]
        assert scores[0] < threshold
        assert scores[entry["chosen"][0]] == max(scores)

    async def ask() -> None:
        config.log = None
        async with (
            listening(make_app(config, None)) as address,
            openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client,
        ):
            model = (await client.models.list()).data[0].id
            fields = {"model": model, **ASKED, **world.sampling(), "extra_body": {"return_token_ids": True}}
            whole: Any = await client.chat.completions.create(**fields)
            stream: Any = await client.chat.completions.create(**fields, stream=True)
            chunks = [chunk.choices[0] async for chunk in stream]
            streamed = [token for chunk in chunks for token in chunk.token_ids]
            assert "".join(chunk.delta.content for chunk in chunks) == world.text(streamed) != ""
            assert whole.choices[0].message.content == world.text(whole.choices[0].token_ids) != ""
            assert whole.guidance["steered"] > 0

            many = await asyncio.gather(
                *(client.chat.completions.create(**(fields | {"seed": 100 * seed})) for seed in range(20))
            )
            for reply in many:
                (choice,) = reply.choices
                assert choice.finish_reason in ("stop", "length")
                assert choice.message.content == world.text(choice.token_ids)  # type: ignore[attr-defined]

    asyncio.run(ask())


def test_search_keeps_the_best_beginnings(world: World, tmp_path: Path) -> None:
    config = world.config(mode="search", threshold=None, candidates=3, beams=2, log=str(tmp_path / "log.jsonl"))
    steps, summary = asyncio.run(answered(world, config))
    check_values(world, steps)
    assert all(step.origin == "sampled" for step in steps)
    log = decisions_in(tmp_path / "log.jsonl")
    chosen = [entry for entry in log if entry["decision"] == "choose"]
    for entry in chosen:
        scores = [candidate["score"] for candidate in entry["candidates"]]
        assert [scores[place] for place in entry["chosen"]] == sorted(scores, reverse=True)[:2]
    assert [len(entry["candidates"]) for entry in chosen[:2]] == [3, 6]
    assert summary["unguided"] is None
    assert summary["generated_tokens"] > 3 * summary["answer_tokens"]
    unguided, _ = asyncio.run(answered(world, only_scoring(world.config())))
    assert middle_score(steps) > middle_score(unguided)


async def metric(address: str, name: str) -> float:
    """A figure of a vLLM server."""
    async with aiohttp.ClientSession() as session, session.get(f"{address}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


async def running_requests(address: str) -> float:
    """How many answers a vLLM server writes at present."""
    return await metric(address, "num_requests_running")


def test_the_page_goes_on_from_an_edit_by_token_ids_and_the_server_has_the_kept_ones_in_its_cache(world: World) -> None:
    """The edited answer is what vLLM makes of the prompt, the kept tokens and the edit."""

    async def run(has_values: bool) -> None:
        options = {"generator": world.generator.server.addresses[0], "values": world.values.server.addresses[0]}
        if not has_values:
            del options["values"]
        setup = read_setup(options, ["guidance.log=null", "guidance.max_tokens=300", "guidance.max_segment_tokens=8"])
        async with open_writer(setup) as writer, asyncio.timeout(120):
            conversation = Conversation()

            async def finished() -> Branch:
                while conversation.is_busy:
                    await asyncio.sleep(0.01)
                branch = conversation.turns[0].branches[-1]
                assert (branch.finish_reason, branch.notice) in [("stop", None), ("length", None)]
                return branch

            # The prompt alone fills blocks of the cache.
            writer.ask(conversation, "the benign prompt " * 60)
            first = await finished()
            prompt_ids = conversation.turns[0].prompt_ids
            # After the text come the end of the answer, and a character that had only begun.
            assert (await writer.generator.decode(writer.model, first.token_ids)).startswith(first.text)
            # Of a random model's bytes many are no characters: the edit is where the first one is none.
            edited = f"{first.text.partition(REPLACEMENT)[0]} the task prompt"
            hits = await metric(options["generator"], "prefix_cache_hits_total")
            await writer.continue_from(conversation, 0, 0, edited)
            second = await finished()
            assert second.text.startswith(edited)
            kept = 0
            while first.token_ids[kept : kept + 1] == second.token_ids[kept : kept + 1]:
                kept += 1
            tail = edited.removeprefix(world.tokenizer.decode(first.token_ids[:kept]))
            assert tail.endswith(" the task prompt")
            tail_ids = tuple(world.tokenizer(tail)["input_ids"])
            assert second.token_ids[kept : kept + len(tail_ids)] == tail_ids
            # vLLM caches whole blocks.
            expected = (len(prompt_ids) + kept) // BLOCK * BLOCK
            assert await metric(options["generator"], "prefix_cache_hits_total") - hits >= expected > 0
            if has_values:
                assert any(passage.values for passage in second.passages)
            # An edit that keeps nothing.
            await writer.continue_from(conversation, 0, 0, "~")
            assert (await finished()).text.startswith("~")

    asyncio.run(run(has_values=False))
    asyncio.run(run(has_values=True))


def test_50_conversations_at_once_over_the_page_s_sockets_lose_no_token(world: World, tmp_path: Path) -> None:
    """What each tab shows is what vLLM answers when it is asked alone. One loses its connection meanwhile."""
    generator = world.generator.server.addresses[0]
    messages = [f"the {kind} prompt {place}" for place in range(page_load.TABS // 2) for kind in ("benign", "harmful")]
    shown = page_load.shown_by_tabs(generator, messages, tmp_path)
    assert shown == page_load.answered_alone(generator, world.tokenizer, messages)
    # Another's answer would be noticed.
    assert len(set(shown)) > len(shown) / 2


LONG = ASKED | {"max_tokens": 900, "temperature": 1.0, "stream": True, "extra_body": {"ignore_eos": True}}


def test_a_client_that_leaves_ends_its_requests_to_vllm(world: World) -> None:
    async def run() -> None:
        config = world.config(threshold=-1e6, max_tokens=CONTEXT)
        address = config.generator.address
        async with (
            listening(make_app(config, None)) as endpoint,
            openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0) as client,
        ):
            model = (await client.models.list()).data[0].id
            stream: Any = await client.chat.completions.create(model=model, **LONG)
            await anext(aiter(stream))
            while not await running_requests(address):
                await asyncio.sleep(0.02)
            await stream.close()
            async with asyncio.timeout(60):
                while await running_requests(address):
                    await asyncio.sleep(0.02)
            async with aiohttp.ClientSession() as session, session.get(f"{endpoint}/health") as reply:
                health = await reply.json()
            assert (health["answers"], health["not_ended"], health["under_way"]) == (1, 1, 0)

    asyncio.run(run())


def test_a_value_server_that_is_killed_stops_the_answer_or_is_said(world: World) -> None:
    """The last test: the fixture's value server has ended."""

    async def stream_of(policy: str) -> tuple[str, Any]:
        """The text, and the error or the last chunk's summary. The server is killed when the text has begun."""
        config = world.config(threshold=-1e6, max_tokens=CONTEXT, values__on_failure=policy, values__retries=0)
        async with (
            listening(make_app(config, None)) as endpoint,
            openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key="none", max_retries=0) as client,
        ):
            model = (await client.models.list()).data[0].id
            stream: Any = await client.chat.completions.create(model=model, **LONG)
            begun.append(policy)
            text = ""
            about = None
            try:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content
                    about = chunk.guidance
                    if len(begun) == 2 and world.values.is_healthy():
                        assert world.values.process is not None
                        kill(world.values.process)
                    while len(begun) < 2:
                        await asyncio.sleep(0.01)
            except openai.APIError as error:
                about = error
            return text, about

    begun: list[str] = []

    async def both() -> list[tuple[str, Any]]:
        return await asyncio.gather(stream_of("stop"), stream_of("unguided"))

    (stopped, error), (continued, summary) = asyncio.run(both())
    assert isinstance(error, openai.APIError) and "/classify" in error.message
    assert summary["answer_tokens"] == LONG["max_tokens"]
    assert "/classify" in summary["unguided"]
    assert summary["scored_prefixes"] > 0
    assert 0 < len(stopped) < len(continued)
    with pytest.raises(ValuesUnavailable, match="vllm serve --runner pooling"):
        asyncio.run(answered(world, world.config()))


@dataclass(frozen=True)
class Eager(Search):
    """Replies after one text, so that a random model has turns."""

    stop: str

    @property
    def stops(self) -> Sequence[str]:
        return (self.stop,)

    def reply(self, segments: Sequence[Segment]) -> str:
        return f"<result>reply {len(segments)}</result>"


def open_eager(stop: str) -> Eager:
    return Eager(SEARCH.retriever, 1, 1, stop)


def greedy(world: World, model: Any, prefix: Sequence[int], most: int, stop: str | None) -> list[int]:
    """The tokens of one turn, by transformers, of the texts that ``World.sampling`` leaves."""
    biases = torch.zeros(model.config.vocab_size)
    for token, bias in world.sampling()["logit_bias"].items():
        biases[int(token)] = bias
    tokens: list[int] = []
    while len(tokens) < most:
        with torch.no_grad():
            logits = model(torch.tensor([[*prefix, *tokens]])).logits[0, -1] + biases
        tokens.append(int(logits.argmax()))
        if tokens[-1] == world.tokenizer.eos_token_id or (stop is not None and stop in world.text(tokens)):
            break
    return tokens


def test_deliberate_search_has_the_turns_that_transformers_gives(world: World) -> None:
    """Greedily: what the model writes until the stop text, the environment's reply, and on from both, two times."""
    most, max_turns = 80, 2
    prompt = world.prompt_ids()
    config = deliberation(generator__address=world.generator.server.addresses[0], max_tokens=most)
    folder = world.generator.server.model
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stop = world.text(greedy(world, model, prompt, 6, None))[-1]
    response: list[int] = []
    expected: list[Segment] = []
    while True:
        turn = greedy(world, model, [*prompt, *response], most - len(response), stop)
        response += turn
        expected.append(Segment(world.text(turn), by_environment=False))
        if len(expected) == 2 * max_turns + 1 or stop not in expected[-1].text:
            break
        expected.append(Segment(f"<result>reply {len(expected)}</result>", by_environment=True))
        response += world.tokenizer.encode(expected[-1].text, add_special_tokens=False)
    assert len(expected) > 2, "no turn has ended"

    async def run() -> None:
        environment = EnvironmentConfig(f"{__name__}.open_eager", max_turns, {"stop": stop})
        async with open_deliberator(config, environment) as opened:
            question = Question(opened.model, tuple(prompt), most, world.sampling() | {"temperature": 0.0})
            search = opened.deliberate(question, 3)
            shown = [step async for step in search.steps()]
        for episode in search.episodes:
            assert episode.said == expected
            assert episode.tokens == len(response)
            replies = [segment.text for segment in expected if segment.by_environment]
            assert [step.reply for step in episode.shown if step.reply is not None] == replies
        assert len(shown) == 3 * len(search.episodes[0].shown)

    asyncio.run(run())
