"""An OpenAI-compatible endpoint of deliberate search: ``python -m rollout.deliberation.serve [deliberation.…=…]``.

It runs in front of a running `vllm serve` of a model that was trained to search, and searches the documents that
``rollout.environment.settings`` names. Routes: ``POST /v1/chat/completions``, ``GET /v1/sources?id=…`` (the text of a
document), ``GET /v1/models``, ``GET /health``. Errors have OpenAI's form.

A reply is the answer of the vote. In addition to OpenAI's fields it has ``deliberation``: both votes, their confidence
and sources, and the samples. In a streamed reply, ``deliberation`` of a chunk is a step. A request may have
``samples``, the number of samples. When a client disconnects, its requests to the model end.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import hydra
from aiohttp import web
from omegaconf import DictConfig

from megatron_ext import settings as house_settings
from rollout.deliberation import settings
from rollout.deliberation.deliberating import Deliberation, Deliberator, link, open_deliberator
from rollout.deliberation.episodes import ShownStep
from rollout.deliberation.settings import DeliberationConfig
from rollout.environment import Unavailable
from rollout.guidance import endpoint
from rollout.guidance.clients import GeneratorFailed
from rollout.guidance.endpoint import COUNTS, Form, event
from rollout.guidance.openai_form import BadRequest, GuidedRequest, parse
from rollout.guidance.settings import key
from rollout.settings import EnvironmentConfig, RolloutConfig

OPENED = web.AppKey("opened", Deliberator)
# All answers, those for which no sample had an answer, and those that did not end, because of an error or because the
# client disconnected.
NO_ANSWERS = {"answers": 0, "without_answer": 0, "not_ended": 0}


def parse_request(body: Any, config: DeliberationConfig) -> tuple[GuidedRequest, int]:
    """Return the request in a JSON body, and its number of samples. Raises BadRequest.

    A request without a temperature gets the configured one.
    """
    samples = config.samples
    if isinstance(body, dict) and "samples" in body:
        samples = body.pop("samples")
        if type(samples) is not int or not 1 <= samples <= config.samples:
            raise BadRequest(f"samples={samples!r}: give an integer from 1 to {config.samples}", "samples")
    request = parse(body, is_chat=True)
    if request.stops or request.return_token_ids:
        field = "stop" if request.stops else "return_token_ids"
        raise BadRequest(f"{field}: this server does not have it; leave it out", field)
    return replace(request, sampling={"temperature": config.temperature, **request.sampling}), samples


async def reply(http: web.Request) -> web.StreamResponse:
    """Answer a chat, streamed or not."""
    opened = http.app[OPENED]
    request, samples = parse_request(await endpoint.read_json(http), opened.config)
    question = await endpoint.question_of(request, opened, opened.config.max_tokens)
    deliberation = opened.deliberate(question, samples)
    form = Form(True, f"chatcmpl-{deliberation.id}", question.model, False)
    try:
        async with aclosing(deliberation.steps()) as steps:
            if request.stream:
                return await stream(http, steps, deliberation, form, request.include_usage)
            async for _ in steps:
                pass
        text, finish_reason = outcome(deliberation)
        usage = endpoint.usage(question, deliberation.tokens)
        return web.json_response(form.whole(text, [], finish_reason, usage=usage, deliberation=deliberation.summary()))
    finally:
        is_complete = deliberation.is_complete
        http.app[COUNTS].update(
            answers=1,
            without_answer=int(is_complete and deliberation.chosen is None),
            not_ended=int(not is_complete),
        )


async def stream(
    http: web.Request,
    steps: AsyncGenerator[ShownStep, None],
    deliberation: Deliberation,
    form: Form,
    include_usage: bool,
) -> web.StreamResponse:
    """Send server-sent events: a chunk without text for each step, one with the answer, and the usage if requested."""
    # The first step comes before the response starts, so that an error before it still gets its own HTTP status.
    step: ShownStep | None = await anext(steps)
    response = await endpoint.open_stream(http)
    try:
        while step is not None:
            await response.write(event(form.chunk("", [], None, deliberation=step_json(step))))
            step = await anext(steps, None)
        text, finish_reason = outcome(deliberation)
        await response.write(event(form.chunk(text, [], finish_reason, deliberation=deliberation.summary())))
        if include_usage:
            await response.write(event(form.usage_chunk(endpoint.usage(deliberation.question, deliberation.tokens))))
    except (GeneratorFailed, Unavailable) as error:
        await response.write(event(endpoint.error_body(error)[1]))
    await response.write(b"data: [DONE]\n\n")
    return response


def outcome(deliberation: Deliberation) -> tuple[str, str]:
    """Return the answer of the vote, and OpenAI's finish reason.

    Without an answer, the text is empty. The finish reason is then "length" if a sample reached its maximum number of
    tokens or turns, else "stop".
    """
    chosen = deliberation.chosen
    if chosen is not None:
        return chosen.answer, "stop"
    reasons = {episode.finish_reason for episode in deliberation.episodes}
    return "", "length" if reasons & {"length", "turns"} else "stop"


def step_json(shown: ShownStep) -> dict[str, Any]:
    """Return a step as JSON for a client."""
    documents = [{**asdict(document), "link": link(document.id)} for document in shown.documents]
    return {"sample": shown.sample, **asdict(shown.step), "reply": shown.reply, "documents": documents}


async def source(http: web.Request) -> web.Response:
    """Return the text of a document."""
    document_id = http.query.get("id", "")
    text = await asyncio.to_thread(http.app[OPENED].search.retriever.read, document_id)
    if text is None:
        raise web.HTTPNotFound(text=f"id={document_id!r}: no such document")
    return web.json_response({"id": document_id, "text": text, "link": link(document_id)})


def make_app(config: DeliberationConfig, environment: EnvironmentConfig, token: str | None) -> web.Application:
    """Return the application, which connects to the servers when it starts.

    ``token`` is the token of clients, None for no token.
    """

    answers = {"/v1/chat/completions": reply}
    open_served = partial(open_deliberator, config, environment)
    app = endpoint.make_app(config.server, token, open_served, OPENED, answers, NO_ANSWERS)
    app.add_routes([web.get("/v1/sources", source)])
    return app


@hydra.main(version_base="1.3", config_path="../../conf", config_name="deliberation")
def main(raw: DictConfig) -> None:
    try:
        config = settings.read(raw.deliberation)
        token = key("deliberation.server", config.server.key_variable)
        app = make_app(config, settings.read_environment(raw.rollout.environment), token)
        endpoint.serve(app, config.server, "deliberate search")
    except (ValueError, OSError, GeneratorFailed, Unavailable) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = house_settings.with_new_keys(sys.argv[1:], house_settings.mappings(RolloutConfig, "rollout"))
    main()
