"""Fakes of the two servers of guided decoding: in memory, and over real sockets with the replies of vLLM 0.32.

The fake model writes from a tree: the answer so far → the segments that may follow. A stream with seed s takes the
(s + depth)-th of them, so that consecutive seeds take all. It refuses what vLLM refuses.
"""

import asyncio
import itertools
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from hypothesis import HealthCheck, settings

from rollout.guidance.clients import GeneratorFailed, Piece, ValuesUnavailable
from rollout.guidance.decoding import DecisionLog, Guide
from rollout.guidance.router import open_router
from rollout.guidance.settings import (
    CorrectionConfig,
    GeneratorConfig,
    GuidanceConfig,
    ServerConfig,
    ValuesConfig,
)

MODEL = "fake"
VALUE_MODEL = "fake-values"
EOS = 0
CONTEXT = 1000
BEGIN = "<|begin|>"

# No test fails because a machine is slow.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

type Tree = Mapping[str, Sequence[str]]


class FakeTokenizer:
    """Words with the space before them, and single other characters; each has an id when it is first met."""

    def __init__(self) -> None:
        self.pieces = ["<|end|>", BEGIN]

    def encode(self, text: str) -> list[int]:
        words = re.findall(rf"{re.escape(BEGIN)}| ?[A-Za-z]+|.", text, re.DOTALL)
        self.pieces += [piece for piece in dict.fromkeys(words) if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in words]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(self.pieces[token] for token in token_ids)


class FakeModel:
    """A generator in memory. ``requests`` are the prefixes and options of its streams; ``merge`` tokens come at once;
    ``gate``, if there is one, is waited for before each piece."""

    def __init__(self, tree: Tree, prompt: str = "Q:", merge: int = 1) -> None:
        self.tree = tree
        self.prompt = prompt
        self.merge = merge
        self.tokenizer = FakeTokenizer()
        self.requests: list[tuple[list[int], dict[str, Any]]] = []
        self.sent = 0
        self.gate: asyncio.Semaphore | None = None

    def prompt_ids(self) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(self.prompt))

    def continuation(self, answer: str, seed: int) -> list[str]:
        """The segments from here to a leaf; the first may be the rest of one."""
        segments = []
        for beginning, choices in self.tree.items():
            begun = [choice for choice in choices if (beginning + choice).startswith(answer)]
            if begun and answer.startswith(beginning) and answer != beginning and answer not in self.tree:
                segments = [(beginning + begun[0])[len(answer) :]]
                answer = beginning + begun[0]
        depth = sum(1 for beginning in self.tree if answer.startswith(beginning) and beginning != answer)
        while answer in self.tree:
            choices = self.tree[answer]
            segments.append(choices[(seed + depth) % len(choices)])
            answer += segments[-1]
            depth += 1
        return segments

    async def stream(
        self, model: str, token_ids: Sequence[int], options: Mapping[str, Any]
    ) -> AsyncGenerator[Piece, None]:
        refuse(model, token_ids, options)
        self.requests.append((list(token_ids), dict(options)))
        text = self.tokenizer.decode(token_ids)
        answer = text[text.rindex(self.prompt) + len(self.prompt) :]
        tokens = [*self.tokenizer.encode("".join(self.continuation(answer, options.get("seed", 0)))), EOS]
        is_complete = len(tokens) <= options["max_tokens"]
        tokens = tokens[: options["max_tokens"]]
        for start in range(0, len(tokens), self.merge):
            if self.gate is not None:
                await asyncio.sleep(0.001)  # streams take turns
                await self.gate.acquire()
            taken = tokens[start : start + self.merge]
            is_last = start + self.merge >= len(tokens)
            self.sent += len(taken)
            shown = self.tokenizer.decode([token for token in taken if token != EOS])
            yield Piece(shown, tuple(taken), ("stop" if is_complete else "length") if is_last else None)

    async def encode(self, model: str, text: str, special_tokens: bool) -> list[int]:
        return self.tokenizer.encode((BEGIN if special_tokens else "") + text)

    async def decode(self, model: str, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids)


