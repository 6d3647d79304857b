"""The endpoint and the command of deliberate search over real sockets, before a fake of `vllm serve`."""

import asyncio
import io
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from rollout import search
from rollout.deliberation import settings
from rollout.deliberation.ask import ask
from rollout.deliberation.deliberating import open_deliberator
from rollout.deliberation.serve import make_app
from rollout.deliberation.settings import AskConfig
from rollout.environment import Unavailable
from rollout.guidance.clients import GeneratorFailed
from rollout.settings import EnvironmentConfig
from tests.rollout.fake_guidance import CONTEXT, FakeServers, FakeValues, listening
from tests.rollout.fake_searcher import (
    CORPUS,
    ENVIRONMENT,
    HF_TOKENIZER,
    HOSTILE,
    QUESTION,
    SCRIPTS,
    SURE,
    FakeSearcher,
    deliberation,
)
from tests.settings import CONF

ASKED: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": QUESTION}], "seed": 3}


@dataclass
class World:
    """The fake, the endpoint before it, and a client of that."""

    fakes: FakeServers
    generator: str
    address: str
    client: openai.AsyncOpenAI

    async def streams_ended(self) -> None:
        async with asyncio.timeout(30):
            while self.fakes.open_streams:
                await asyncio.sleep(0.01)

    async def get(self, path: str) -> tuple[int, Any]:
        async with aiohttp.ClientSession() as session, session.get(self.address + path) as response:
            return response.status, await response.json()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    HF_TOKENIZER.save_pretrained(folder)
    return str(folder)


@asynccontextmanager
async def open_world(
    root: str, scripts: Sequence[Sequence[str]], token: str | None, **changes: Any
) -> AsyncGenerator[World, None]:
    model = FakeSearcher(scripts)
    fakes = FakeServers(model, FakeValues(model, lambda text: ()), root)
    async with fakes.running() as (generator, _):
        config = deliberation(generator__address=generator, **changes)
        async with (
            listening(make_app(config, ENVIRONMENT, token)) as address,
            openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=token or "none", max_retries=0) as client,
        ):
            yield World(fakes, generator, address, client)


def with_world(
    test: Callable[[World], Awaitable[None]],
    root: str,
    scripts: Sequence[Sequence[str]] = SCRIPTS,
    token: str | None = None,
    **changes: Any,
) -> None:
    async def run() -> None:
        async with asyncio.timeout(300), open_world(root, scripts, token, **changes) as world:
            await test(world)

    asyncio.run(run())


def test_a_chat_streamed_and_not_is_the_vote_s_answer_with_its_steps(tokenizer: str) -> None:
    async def test(world: World) -> None:
        whole: Any = await world.client.chat.completions.create(**ASKED)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("Veska", "stop")
        about = whole.deliberation
        assert {name: about["votes"][name]["answer"] for name in about["votes"]} == {
            "majority": "Tarn",
            "confidence_weighted": "Veska",
        }
        source = about["votes"]["confidence_weighted"]["sources"][0]
        assert (source["id"], source["has_answer"], source["link"]) == ("norland", True, None)
        assert whole.usage.completion_tokens == sum(sample["tokens"] for sample in about["samples"]) > 0
        # The configured temperature, unless a request has one.
        assert {options["temperature"] for _, options in world.fakes.model.requests} == {1.0}

        chunks: list[Any] = []
        more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5}
        async for chunk in await world.client.chat.completions.create(**ASKED, **more):
            chunks.append(chunk)
        assert world.fakes.model.requests[-1][1]["temperature"] == 0.5
        *steps, last, usage = chunks
        assert usage.usage == whole.usage
        assert (last.choices[0].delta.content, last.choices[0].finish_reason) == ("Veska", "stop")
        assert last.deliberation["votes"]["confidence_weighted"]["answer"] == "Veska"
        assert all(chunk.choices[0].delta.content == "" for chunk in steps)
        by_sample: dict[int, list[Any]] = {}
        for chunk in steps:
            by_sample.setdefault(chunk.deliberation["sample"], []).append(chunk.deliberation)
        sure = next(of_sample for of_sample in by_sample.values() if of_sample[-1]["content"] == "Veska")
        assert [(step["action"], step["fault"]) for step in sure] == [
            (action, "") for action in ("think", "search", "read", "think", "confidence", "answer")
        ]
        assert [document["link"] for document in sure[1]["documents"]] == [None, CORPUS[1].id]
        assert sure[1]["reply"].startswith("<result>[norland] The capital of Norland is Veska.")
        assert HOSTILE in sure[2]["documents"][0]["text"]

        # One sample is the first script alone.
        world.fakes.model.begun.clear()
        one: Any = await world.client.chat.completions.create(**ASKED, extra_body={"samples": 1})
        assert len(one.deliberation["samples"]) == 1
        assert await world.get("/health") == (200, {"under_way": 0, "answers": 3, "without_answer": 0, "not_ended": 0})
        assert await world.get("/v1/sources?id=norland") == (
            200,
            {"id": "norland", "text": CORPUS[0].text, "link": None},
        )
        status, body = await world.get("/v1/sources?id=../etc/passwd")
        assert (status, body["error"]["message"]) == (404, "id='../etc/passwd': no such document")
        assert (await world.client.models.list()).data[0].id == "fake"

    with_world(test, tokenizer)


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_disconnect_ends_the_requests_of_all_samples(tokenizer: str, is_streamed: bool) -> None:
    async def test(world: World) -> None:
        first = len(world.fakes.model.tokenizer.encode(SURE[0]))
        world.fakes.model.gate = asyncio.Semaphore(3 * first)
        async with aiohttp.ClientSession() as session:
            body = ASKED | {"stream": is_streamed}
            asked = asyncio.ensure_future(session.post(f"{world.address}/v1/chat/completions", json=body))
            if is_streamed:
                assert b"think" in await (await asked).content.readline()
            while world.fakes.model.gate._value or not world.fakes.open_streams:
                await asyncio.sleep(0.01)
            if is_streamed:
                asked.result().close()
            else:
                asked.cancel()
        await world.streams_ended()
        world.fakes.model.gate = None
        assert (await world.client.chat.completions.create(**ASKED)).choices[0].finish_reason == "stop"
        assert (await world.get("/health"))[1] == {"under_way": 0, "answers": 2, "without_answer": 0, "not_ended": 1}

    with_world(test, tokenizer)


