"""An OpenAI-compatible endpoint of guided answers: ``python -m rollout.guidance.serve [guidance.…=…]``.

It stands before a running `vllm serve` and a value server. Routes: ``POST /v1/chat/completions``, ``POST
/v1/completions``, ``GET /v1/models``, ``GET /health`` (with counts of the answers). Errors have OpenAI's form. Beside
OpenAI's fields, an answer has ``guidance`` (how it came about: steered segments, tokens, and in ``unguided`` why it
went on without values), and a streamed chunk the values of its segment. A client that disconnects ends its requests to
both servers.
"""

import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import hydra
from aiohttp import web
from aiohttp.typedefs import Handler
from omegaconf import DictConfig

from megatron_ext import settings as house_settings
from rollout.guidance import settings
from rollout.guidance.clients import GeneratorFailed, ValuesUnavailable
from rollout.guidance.decoding import Answer, Question, Step
from rollout.guidance.openai_form import BadRequest, GuidedRequest, parse
from rollout.guidance.opening import OpenGuide, open_guide
from rollout.guidance.settings import GuidanceConfig

OPENED = web.AppKey("opened", OpenGuide)
# Of the answers since the start: all, those that were steered, those that went on unguided, and those that have no end:
# an error, or a client that left.
COUNTS = web.AppKey("counts", Counter[str])
OPEN_PATHS = ("/health",)
SHUTDOWN_SECONDS = 5.0  # for answers under way


@dataclass(frozen=True)
class Form:
    """The form of a reply: of a chat or of a completion."""

    is_chat: bool
    id: str
    model: str
    return_token_ids: bool

    def whole(self, text: str, token_ids: list[int], answer: Answer) -> dict[str, Any]:
        """The reply that is not streamed."""
        shown = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **shown, "logprobs": None, "finish_reason": answer.finish_reason}
        if self.return_token_ids:
            choice["token_ids"] = token_ids
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind, [choice], usage=usage(answer), guidance=answer.summary())

    def chunk(self, text: str, token_ids: list[int], finish_reason: str | None, **more: Any) -> dict[str, Any]:
        """A part of a streamed reply."""
        shown = {"delta": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **shown, "logprobs": None, "finish_reason": finish_reason}
        if self.return_token_ids:
            choice["token_ids"] = token_ids
        return self._envelope(self._chunk_kind, [choice], **more)

    def usage_chunk(self, answer: Answer) -> dict[str, Any]:
        """The last part, for a client that asks for the usage."""
        return self._envelope(self._chunk_kind, [], usage=usage(answer))

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _envelope(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        created = int(time.time())
        return {"id": self.id, "object": kind, "created": created, "model": self.model, "choices": choices, **more}


def usage(answer: Answer) -> dict[str, int]:
    """The tokens of prompt and answer. What was generated and dropped is in ``guidance``."""
    prompt = len(answer.question.prompt_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer.answer_tokens,
        "total_tokens": prompt + answer.answer_tokens,
    }


async def question_of(request: GuidedRequest, opened: OpenGuide) -> Question:
    """Encode the prompt. Raises BadRequest for an answer that can't have its length, and GeneratorFailed."""
    model = request.model or opened.model
    generator = opened.generator
    if request.messages is not None:
        prompt = await generator.encode_chat(model, request.messages, request.template)
    elif isinstance(request.prompt, str):
        prompt = await generator.encode(model, request.prompt, special_tokens=True)
    else:
        assert request.prompt is not None
        prompt = request.prompt
    longest = opened.guide.config.max_tokens
    if request.max_tokens is not None and request.max_tokens > longest:
        raise BadRequest(f"max_tokens={request.max_tokens}: this server answers with {longest} at most", "max_tokens")
    context = opened.context(model)
    room = longest if context is None else min(context - len(prompt), longest)
    max_tokens = request.max_tokens or room
    if not 1 <= max_tokens <= room:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens, and the model takes {context} with the answer's: "
            f"max_tokens={max_tokens} do not fit",
            "max_tokens" if room >= 1 else "prompt",
        )
    return Question(model, tuple(prompt), max_tokens, request.sampling, request.stops, request.seed)


async def reply(http: web.Request, is_chat: bool) -> web.StreamResponse:
    """Answer one request, streamed or not."""
    request = parse(await read_json(http), is_chat)
    opened = http.app[OPENED]
    question = await question_of(request, opened)
    answer = opened.guide.answer(question)
    form = Form(is_chat, f"{'chatcmpl' if is_chat else 'cmpl'}-{answer.id}", question.model, request.return_token_ids)
    try:
        async with aclosing(answer.steps()) as steps:
            if request.stream:
                return await stream(http, steps, answer, form, request.include_usage)
            text = ""
            token_ids: list[int] = []
            async for step in steps:
                text += step.text
                token_ids += step.token_ids
        return web.json_response(form.whole(text, token_ids, answer))
    finally:
        http.app[COUNTS].update(
            answers=1,
            steered=int(answer.steered > 0),
            unguided=int(answer.unguided is not None),
            not_ended=int(answer.finish_reason is None),
        )