def refuse(model: str, token_ids: Sequence[int], options: Mapping[str, Any]) -> None:
    """What vLLM refuses. Raises GeneratorFailed with its status."""
    if model != MODEL:
        raise GeneratorFailed(f"The model `{model}` does not exist.", 404, "NotFoundError")
    if not token_ids:
        raise GeneratorFailed("Either prompt or prompt_embeds must be provided and non-empty.", 400, "BadRequestError")
    if options["max_tokens"] < 1 or len(token_ids) + options["max_tokens"] > CONTEXT:
        raise GeneratorFailed(f"max_tokens={options['max_tokens']} is out of range", 400, "BadRequestError")
    if not 0 <= options.get("temperature", 1.0) <= 2:
        raise GeneratorFailed("temperature is out of range", 400, "BadRequestError")


class FakeValues:
    """Values in memory: a function of the text of a prefix. ``scored`` are these texts, a list for each request."""

    def __init__(self, model: FakeModel, value: Callable[[str], Sequence[float]]) -> None:
        self.model = model
        self.value = value
        self.scored: list[list[str]] = []
        self.is_dead = False

    async def score(self, prefixes: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        if self.is_dead:
            raise ValuesUnavailable("the value server is dead")
        texts = [self.model.tokenizer.decode(prefix) for prefix in prefixes]
        self.scored.append(texts)
        return [tuple(self.value(text)) for text in texts]


def guidance(**changes: Any) -> GuidanceConfig:
    """A configuration; ``changes`` of its fields, a dotted one as ``values__on_failure``."""
    config = GuidanceConfig(
        mode="monitor",
        generator=GeneratorConfig("http://127.0.0.1:1", None, 60.0, 0),
        values=ValuesConfig("http://127.0.0.1:2", None, ["safety", "value"], 60.0, 0, "stop"),
        weights={"safety": 1.0, "value": 1.0},
        router=None,
        calibration=None,
        threshold=0.5,
        candidates=3,
        beams=1,
        max_segment_tokens=50,
        max_steered=100,
        budget_tokens=10_000,
        max_tokens=500,
        thinking_marks=["<think>", "</think>"],
        correction=CorrectionConfig(None, None, 1),
        log=None,
        server=ServerConfig("127.0.0.1", 1, None, 100, 1.0),
    )
    return changed(config, changes)


def changed[T](config: T, changes: Mapping[str, Any]) -> T:
    """The configuration after changes of its fields, a dotted one as ``server__max_requests``."""
    for name, value in changes.items():
        *parents, field = name.split("__")
        target: Any = config
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, field, value)
    return config


def guide(config: GuidanceConfig, model: FakeModel, values: FakeValues) -> Guide:
    threshold = -1e9 if config.threshold is None else config.threshold
    return Guide(config, model, values, open_router(config), threshold, DecisionLog(config.log))