def test_a_generator_that_dies_and_a_search_that_fails_are_errors_before_and_in_the_stream(
    tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(world: World) -> None:
        world.fakes.fail_after = 0
        for is_streamed in (False, True):
            with pytest.raises(openai.InternalServerError) as raised:
                await world.client.chat.completions.create(**ASKED, stream=is_streamed)
            assert raised.value.status_code == 502
        world.fakes.fail_after = len(world.fakes.model.tokenizer.encode(SURE[0])) - 5
        with pytest.raises(openai.APIError, match=r"127\.0\.0\.1"):
            async for _ in await world.client.chat.completions.create(**ASKED, stream=True):
                pass
        world.fakes.fail_after = None

        def fails(*_: Any) -> Any:
            raise Unavailable("the search engine is gone")

        with monkeypatch.context() as patch:
            patch.setattr(search.Search, "reply", fails)
            with pytest.raises(openai.InternalServerError, match="the search engine is gone") as raised:
                await world.client.chat.completions.create(**ASKED)
            assert (raised.value.status_code, raised.value.type) == (503, "search_error")
            with pytest.raises(openai.APIError, match="the search engine is gone"):
                async for _ in await world.client.chat.completions.create(**ASKED, stream=True):
                    pass
        await world.streams_ended()
        assert (await world.client.chat.completions.create(**ASKED)).choices[0].message.content == "Veska"

    with_world(test, tokenizer, [SURE])


def test_no_answer_is_said(tokenizer: str) -> None:
    async def test(world: World) -> None:
        reply: Any = await world.client.chat.completions.create(**ASKED)
        assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("", "stop")
        assert reply.deliberation["votes"] == {"majority": None, "confidence_weighted": None}
        short: Any = await world.client.chat.completions.create(**ASKED, max_tokens=5)
        assert short.choices[0].finish_reason == "length"
        assert (await world.get("/health"))[1]["without_answer"] == 2

    with_world(test, tokenizer, [["<think>I do not know.</think>"]])


@pytest.mark.parametrize(
    ("more", "status", "text"),
    [
        ({"model": "other"}, 404, "The model `other` does not exist"),
        ({"n": 2}, 400, "n=2: this server does not have it"),
        ({"stop": "x"}, 400, "stop: this server does not have it"),
        ({"extra_body": {"samples": 4}}, 400, "samples=4: give an integer from 1 to 3"),
        ({"extra_body": {"samples": True}}, 400, "samples=True"),
        ({"extra_body": {"return_token_ids": True}}, 400, "return_token_ids: this server"),
        ({"max_tokens": 501}, 400, "max_tokens=501: this server answers with 500 at most"),
        ({"messages": [{"role": "user", "content": "Q" + "." * 2 * CONTEXT}]}, 400, "do not fit"),
    ],
)
def test_what_can_t_be_answered_is_an_error_of_openai_s_form(
    tokenizer: str, more: dict[str, Any], status: int, text: str
) -> None:
    async def test(world: World) -> None:
        for is_streamed in (False, True):
            with pytest.raises(openai.APIStatusError, match=text) as raised:
                await world.client.chat.completions.create(**(ASKED | {"stream": is_streamed} | more))
            assert raised.value.status_code == status
            assert set(raised.value.body) == {"message", "type", "param", "code"}

    with_world(test, tokenizer)


def test_a_web_page_can_t_read_the_sources_by_a_name_of_its_own(tokenizer: str) -> None:
    async def test(world: World) -> None:
        async with aiohttp.ClientSession() as session:
            response = await session.get(f"{world.address}/v1/sources?id=norland", headers={"Host": "evil.example"})
            assert (response.status, (await response.json())["error"]["type"]) == (403, "permission_error")

    with_world(test, tokenizer)


def test_the_token_is_required_for_answers_and_sources(tokenizer: str) -> None:
    async def test(world: World) -> None:
        assert (await world.client.models.list()).data[0].id == "fake"
        for path in ("/v1/models", "/v1/sources?id=norland", "/v1/chat/completions"):
            assert (await world.get(path))[0] == 401
        assert (await world.get("/health"))[0] == 200

    with_world(test, tokenizer, token="secret")


def test_the_command_prints_steps_votes_and_sources(tokenizer: str) -> None:
    async def test(world: World) -> None:
        config = deliberation(generator__address=world.generator)
        written = io.StringIO()
        console = Console(file=written, width=1000, highlight=False)
        conclusion = await ask(config, ENVIRONMENT, AskConfig(QUESTION, 5), console)
        assert conclusion is not None and conclusion.answer == "Veska"
        lines = written.getvalue().splitlines()
        place = next(i for i, line in enumerate(lines) if line.endswith("search: capital of Norland"))
        assert lines[place + 1].startswith("    → [norland] The capital of Norland is Veska.")
        assert "by majority: Tarn  (2 of 3 answers, 67% of the votes; confidence 1.5 of 10, not certain)" in lines
        assert "by confidence: Veska  (1 of 3 answers, 75% of the votes; confidence 9.0 of 10, certain)" in lines
        assert any(line.startswith("  norland (has the answer): The capital") for line in lines)
        assert any("before any think" in line for line in lines)

    with_world(test, tokenizer, [*SCRIPTS[:2], ["<confidence>1</confidence><answer>tarn.</answer>"]])


def test_what_is_not_as_it_must_be_is_named_at_the_start(tokenizer: str, tmp_path: Path) -> None:
    async def start(environment: EnvironmentConfig = ENVIRONMENT, **changes: Any) -> None:
        async with open_deliberator(deliberation(**changes), environment):
            pass

    async def run() -> None:
        with pytest.raises(GeneratorFailed, match=r"start `vllm serve` there, or set deliberation\.generator\.address"):
            await start()
        with pytest.raises(ValueError, match=r"rollout\.environment\.name=None: the steps of deliberate search need"):
            await start(EnvironmentConfig(None, 3, {}))
        corpus = {"corpus": str(tmp_path), "endpoint": None, "results": 1, "snippet_words": 6}
        corpus |= {"timeout": 1.0, "retries": 0}
        with pytest.raises(ValueError, match="no text in it; give a folder"):
            await start(EnvironmentConfig("search", 3, corpus))
        elsewhere = corpus | {"corpus": None, "endpoint": "http://127.0.0.1:1"}
        async with open_world(tokenizer, SCRIPTS, None) as world:
            with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1/search"):
                await start(EnvironmentConfig("search", 3, elsewhere), generator__address=world.generator)
            for folder in (str(tmp_path), "a/name-of-the-hub"):
                with pytest.raises(ValueError, match=r"deliberation\.tokenizer: .* give the model's folder"):
                    await start(generator__address=world.generator, tokenizer=folder)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["deliberation.generator.address=localhost"], r"deliberation\.generator\.address='localhost': give http"),
        (["deliberation.server.host=0.0.0.0"], r"deliberation\.server\.host='0\.0\.0\.0': .* wants a token"),
        (["deliberation.samples=0"], r"deliberation\.samples"),
        (["deliberation.samples=64"], r"max_requests=64: times samples these are 4096 connections"),
    ],
)
def test_settings_that_can_t_work_are_told(overrides: list[str], message: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        raw = compose("deliberation", overrides=overrides)
        assert settings.read_environment(raw.rollout.environment).name == "search"
        with pytest.raises(ValueError, match=message):
            settings.read(raw.deliberation)