async def stream(
    http: web.Request, steps: AsyncGenerator[Step, None], answer: Answer, form: Form, include_usage: bool
) -> web.StreamResponse:
    """Server-sent events: a chunk for each segment, one with the finish reason, and the usage if asked for."""
    # An error before the first segment still has a status of its own.
    step: Step | None = await anext(steps)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(http)
    try:
        while step is not None:
            about = {"values": step.values, "score": step.score, "origin": step.origin}
            await response.write(event(form.chunk(step.text, list(step.token_ids), None, guidance=about)))
            step = await anext(steps, None)
        await response.write(event(form.chunk("", [], answer.finish_reason, guidance=answer.summary())))
        if include_usage:
            await response.write(event(form.usage_chunk(answer)))
    except (GeneratorFailed, ValuesUnavailable) as error:
        await response.write(event(error_body(error)[1]))
    await response.write(b"data: [DONE]\n\n")
    return response


def event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def read_json(http: web.Request) -> Any:
    """The JSON body. Raises BadRequest."""
    # A web page can send other types to a loopback address without asking.
    if http.content_type != "application/json":
        raise BadRequest(f"Content-Type: {http.content_type}: use application/json", None)
    try:
        return json.loads(await http.read())
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}", None) from None


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body, in OpenAI's form, of an error."""
    field: str | None = None
    message = str(error)
    if isinstance(error, BadRequest):
        status, kind, field = 400, "invalid_request_error", error.field
    elif isinstance(error, GeneratorFailed):
        status, kind = error.status, error.kind
    elif isinstance(error, ValuesUnavailable):
        status, kind = 503, "value_server_error"
    elif isinstance(error, web.HTTPException):
        status, kind, message = error.status, "invalid_request_error", error.text or error.reason
    else:
        status, kind = 500, "internal_error"
    return status, {"error": {"message": message, "type": kind, "param": field, "code": status}}


def make_app(config: GuidanceConfig, token: str | None) -> web.Application:
    """The application; it connects to the servers when it starts. ``token`` of clients, None for no token."""
    required = None if token is None else f"Bearer {token}".encode()
    under_way = 0

    @web.middleware
    async def in_openai_s_form(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if required is not None and request.path not in OPEN_PATHS and not secrets.compare_digest(given, required):
            return refusal(401, "authentication_error", "no token, or a wrong one: send Authorization: Bearer TOKEN")
        try:
            return await handler(request)
        except Exception as error:
            status, body = error_body(error)
            if status == 500:
                print(f"{request.path}: {type(error).__name__}: {error}", file=sys.stderr)
            return web.json_response(body, status=status)

    def limited(is_chat: bool) -> Handler:
        async def handler(http: web.Request) -> web.StreamResponse:
            nonlocal under_way
            if under_way >= config.server.max_requests:
                message = f"{under_way} answers are under way, as many as this server gives at once; try again"
                return refusal(429, "rate_limit_error", message)
            under_way += 1
            try:
                return await reply(http, is_chat)
            finally:
                under_way -= 1

        return handler

    async def models(http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": await http.app[OPENED].generator.models()})

    async def health(http: web.Request) -> web.Response:
        counts: Counter[str] = http.app[COUNTS]
        return web.json_response({"under_way": under_way, **counts})

    async def connected(app: web.Application) -> AsyncGenerator[None, None]:
        async with open_guide(config) as opened:
            app[OPENED] = opened
            yield

    app = web.Application(client_max_size=int(config.server.max_request_mib * 2**20), middlewares=[in_openai_s_form])
    app[COUNTS] = Counter(answers=0, steered=0, unguided=0, not_ended=0)
    app.cleanup_ctx.append(connected)
    app.add_routes(
        [
            web.get("/health", health),
            web.get("/v1/models", models),
            web.post("/v1/chat/completions", limited(is_chat=True)),
            web.post("/v1/completions", limited(is_chat=False)),
        ]
    )
    return app


def refusal(status: int, kind: str, message: str) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status
    )


@hydra.main(version_base="1.3", config_path="../../conf", config_name="guidance")
def main(raw: DictConfig) -> None:
    try:
        config = settings.read(raw.guidance)
        app = make_app(config, settings.key("guidance.server", config.server.key_variable))

        async def announce(_: web.Application) -> None:
            print(f"guided answers at http://{config.server.host}:{config.server.port}/v1", flush=True)

        app.on_startup.append(announce)
        web.run_app(
            app,
            host=config.server.host,
            port=config.server.port,
            handler_cancellation=True,
            shutdown_timeout=SHUTDOWN_SECONDS,
            access_log=None,
            print=None,
        )
    except (ValueError, OSError, GeneratorFailed, ValuesUnavailable) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = house_settings.with_new_keys(sys.argv[1:], house_settings.mappings(GuidanceConfig, "guidance"))
    main()
