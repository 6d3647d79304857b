"""The endpoint of guided answers over real sockets, asked by the openai client, before fakes of the two servers."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from rollout.guidance import calibrate
from rollout.guidance.clients import GeneratorFailed, ServedGenerator, ServedValues, ValuesUnavailable
from rollout.guidance.fit_router import fit_held_out, labels_of, query_values
from rollout.guidance.openai_form import BadRequest, parse
from rollout.guidance.opening import open_guide
from rollout.guidance.serve import make_app
from rollout.guidance.settings import CalibrateConfig, FitRouterConfig
from tests.rollout.fake_guidance import (
    BEGIN,
    EOS,
    TREE,
    FakeModel,
    FakeServers,
    FakeValues,
    guidance,
    leaves,
    listening,
    reference_monitor,
    table_of,
)

SCORE = table_of([0.4, 0.6, 0.2, 0.9, 0.3], TREE)


@dataclass
class World:
    """The fakes, the endpoint before them, and a client of it."""

    fakes: FakeServers
    address: str
    client: openai.AsyncOpenAI

    async def streams_ended(self) -> None:
        async with asyncio.timeout(5):
            while self.fakes.open_streams:
                await asyncio.sleep(0.01)


def by_table(text: str) -> Sequence[float]:
    return (SCORE.get(text.partition("Q:")[2], 0.5),) * 2


@asynccontextmanager
async def open_world(
    value: Callable[[str], Sequence[float]] = by_table, token: str | None = None, merge: int = 1, **changes: Any
) -> AsyncGenerator[World, None]:
    model = FakeModel(TREE, merge=merge)
    fakes = FakeServers(model, FakeValues(model, value))
    async with fakes.running() as (generator, values):
        config = guidance(generator__address=generator, values__address=values, **changes)
        async with (
            listening(make_app(config, token)) as address,
            openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=token or "none", max_retries=0) as client,
        ):
            yield World(fakes, address, client)


def with_world(test: Callable[[World], Awaitable[None]], **options: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(300), open_world(**options) as world:
            await test(world)

    asyncio.run(run())


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "Q:"}], "seed": 0, **more}


def test_a_chat_streamed_and_not_is_the_guided_answer() -> None:
    """Both the same text and tokens, which a plain loop gives too, however many tokens a chunk of the server has."""

    async def test(world: World) -> None:
        model = world.fakes.model
        whole: Any = await world.client.chat.completions.create(**chat(extra_body={"return_token_ids": True}))
        requests = list(model.requests)
        model.requests.clear()
        chunks: list[Any] = []
        stream: Any = await world.client.chat.completions.create(
            **chat(stream=True, stream_options={"include_usage": True}, extra_body={"return_token_ids": True})
        )
        async for chunk in stream:
            chunks.append(chunk)
        assert model.requests == requests
        parts = [chunk for chunk in chunks if chunk.choices]
        text = "".join(chunk.choices[0].delta.content for chunk in parts)
        assert text == whole.choices[0].message.content
        assert text == reference_monitor(model, SCORE, 0.5, 3)[0]
        assert [token for chunk in parts for token in chunk.choices[0].token_ids] == whole.choices[0].token_ids
        assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage
        assert whole.usage.prompt_tokens == len(model.tokenizer.encode(BEGIN + "Q:"))
        assert whole.usage.completion_tokens == len(whole.choices[0].token_ids)
        assert whole.guidance["steered"] == parts[-1].guidance["steered"] > 0
        assert parts[0].guidance["values"].keys() == {"safety", "value"}
        # Every stream goes on from tokens of the answer, or of a candidate's beginning, as they were generated.
        answer = [*model.tokenizer.encode(BEGIN + "Q:"), *whole.choices[0].token_ids]
        assert all(prefix == answer[: len(prefix)] for prefix, _ in requests)

    for merge in (1, 3):
        with_world(test, merge=merge)


def test_a_completion_of_text_or_token_ids_with_sampling_and_stop() -> None:
    async def test(world: World) -> None:
        text: Any = await world.client.completions.create(
            model="fake", prompt="Q:", seed=0, max_tokens=50, temperature=0.5, stop="number", extra_body={"top_k": 3}
        )
        assert text.choices[0].text == "Sentence "
        assert text.choices[0].finish_reason == "stop"
        prefix, options = world.fakes.model.requests[0]
        assert options == {"temperature": 0.5, "top_k": 3, "max_tokens": 50, "seed": 0}
        assert world.fakes.model.tokenizer.decode(prefix) == BEGIN + "Q:"
        ids: Any = await world.client.completions.create(model="fake", prompt=prefix, seed=0, max_tokens=3, stream=True)
        parts = [chunk async for chunk in ids]
        assert "".join(part.choices[0].text for part in parts) == "Sentence number a"
        assert parts[-1].choices[0].finish_reason == "length"

    with_world(test, value=lambda text: (1.0, 1.0))


def test_many_answers_at_once_are_those_that_come_alone() -> None:
    async def test(world: World) -> None:
        async def ask(seed: int) -> str:
            reply = await world.client.chat.completions.create(**(chat() | {"seed": seed}))
            return str(reply.choices[0].message.content)

        alone = [await ask(seed) for seed in range(3)]
        together = await asyncio.gather(*(ask(seed % 3) for seed in range(50)))
        assert together == [alone[seed % 3] for seed in range(50)]
        assert set(alone) <= set(leaves(TREE))
        assert len(set(alone)) > 1

    with_world(test, threshold=0.25)


@pytest.mark.parametrize("mode", ["monitor", "search"])
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_disconnect_ends_the_requests_to_the_generator(mode: str, is_streamed: bool) -> None:
    async def test(world: World) -> None:
        # Tokens for the first segment, and not for all.
        world.fakes.model.gate = asyncio.Semaphore(8 if mode == "monitor" else 30)
        async with aiohttp.ClientSession() as session:
            asked = asyncio.ensure_future(
                session.post(f"{world.address}/v1/chat/completions", json=chat(stream=is_streamed))
            )
            if is_streamed:
                assert b"Sentence" in await (await asked).content.readline()
            while world.fakes.model.gate._value or not world.fakes.open_streams:
                await asyncio.sleep(0.01)
            if is_streamed:
                asked.result().close()
            else:
                asked.cancel()
        await world.streams_ended()
        world.fakes.model.gate = None
        reply = await world.client.chat.completions.create(**chat())
        assert reply.choices[0].finish_reason == "stop"
        async with aiohttp.ClientSession() as session:
            health = await session.get(f"{world.address}/health")
            counts = await health.json()
            assert counts == {"under_way": 0, "answers": 2, "steered": 0, "unguided": 0, "not_ended": 1}

    with_world(test, value=lambda text: (1.0, 1.0), mode=mode, threshold=0.5 if mode == "monitor" else None)


BROKEN: dict[str, dict[str, Any]] = {
    "no JSON": {"reply_of_classify": "<html>"},
    "another form": {"reply_of_classify": '{"data": [{"embedding": []}]}'},
    "an error": {"reply_of_classify": '{"error": {"message": "no room"}}', "status_of_classify": 500},
    "no numbers": {"reply_of_classify": '{"data": [{"index": 0, "probs": [NaN, 1.0]}]}'},
    "too few": {"reply_of_classify": '{"data": []}'},
    "another model": {"reply_of_classify": '{"data": [{"index": 0, "probs": [1.0]}]}'},
    "slow": {"slow": 5.0},
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_value_server_stops_the_answer_or_is_said(broken: dict[str, Any]) -> None:
    async def test_stop(world: World) -> None:
        vars(world.fakes).update(broken)
        with pytest.raises(openai.InternalServerError, match="/classify") as raised:
            await world.client.chat.completions.create(**chat())
        assert raised.value.status_code == 503
        assert raised.value.type == "value_server_error"
        await world.streams_ended()

    async def test_unguided(world: World) -> None:
        vars(world.fakes).update(broken)
        reply: Any = await world.client.chat.completions.create(**chat())
        assert reply.choices[0].message.content == "".join(world.fakes.model.continuation("", 0))
        assert "/classify" in reply.guidance["unguided"]

    with_world(test_stop, values__timeout=0.3)
    with_world(test_unguided, values__timeout=0.3, values__on_failure="unguided")


def test_a_value_server_that_dies_in_mid_answer_is_told_in_the_stream() -> None:
    async def test(world: World) -> None:
        world.fakes.model.gate = asyncio.Semaphore(8)
        texts = []
        with pytest.raises(openai.APIError, match="the value server is dead"):
            stream: Any = await world.client.chat.completions.create(**chat(stream=True))
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content)
                world.fakes.values.is_dead = True
                for _ in range(100):
                    world.fakes.model.gate.release()
        assert texts == ["Sentence number a."]
        await world.streams_ended()

    with_world(test, value=lambda text: (1.0, 1.0))


def test_a_generator_that_dies_is_an_error_before_and_in_the_stream() -> None:
    async def test(world: World) -> None:
        world.fakes.fail_after = 0
        with pytest.raises(openai.InternalServerError) as raised:
            await world.client.chat.completions.create(**chat(stream=True))
        assert raised.value.status_code == 502
        world.fakes.fail_after = 8
        with pytest.raises(openai.APIError):
            async for _ in await world.client.chat.completions.create(**chat(stream=True)):
                pass

    with_world(test, value=lambda text: (1.0, 1.0))


@pytest.mark.parametrize(
    ("more", "status", "text"),
    [
        ({"model": "other"}, 404, "The model `other` does not exist"),
        ({"temperature": 9}, 400, "temperature is out of range"),
        ({"n": 2}, 400, "n=2: this server does not have it"),
        ({"max_tokens": 501}, 400, "max_tokens=501: this server answers with 500 at most"),
        ({"messages": [{"role": "user", "content": "Q:" + "." * 2000}]}, 400, "do not fit"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "takes text alone"),
        ({"messages": [{"role": "user", "content": "a" * 2**20}]}, 413, "Maximum request body size"),
    ],
)
def test_what_can_t_be_answered_is_an_error_of_openai_s_form(more: dict[str, Any], status: int, text: str) -> None:
    async def test(world: World) -> None:
        for is_streamed in (False, True):
            with pytest.raises(openai.APIStatusError, match=text) as raised:
                await world.client.chat.completions.create(**(chat(stream=is_streamed) | more))
            assert raised.value.status_code == status
            assert set(raised.value.body) == {"message", "type", "param", "code"}

    with_world(test)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (r'{"model": "fake", "messages": [{"role": "user", "content": "a\ud800"}]}', "surrogates not allowed"),
        ('{"model": "fake", "messages": [], "temperature": NaN}', "NaN is no number in JSON"),
        ('{"model": "fake", "messages": [], "temperature": -Infinity}', "-Infinity is no number in JSON"),
    ],
)
def test_what_python_s_parser_takes_and_json_does_not_have_is_refused(body: str, text: str) -> None:
    async def test(world: World) -> None:
        headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
        async with aiohttp.ClientSession() as session:
            response = await session.post(world.address + "/v1/chat/completions", data=body, headers=headers)
            assert response.status == 400
            assert text in (await response.json())["error"]["message"]

    with_world(test)


def test_the_token_is_required_everywhere_but_for_the_health() -> None:
    async def test(world: World) -> None:
        assert (await world.client.models.list()).data[0].id == "fake"
        async with aiohttp.ClientSession() as session:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                for path in ("/v1/models", "/v1/chat/completions", "/nowhere"):
                    response = await session.get(world.address + path, headers=headers)
                    assert response.status == 401
            assert (await session.get(world.address + "/health")).status == 200

    with_world(test, token="secret")


def test_without_a_token_a_request_must_name_the_loopback() -> None:
    """A web page reaches the loopback by a name of its own that it points there."""

    async def test(world: World) -> None:
        async with aiohttp.ClientSession() as session:
            for host in ("evil.example", "evil.example:8100", "127.0.0.1.evil.example", "", "[::1"):
                for path in ("/v1/models", "/health", "/nowhere"):
                    response = await session.get(world.address + path, headers={"Host": host})
                    error = (await response.json())["error"]
                    assert (response.status, error["type"], error["code"]) == (403, "permission_error", 403)
            for host in ("127.0.0.1", "localhost:9", "LOCALHOST", "[::1]:8100", "127.0.0.2"):
                response = await session.get(f"{world.address}/v1/models", headers={"Host": host})
                assert response.status == 200

    with_world(test)


def test_with_a_token_the_endpoint_may_have_any_name() -> None:
    async def test(world: World) -> None:
        async with aiohttp.ClientSession() as session:
            headers = {"Host": "models.example", "Authorization": "Bearer secret"}
            assert (await session.get(f"{world.address}/v1/models", headers=headers)).status == 200

    with_world(test, token="secret")


def test_servers_on_this_machine_are_asked_without_the_environment_s_proxy_and_others_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)

    async def test(world: World) -> None:
        assert (await world.client.chat.completions.create(**chat())).choices[0].finish_reason == "stop"

    async def ask_another(address: str) -> None:
        generator = ServedGenerator(guidance(generator__address=address).generator)
        with pytest.raises(GeneratorFailed, match=r"a proxy was asked for http://models\.invalid/v1/models"):
            await generator.models()
        await generator.close()

    async def run() -> None:
        async def refuse(request: web.Request) -> web.Response:
            return web.json_response({"error": {"message": f"a proxy was asked for {request.url}"}}, status=404)

        proxy = web.Application()
        proxy.router.add_route("*", "/{path:.*}", refuse)
        async with asyncio.timeout(300), listening(proxy) as address:
            monkeypatch.setenv("http_proxy", address)
            await ask_another("http://models.invalid")
            async with open_world() as world:
                # The client of the test is no part of what is tested.
                world.client = openai.AsyncOpenAI(
                    base_url=f"{world.address}/v1",
                    api_key="none",
                    max_retries=0,
                    http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
                )
                async with world.client:
                    await test(world)

    asyncio.run(run())


def test_a_line_of_prompts_ends_at_its_line_break_alone(tmp_path: Path) -> None:
    """JSON has these three as they are; str.splitlines() takes them for line breaks."""
    rows = [{"prompt": "a\u2028b\u2029c\x85d"}, {"prompt": "e"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert calibrate.read_rows(str(path)) == rows


def test_more_answers_than_allowed_and_a_form_that_a_web_page_could_send_are_refused() -> None:
    async def test(world: World) -> None:
        world.fakes.model.gate = asyncio.Semaphore(0)
        first = asyncio.ensure_future(world.client.chat.completions.create(**chat()))
        while not world.fakes.open_streams:
            await asyncio.sleep(0.01)
        with pytest.raises(openai.RateLimitError, match="1 answers are under way"):
            await world.client.chat.completions.create(**chat())
        world.fakes.model.gate = None
        first.cancel()
        await world.streams_ended()
        async with aiohttp.ClientSession() as session:
            text = json.dumps(chat())
            headers = {"Content-Type": "text/plain"}
            response = await session.post(f"{world.address}/v1/chat/completions", data=text, headers=headers)
            assert (response.status, (await response.json())["error"]["type"]) == (400, "invalid_request_error")

    with_world(test, server__max_requests=1)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ([], None),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "seed": -1}, "seed"),
        ({"prompt": "a", "stop": [""]}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "logprobs": 1}, "logprobs"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "structured_outputs": {}}, "structured_outputs"),
        ({"prompt": "a", "model": 3}, "model"),
    ],
)
def test_a_request_that_is_not_understood_names_its_field(body: Any, field: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        parse(body, is_chat=False)
    assert raised.value.field == field


def test_fields_that_change_nothing_are_taken() -> None:
    neutral = {"n": 1, "echo": False, "logprobs": None, "presence_penalty": 0.0, "tools": [], "user": "me"}
    request = parse(
        {"messages": [{"role": "user", "content": "a"}], "stop": "x", "top_p": 0.5, **neutral}, is_chat=True
    )
    assert request.stops == ("x",)
    assert request.sampling == {"top_p": 0.5}
    assert (request.max_tokens, request.stream, request.include_usage) == (None, False, False)


def test_a_server_that_is_not_there_or_is_another_is_named_at_the_start(tmp_path: Path) -> None:
    async def start(**changes: Any) -> None:
        model = FakeModel(TREE)
        fakes = FakeServers(model, FakeValues(model, lambda text: (1.0, 1.0)))
        async with fakes.running() as (generator, values):
            config = guidance(**({"generator__address": generator, "values__address": values} | changes))
            async with open_guide(config):
                pass

    asyncio.run(start())
    with pytest.raises(ValuesUnavailable, match=r"127.0.0.1:1.*Connect"):
        asyncio.run(start(values__address="http://127.0.0.1:1"))
    with pytest.raises(ValuesUnavailable, match=r"2 values of a prefix; guidance.values.principles has 1 names"):
        asyncio.run(start(values__principles=["safety"], weights={"safety": 1.0}))


def test_the_values_of_prefixes_keep_their_order() -> None:
    async def run() -> list[tuple[float, ...]]:
        model = FakeModel(TREE)
        fakes = FakeServers(model, FakeValues(model, lambda text: (len(text), 0.0)))
        async with fakes.running() as (_, address):
            values = ServedValues(guidance(values__address=address).values)
            await values.check()
            try:
                return await values.score([[EOS], [EOS, EOS], [EOS] * 3])
            finally:
                await values.close()

    assert [row[0] for row in asyncio.run(run())] == [7.0, 14.0, 21.0]


def prompts_file(folder: Path, count: int) -> str:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": f"{'ab' * place}Q:", "label": ("safety", "value")[place % 2]} for place in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_threshold_is_calibrated_on_the_lowest_score_of_each_unguided_answer(tmp_path: Path) -> None:
    """Guided with the threshold, so many of the same answers are touched as its rank says."""
    seen: list[dict[str, Any]] = []

    async def run() -> Any:
        model = FakeModel(TREE)
        fakes = FakeServers(model, FakeValues(model, by_table))
        async with fakes.running() as (generator, values):
            config = guidance(generator__address=generator, values__address=values, threshold=None)
            options = CalibrateConfig(prompts_file(tmp_path, 19), "", 0.1, 0.7, 4, 5)
            calibration = await calibrate.calibrate(config, options)
            seen.extend(options for _, options in model.requests)
            return calibration, model

    calibration, model = asyncio.run(run())
    expected = []
    for place in range(19):
        text, scores = "", []
        for segment in model.continuation("", 5 + place):
            text += segment
            scores.append(SCORE[text])
        expected.append(min(scores))
    assert calibration.lowest_scores == sorted(expected)
    assert calibration.threshold == sorted(expected)[1]
    assert sum(score < calibration.threshold for score in expected) <= 1
    assert (calibration.level, calibration.n, calibration.conditions["value_model"]) == (0.1, 19, "fake-values")
    assert len(seen) == 19
    assert {options["temperature"] for options in seen} == {0.7}


def test_too_few_prompts_are_refused_before_any_is_answered(tmp_path: Path) -> None:
    options = CalibrateConfig(prompts_file(tmp_path, 8), "", 0.1, 1.0, 4, 1)
    with pytest.raises(ValueError, match="needs 9 held-out prompts or more, and there are 8"):
        asyncio.run(calibrate.calibrate(guidance(), options))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    with pytest.raises(ValueError, match=r"prompts.jsonl:2: neither prompt, a text, nor messages"):
        asyncio.run(calibrate.calibrate(guidance(), options))


def test_a_router_is_fitted_on_the_values_of_the_prompts_alone(tmp_path: Path) -> None:
    path = prompts_file(tmp_path, 40)

    async def run() -> Any:
        model = FakeModel(TREE)
        # The length of the prompt tells what matters.
        fakes = FakeServers(model, FakeValues(model, lambda text: (float(text.count("a") % 2), 0.5)))
        async with fakes.running() as (generator, values):
            config = guidance(generator__address=generator, values__address=values)
            return await query_values(config, calibrate.read_rows(path))

    values = asyncio.run(run())
    assert values[:3].tolist() == [[0.0, 0.5], [1.0, 0.5], [0.0, 0.5]]
    rows = calibrate.read_rows(path)
    labels = labels_of(rows, ["safety", "value"], path)
    fitted = fit_held_out(values, labels, ["safety", "value"], FitRouterConfig("", "", 0.1, 0.25, 1))
    assert (fitted.rows, fitted.held_out, fitted.accuracy) == (30, 10, 1.0)
    with pytest.raises(ValueError, match="row 1: label='safety': use one of"):
        labels_of(rows, ["value"], path)