class FakeServers:
    """The two fakes over HTTP. ``open_streams`` counts streams that are not ended; ``reply_of_classify``, if there is
    one, replaces the reply of the value server, and ``slow`` delays it by so many seconds."""

    def __init__(self, model: FakeModel, values: FakeValues, root: str = "") -> None:
        self.model = model
        self.values = values
        self.root = root  # the folder that the server says it has the model from
        self.open_streams = 0
        self.fail_after: int | None = None
        self.reply_of_classify: str | None = None
        self.status_of_classify = 200
        self.slow = 0.0

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[tuple[str, str], None]:
        """The addresses of generator and value server."""
        generator = web.Application(middlewares=[vllm_errors])
        generator.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/completions", self._completions),
                web.post("/tokenize", self._tokenize),
                web.post("/detokenize", self._detokenize),
            ]
        )
        values = web.Application(middlewares=[vllm_errors])
        values.add_routes([web.get("/v1/models", self._value_models), web.post("/classify", self._classify)])
        async with listening(generator) as first, listening(values) as second:
            yield first, second

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response(
            {"object": "list", "data": [{"id": MODEL, "max_model_len": CONTEXT, "root": self.root}]}
        )

    async def _value_models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": VALUE_MODEL}]})

    async def _completions(self, http: web.Request) -> web.StreamResponse:
        body = await http.json()
        assert body.pop("stream") is True
        assert body.pop("return_token_ids") is True
        model, prompt = body.pop("model"), body.pop("prompt")
        refuse(model, prompt, body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        self.open_streams += 1
        pieces = 0
        try:
            async for piece in self.model.stream(model, prompt, body):
                if self.fail_after is not None and pieces >= self.fail_after:
                    assert http.transport is not None
                    http.transport.abort()
                    return response
                pieces += 1
                choice = {
                    "index": 0,
                    "text": piece.text,
                    "logprobs": None,
                    "finish_reason": piece.finish_reason,
                    "stop_reason": piece.stopped_at,
                    "token_ids": list(piece.token_ids),
                }
                await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.open_streams -= 1
        return response

    async def _tokenize(self, http: web.Request) -> web.Response:
        body = await http.json()
        if body["model"] != MODEL:
            refuse(body["model"], [1], {})
        if "messages" in body:
            text = "".join(message["content"] for message in body["messages"])
            tokens = self.model.tokenizer.encode(BEGIN + text)
        else:
            tokens = await self.model.encode(MODEL, body["prompt"], body["add_special_tokens"])
        return web.json_response({"count": len(tokens), "max_model_len": CONTEXT, "tokens": tokens})

    async def _detokenize(self, http: web.Request) -> web.Response:
        return web.json_response({"prompt": self.model.tokenizer.decode((await http.json())["tokens"])})

    async def _classify(self, http: web.Request) -> web.Response:
        body = await http.json()
        if body["model"] != VALUE_MODEL:
            refuse(body["model"], [1], {})
        await asyncio.sleep(self.slow)
        if self.reply_of_classify is not None:
            text = self.reply_of_classify
            return web.Response(text=text, status=self.status_of_classify, content_type="application/json")
        rows = await self.values.score(body["input"])
        data = [
            {"index": index, "label": None, "probs": row, "num_classes": len(row)} for index, row in enumerate(rows)
        ]
        # The client must go by the index.
        return web.json_response({"object": "list", "model": VALUE_MODEL, "data": data[::-1]})


def full_tree(depth: int, branches: int) -> dict[str, list[str]]:
    """Every segment says where it stands; the ends are not at the same depth."""
    tree: dict[str, list[str]] = {}

    def grow(beginning: str, left: int) -> None:
        if left == 0:
            return
        words = "abcd"[:branches]
        tree[beginning] = [f" Sentence number {word}." if beginning else f"Sentence number {word}." for word in words]
        for place, segment in enumerate(tree[beginning]):
            grow(beginning + segment, left - 1 if place != branches - 1 else max(left - 2, 0))

    grow("", depth)
    return tree


def leaves(tree: dict[str, list[str]]) -> list[str]:
    extended = [beginning + segment for beginning, segments in tree.items() for segment in segments]
    return [text for text in extended if text not in tree]


def table_of(scores: Sequence[float], tree: dict[str, list[str]]) -> dict[str, float]:
    """A score for each text of the tree, in turn."""
    texts = [beginning + segment for beginning, segments in tree.items() for segment in segments]
    return dict(zip(texts, itertools.cycle(scores), strict=False))


def reference_monitor(model: FakeModel, score: dict[str, float], threshold: float, candidates: int) -> tuple[str, int]:
    """The text, and how often it was steered."""
    text, streams, steered = "", 0, 0
    while text in model.tree:
        draft = model.continuation(text, streams)
        streams += 1
        for segment in draft:
            if score[text + segment] < threshold:
                sampled = [model.continuation(text, streams + i)[0] for i in range(candidates)]
                streams += candidates
                steered += 1
                text += max([segment, *sampled], key=lambda choice: score[text + choice])
                break
            text += segment
    return text, steered


@web.middleware
async def vllm_errors(http: web.Request, handler: Any) -> Any:
    try:
        return await handler(http)
    except GeneratorFailed as error:
        body = {"error": {"message": str(error), "type": error.kind, "param": None, "code": error.status}}
        return web.json_response(body, status=error.status)
    except ValuesUnavailable as error:
        return web.json_response({"error": {"message": str(error)}}, status=500)


@asynccontextmanager
async def listening(app: web.Application) -> AsyncGenerator[str, None]:
    """An application on a free port of the loopback; its address."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


TREE = full_tree(4, 3)
