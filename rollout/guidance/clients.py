"""Clients of the two servers: one continues token ids, the other returns the values of prefixes.

Both servers are unmodified `vllm serve`. Requests go through the openai client, which pools connections and retries
requests without a reply.
"""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import openai

from rollout.guidance.settings import GeneratorConfig, ValuesConfig, is_loopback, key

EXCERPT_CHARACTERS = 500


class GeneratorFailed(RuntimeError):
    """The generator refused a request, or failed. ``status`` is the HTTP status that a client should get."""

    def __init__(self, message: str, status: int = 502, kind: str = "upstream_error") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class ValuesUnavailable(RuntimeError):
    """The value server returned no values: it is dead or slow, or its reply is invalid."""


@dataclass(frozen=True)
class Piece:
    """One chunk of a stream, usually one token."""

    # The text lags behind the tokens where a character takes several tokens. It is empty for the token that ends an
    # answer.
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    # The stop string that ended the stream, if one did.
    stopped_at: str | None = None


class Generator(Protocol):
    """The interface that guided decoding needs of a generator. ``model`` is the name of a model that it serves."""

    def stream(self, model: str, token_ids: Sequence[int], options: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """Continue the token ids. ``options`` are fields of vLLM's request, among them ``max_tokens``."""
        ...

    async def encode(self, model: str, text: str, special_tokens: bool) -> list[int]:
        """Return the token ids of a text, with the special tokens that begin a text if ``special_tokens``."""
        ...

    async def decode(self, model: str, token_ids: Sequence[int]) -> str:
        """Return the text of token ids, including special tokens."""
        ...


class Values(Protocol):
    """The interface that guided decoding needs of a value model."""

    async def score(self, prefixes: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Return the values of each prefix, one for each principle. Raises ValuesUnavailable."""
        ...


def open_client(address: str, token: str | None, timeout: float, retries: int) -> openai.AsyncOpenAI:
    # A proxy that environment variables name can't reach this machine's loopback, so that is connected to directly.
    # With None, the client uses its default, which uses the proxy.
    direct = None
    if is_loopback(urlsplit(address).netloc):
        # The certificates that environment variables name are still used.
        direct = openai.DefaultAsyncHttpxClient(trust_env=False, verify=httpx.create_ssl_context())
    # Without a token the client would send OPENAI_API_KEY, which is a key for another server.
    client = openai.AsyncOpenAI(
        base_url=f"{address}/v1", api_key=token or "none", timeout=timeout, max_retries=retries, organization="",
        project="", http_client=direct,
    )  # fmt: skip
    return client


class ServedGenerator:
    """A model that `vllm serve` serves. The methods raise GeneratorFailed."""

    def __init__(self, config: GeneratorConfig, field: str = "guidance.generator") -> None:
        """Open the client. ``field`` is the name of ``config`` in the configuration.

        Raises ValueError when the environment lacks the token.
        """
        self.address = config.address
        token = key(field, config.key_variable)
        self.client = open_client(config.address, token, config.timeout, config.retries)

    async def models(self) -> list[dict[str, Any]]:
        """Return the models that the server lists under /v1/models."""
        try:
            return await served_models(self.client, self.address)
        except openai.OpenAIError as error:
            raise _failed(self.address, error) from error

    async def checked_models(self, remedy: str) -> list[dict[str, Any]]:
        """Return :meth:`models`, of which there is at least one. The error's message includes the ``remedy``."""
        try:
            models = await self.models()
        except GeneratorFailed as error:
            raise GeneratorFailed(f"{error}; start `vllm serve` there, or {remedy}") from error
        if not models:
            raise GeneratorFailed(f"{self.address} serves no model; {remedy}")
        return models

    async def stream(
        self, model: str, token_ids: Sequence[int], options: Mapping[str, Any]
    ) -> AsyncGenerator[Piece, None]:
        body = {**options, "model": model, "prompt": list(token_ids), "stream": True, "return_token_ids": True}
        try:
            stream = await self.client.post(
                "/completions", body=body, cast_to=object, stream=True, stream_cls=openai.AsyncStream[object]
            )
            # When the connection is closed, vLLM drops the request.
            async with stream:
                async for chunk in stream:
                    piece = _piece(self.address, chunk)
                    if piece is None:
                        continue
                    yield piece
                    if piece.finish_reason is not None:
                        return
        except openai.OpenAIError as error:
            raise _failed(self.address, error) from error
        except json.JSONDecodeError as error:
            raise GeneratorFailed(f"{self.address}: not JSON: {error}") from error
        raise GeneratorFailed(f"{self.address}: the stream ended before the answer did")

    async def encode_chat(self, model: str, messages: Sequence[Any], options: Mapping[str, Any]) -> list[int]:
        """Return the prompt that the model's chat template renders from the messages."""
        return await self._tokens({**options, "model": model, "messages": list(messages)})

    async def encode(self, model: str, text: str, special_tokens: bool) -> list[int]:
        return await self._tokens({"model": model, "prompt": text, "add_special_tokens": special_tokens})

    async def _tokens(self, body: Mapping[str, Any]) -> list[int]:
        reply = await self._post("/tokenize", body)
        tokens = reply.get("tokens") if isinstance(reply, dict) else None
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise GeneratorFailed(f"{self.address}/tokenize: no token ids: {_excerpt(reply)}")
        return tokens

    async def decode(self, model: str, token_ids: Sequence[int]) -> str:
        reply = await self._post("/detokenize", {"model": model, "tokens": list(token_ids)})
        text = reply.get("prompt") if isinstance(reply, dict) else None
        if not isinstance(text, str):
            raise GeneratorFailed(f"{self.address}/detokenize: no text: {_excerpt(reply)}")
        return text

    async def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            return await self.client.post(f"{self.address}{path}", body=body, cast_to=object)
        except openai.OpenAIError as error:
            raise _failed(self.address, error) from error
        except json.JSONDecodeError as error:
            raise GeneratorFailed(f"{self.address}{path}: not JSON: {error}") from error

    async def close(self) -> None:
        await self.client.close()


@dataclass(frozen=True)
class Served:
    """A generator that answers requests, and the ``models`` that it lists."""

    generator: ServedGenerator
    models: list[dict[str, Any]]

    @property
    def model(self) -> str:
        """The first model that the generator serves."""
        return str(self.models[0]["id"])

    def context(self, model: str) -> int | None:
        """Return the maximum tokens of prompt and answer together, as vLLM states it; None for an unknown model."""
        lengths = [entry.get("max_model_len") for entry in self.models if entry["id"] == model]
        return lengths[0] if lengths else None


class ServedValues:
    """A value model that `vllm serve --runner pooling` serves."""

    def __init__(self, config: ValuesConfig) -> None:
        """Raises ValueError when the environment lacks the token."""
        self.config = config
        token = key("guidance.values", config.key_variable)
        self.client = open_client(config.address, token, config.timeout, config.retries)
        # The name of the server's first model, set by :meth:`check`.
        self.model = ""

    async def check(self) -> None:
        """Read the name of the server's model, and score one token as a test. Raises ValuesUnavailable."""
        address = self.config.address
        try:
            models = await served_models(self.client, address)
        except openai.OpenAIError as error:
            raise ValuesUnavailable(_reason(address, error)) from error
        if not models:
            raise ValuesUnavailable(f"{address}/v1/models: no models")
        self.model = str(models[0]["id"])
        await self.score([[0]])

    async def score(self, prefixes: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Score the prefixes with `classify`.

        It uses the prefix cache, so a prefix costs about as much as the tokens in it that are new.
        """
        url = f"{self.config.address}/classify"
        body = {"model": self.model, "input": [list(prefix) for prefix in prefixes]}
        try:
            async with asyncio.timeout(self.config.timeout):
                reply = await self.client.post(url, body=body, cast_to=object)
        except TimeoutError:
            raise ValuesUnavailable(f"{url}: no values in {self.config.timeout:g} s") from None
        except openai.OpenAIError as error:
            raise ValuesUnavailable(_reason(url, error)) from error
        except json.JSONDecodeError as error:
            raise ValuesUnavailable(f"{url}: not JSON: {error}") from error
        return self._values(url, reply, len(prefixes))

    def _values(self, url: str, reply: object, count: int) -> list[tuple[float, ...]]:
        """Return the values in a reply, which may be any JSON. Raises ValuesUnavailable for an invalid reply."""
        expected = len(self.config.principles)
        try:
            data = sorted(reply["data"], key=lambda entry: entry["index"])  # type: ignore[index]
            values = [tuple(float(value) for value in entry["probs"]) for entry in data]
        except (LookupError, TypeError, ValueError) as error:
            raise ValuesUnavailable(f"{url}: not the reply of classify ({error!r}): {_excerpt(reply)}") from error
        if len(values) != count:
            raise ValuesUnavailable(f"{url}: {len(values)} prefixes have values, {count} were asked for")
        for row in values:
            if len(row) != expected:
                raise ValuesUnavailable(
                    f"{url}: {len(row)} values of a prefix; guidance.values.principles has {expected} names"
                )
            if not all(map(math.isfinite, row)):
                raise ValuesUnavailable(f"{url}: a value is not a finite number: {row}")
        return values

    async def close(self) -> None:
        await self.client.close()


async def served_models(client: openai.AsyncOpenAI, address: str) -> list[dict[str, Any]]:
    reply: Any = await client.get("/models", cast_to=object)
    models = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(models, list) or not all(isinstance(entry, dict) and "id" in entry for entry in models):
        raise openai.OpenAIError(f"{address}/v1/models: not a list of models: {_excerpt(reply)}")
    return models


def _piece(address: str, chunk: Any) -> Piece | None:
    """Return the piece in a chunk of the stream, or None for a usage chunk."""
    try:
        if not chunk["choices"]:
            return None
        choice = chunk["choices"][0]
        text, token_ids, finish_reason = choice["text"], choice.get("token_ids"), choice["finish_reason"]
        # This is a stop string, or the id of the stop token.
        stop_reason = choice.get("stop_reason")
    except (LookupError, TypeError, AttributeError) as error:
        raise GeneratorFailed(f"{address}: not a chunk of a completion ({error!r}): {_excerpt(chunk)}") from error
    if token_ids is None:
        raise GeneratorFailed(f"{address}: no token ids in the stream; vLLM's return_token_ids is needed")
    return Piece(text, tuple(token_ids), finish_reason, stop_reason if isinstance(stop_reason, str) else None)


def _failed(address: str, error: openai.OpenAIError) -> GeneratorFailed:
    """Convert an error of the openai client.

    A refused request keeps its status, so that the client sees it as its own mistake. A refusal of this server's token
    does not.
    """
    if isinstance(error, openai.APIStatusError) and error.status_code in (400, 404, 413, 422, 429):
        return GeneratorFailed(error.message, error.status_code, str(error.type or "invalid_request_error"))
    return GeneratorFailed(_reason(address, error))


def _reason(url: str, error: openai.OpenAIError) -> str:
    cause = f": {error.__cause__}" if error.__cause__ is not None else ""
    return f"{url}: {type(error).__name__}: {error}{cause}"[:EXCERPT_CHARACTERS]


def _excerpt(reply: object) -> str:
    return json.dumps(reply, default=str)[:EXCERPT_CHARACTERS]
