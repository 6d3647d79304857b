"""The parts of an OpenAI-compatible endpoint in front of a running `vllm serve`.

They are the check of the client's token, the limit of concurrent answers, and the form of replies and errors. Errors
have OpenAI's form.
"""

import json
import secrets
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler

from rollout.environment import Unavailable
from rollout.guidance.clients import GeneratorFailed, Served, ValuesUnavailable
from rollout.guidance.decoding import Question
from rollout.guidance.openai_form import BadRequest, GuidedRequest
from rollout.guidance.settings import ServerConfig, is_loopback

# Counts of the answers since the start, by name.
COUNTS = web.AppKey("counts", Counter[str])
OPEN_PATHS = ("/health",)
# Time that a shutdown leaves answers in progress.
SHUTDOWN_SECONDS = 5.0


@dataclass(frozen=True)
class Form:
    """The form of a reply to a chat or a completion. ``more`` are fields in addition to OpenAI's."""

    is_chat: bool
    id: str
    model: str
    return_token_ids: bool

    def whole(self, text: str, token_ids: list[int], finish_reason: str | None, **more: Any) -> dict[str, Any]:
        """Return a reply that is not streamed."""
        shown = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **shown, "logprobs": None, "finish_reason": finish_reason}
        if self.return_token_ids:
            choice["token_ids"] = token_ids
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind, [choice], **more)

    def chunk(self, text: str, token_ids: list[int], finish_reason: str | None, **more: Any) -> dict[str, Any]:
        """Return a chunk of a streamed reply."""
        shown = {"delta": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **shown, "logprobs": None, "finish_reason": finish_reason}
        if self.return_token_ids:
            choice["token_ids"] = token_ids
        return self._envelope(self._chunk_kind, [choice], **more)

    def usage_chunk(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """Return the last chunk of a streamed reply, for a client that asks for the usage."""
        return self._envelope(self._chunk_kind, [], usage=usage)

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _envelope(self, kind: str, choices: list[Any], **more: Any) -> dict[str, Any]:
        created = int(time.time())
        return {"id": self.id, "object": kind, "created": created, "model": self.model, "choices": choices, **more}


def usage(question: Question, completion_tokens: int) -> dict[str, int]:
    """Return the numbers of tokens of prompt and answer, in OpenAI's form."""
    prompt = len(question.prompt_ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt + completion_tokens,
    }


async def question_of(request: GuidedRequest, served: Served, longest: int) -> Question:
    """Encode the prompt of a request, whose answer has at most ``longest`` tokens.

    Raises BadRequest when the answer can't have its length, and GeneratorFailed.
    """
    model = request.model or served.model
    generator = served.generator
    if request.messages is not None:
        prompt = await generator.encode_chat(model, request.messages, request.template)
    elif isinstance(request.prompt, str):
        prompt = await generator.encode(model, request.prompt, special_tokens=True)
    else:
        assert request.prompt is not None
        prompt = request.prompt
    if request.max_tokens is not None and request.max_tokens > longest:
        raise BadRequest(f"max_tokens={request.max_tokens}: this server answers with {longest} at most", "max_tokens")
    context = served.context(model)
    room = longest if context is None else min(context - len(prompt), longest)
    max_tokens = request.max_tokens or room
    if not 1 <= max_tokens <= room:
        raise BadRequest(
            f"the prompt has {len(prompt)} tokens, and the model takes {context} with the answer's: "
            f"max_tokens={max_tokens} do not fit",
            "max_tokens" if room >= 1 else "prompt",
        )
    return Question(model, tuple(prompt), max_tokens, request.sampling, request.stops, request.seed)


async def open_stream(http: web.Request) -> web.StreamResponse:
    """Start a response of server-sent events."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(http)
    return response


def event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def read_json(http: web.Request) -> Any:
    """Return the JSON body of a request. Raises BadRequest."""
    # A web page can send other content types to a loopback address without a preflight request.
    if http.content_type != "application/json":
        raise BadRequest(f"Content-Type: {http.content_type}: use application/json", None)
    try:
        body = json.loads(await http.read(), parse_constant=refuse_constant)
        json.dumps(body, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError: half of a surrogate pair
        return body
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}", None) from None


def refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which Python's parser takes and JSON does not have."""
    raise ValueError(f"{name} is no number in JSON")


def error_body(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the status of an error, and its body in OpenAI's form."""
    field: str | None = None
    message = str(error)
    if isinstance(error, BadRequest):
        status, kind, field = 400, "invalid_request_error", error.field
    elif isinstance(error, GeneratorFailed):
        status, kind = error.status, error.kind
    elif isinstance(error, ValuesUnavailable):
        status, kind = 503, "value_server_error"
    elif isinstance(error, Unavailable):
        status, kind = 503, "search_error"
    elif isinstance(error, web.HTTPException):
        status, kind, message = error.status, "invalid_request_error", error.text or error.reason
    else:
        status, kind = 500, "internal_error"
    return status, {"error": {"message": message, "type": kind, "param": field, "code": status}}


def make_app[T: Served](
    server: ServerConfig,
    token: str | None,
    open_served: Callable[[], AbstractAsyncContextManager[T]],
    opened: web.AppKey[T],
    answers: Mapping[str, Handler],
    counts: Mapping[str, int],
) -> web.Application:
    """Return the application.

    * ``token`` is the token that clients must send. If it is None, requests need no token, but must name the loopback
      as their host.
    * ``open_served`` opens what the application serves. It stays open as long as the application runs, at the
      application's key ``opened``, and its models are listed.
    * ``answers`` is path → handler of POST requests. At most ``max_requests`` of them run concurrently.
    * ``counts`` has the names of :data:`COUNTS` with their initial values.
    """
    required = None if token is None else f"Bearer {token}".encode()
    under_way = 0

    @web.middleware
    async def in_openai_s_form(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if required is not None and request.path not in OPEN_PATHS and not secrets.compare_digest(given, required):
            return refusal(401, "authentication_error", "no token, or a wrong one: send Authorization: Bearer TOKEN")
        if required is None and not names_loopback(request):
            message = "without a token this server is for http://127.0.0.1 alone: set key_variable for other names"
            return refusal(403, "permission_error", message)
        try:
            return await handler(request)
        except Exception as error:
            status, body = error_body(error)
            if status == 500:
                print(f"{request.path}: {type(error).__name__}: {error}", file=sys.stderr)
            return web.json_response(body, status=status)

    def limited(answer: Handler) -> Handler:
        async def handler(http: web.Request) -> web.StreamResponse:
            nonlocal under_way
            if under_way >= server.max_requests:
                message = f"{under_way} answers are under way, as many as this server gives at once; try again"
                return refusal(429, "rate_limit_error", message)
            under_way += 1
            try:
                return await answer(http)
            finally:
                under_way -= 1

        return handler

    async def connected(app: web.Application) -> AsyncGenerator[None, None]:
        async with open_served() as served:
            app[opened] = served
            yield

    async def list_models(http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": await http.app[opened].generator.models()})

    async def health(http: web.Request) -> web.Response:
        since_start: Counter[str] = http.app[COUNTS]
        return web.json_response({"under_way": under_way, **since_start})

    app = web.Application(client_max_size=int(server.max_request_mib * 2**20), middlewares=[in_openai_s_form])
    app[COUNTS] = Counter(counts)
    app.cleanup_ctx.append(connected)
    app.add_routes([web.get("/health", health), web.get("/v1/models", list_models)])
    app.add_routes([web.post(path, limited(answer)) for path, answer in answers.items()])
    return app


def names_loopback(request: web.Request) -> bool:
    """Return whether the Host header names the loopback.

    A request of a web page that reaches the server by DNS rebinding has the web page's host name there.
    """
    try:
        return is_loopback(request.headers.get("Host", ""))
    except ValueError:
        return False


def refusal(status: int, kind: str, message: str) -> web.Response:
    return web.json_response(
        {"error": {"message": message, "type": kind, "param": None, "code": status}}, status=status
    )


def serve(app: web.Application, server: ServerConfig, what: str) -> None:
    """Serve until a signal. A request whose client disconnects is cancelled.

    At the start it prints ``what`` is served, and the address.
    """

    async def announce(_: web.Application) -> None:
        print(f"{what} at http://{server.host}:{server.port}/v1", flush=True)

    app.on_startup.append(announce)
    web.run_app(
        app,
        host=server.host,
        port=server.port,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_SECONDS,
        access_log=None,
        print=None,
    )
