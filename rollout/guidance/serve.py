"""An OpenAI-compatible endpoint of guided answers: ``python -m rollout.guidance.serve [guidance.…=…]``.

It runs in front of a running `vllm serve` and a value server. Routes: ``POST /v1/chat/completions``, ``POST
/v1/completions``, ``GET /v1/models``, ``GET /health`` (with counts of the answers). Errors have OpenAI's form.

In addition to OpenAI's fields, an answer has ``guidance``, which describes how it was generated: the steered segments,
the tokens, and in ``unguided`` the reason why it continued without values. A streamed chunk has the values of its
segment. When a client disconnects, its requests to both servers end.
"""

import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import hydra
from aiohttp import web
from aiohttp.typedefs import Handler
from omegaconf import DictConfig

from megatron_ext import settings as house_settings
from rollout.guidance import endpoint, settings
from rollout.guidance.clients import GeneratorFailed, ValuesUnavailable
from rollout.guidance.decoding import Answer, Step
from rollout.guidance.endpoint import COUNTS, Form, event
from rollout.guidance.openai_form import parse
from rollout.guidance.opening import OpenGuide, open_guide
from rollout.guidance.settings import GuidanceConfig

OPENED = web.AppKey("opened", OpenGuide)
# All answers, those that were steered, those that continued unguided, and those that did not end, because of an error
# or because the client disconnected.
NO_ANSWERS = {"answers": 0, "steered": 0, "unguided": 0, "not_ended": 0}


def answering(is_chat: bool) -> Handler:
    """Return the handler that answers a chat or a completion, streamed or not."""

    async def reply(http: web.Request) -> web.StreamResponse:
        request = parse(await endpoint.read_json(http), is_chat)
        opened = http.app[OPENED]
        question = await endpoint.question_of(request, opened, opened.guide.config.max_tokens)
        answer = opened.guide.answer(question)
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{answer.id}"
        form = Form(is_chat, name, question.model, request.return_token_ids)
        try:
            async with aclosing(answer.steps()) as steps:
                if request.stream:
                    return await stream(http, steps, answer, form, request.include_usage)
                text = ""
                token_ids: list[int] = []
                async for step in steps:
                    text += step.text
                    token_ids += step.token_ids
            # The usage counts the tokens of the answer. ``guidance`` also counts the dropped ones.
            usage = endpoint.usage(question, answer.answer_tokens)
            about = {"usage": usage, "guidance": answer.summary()}
            return web.json_response(form.whole(text, token_ids, answer.finish_reason, **about))
        finally:
            http.app[COUNTS].update(
                answers=1,
                steered=int(answer.steered > 0),
                unguided=int(answer.unguided is not None),
                not_ended=int(answer.finish_reason is None),
            )

    return reply


async def stream(
    http: web.Request, steps: AsyncGenerator[Step, None], answer: Answer, form: Form, include_usage: bool
) -> web.StreamResponse:
    """Send server-sent events: a chunk for each segment, one with the finish reason, and the usage if requested."""
    # The first segment comes before the response starts, so that an error before it still gets its own HTTP status.
    step: Step | None = await anext(steps)
    response = await endpoint.open_stream(http)
    try:
        while step is not None:
            about = {"values": step.values, "score": step.score, "origin": step.origin}
            await response.write(event(form.chunk(step.text, list(step.token_ids), None, guidance=about)))
            step = await anext(steps, None)
        await response.write(event(form.chunk("", [], answer.finish_reason, guidance=answer.summary())))
        if include_usage:
            await response.write(event(form.usage_chunk(endpoint.usage(answer.question, answer.answer_tokens))))
    except (GeneratorFailed, ValuesUnavailable) as error:
        await response.write(event(endpoint.error_body(error)[1]))
    await response.write(b"data: [DONE]\n\n")
    return response


def make_app(config: GuidanceConfig, token: str | None) -> web.Application:
    """Return the application, which connects to the servers when it starts.

    ``token`` is the token of clients, None for no token.
    """

    answers = {
        "/v1/chat/completions": answering(is_chat=True),
        "/v1/completions": answering(is_chat=False),
    }
    return endpoint.make_app(config.server, token, partial(open_guide, config), OPENED, answers, NO_ANSWERS)


@hydra.main(version_base="1.3", config_path="../../conf", config_name="guidance")
def main(raw: DictConfig) -> None:
    try:
        config = settings.read(raw.guidance)
        app = make_app(config, settings.key("guidance.server", config.server.key_variable))
        endpoint.serve(app, config.server, "guided answers")
    except (ValueError, OSError, GeneratorFailed, ValuesUnavailable) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    sys.argv[1:] = house_settings.with_new_keys(sys.argv[1:], house_settings.mappings(GuidanceConfig, "guidance"))
    main()
