"""Opens a guide that uses two running servers, for use in process and by the commands."""

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from rollout.guidance.calibration import read_threshold
from rollout.guidance.clients import Served, ServedGenerator, ServedValues, ValuesUnavailable
from rollout.guidance.decoding import DecisionLog, Guide
from rollout.guidance.router import open_router
from rollout.guidance.settings import MONITOR, STOP, GuidanceConfig


@dataclass(frozen=True)
class OpenGuide(Served):
    """A guide whose servers answer requests."""

    guide: Guide
    values: ServedValues


@asynccontextmanager
async def open_guide(config: GuidanceConfig) -> AsyncGenerator[OpenGuide, None]:
    """Connect to the servers and check them.

        async with open_guide(config) as opened:
            prompt = await opened.generator.encode_chat(opened.model, [{"role": "user", "content": "Hello"}], {})
            answer = opened.guide.answer(Question(opened.model, tuple(prompt), max_tokens=512))
            async for step in answer.steps():
                print(step.text, step.values)

    Raises ValueError for settings and files that don't fit. Raises GeneratorFailed or ValuesUnavailable for a server
    that does not work as it must.
    """
    router = open_router(config)
    generator = ServedGenerator(config.generator)
    values = ServedValues(config.values)
    try:
        models = await checked(generator, values)
        threshold = config.threshold
        if threshold is None:
            threshold = read_threshold(config, values.model) if config.mode == MONITOR else -math.inf
        log = DecisionLog(config.log)
        try:
            yield OpenGuide(generator, models, Guide(config, generator, values, router, threshold, log), values)
        finally:
            log.close()
    finally:
        await generator.close()
        await values.close()


async def checked(generator: ServedGenerator, values: ServedValues) -> list[dict[str, Any]]:
    """Check both servers and return the generator's models.

    Raises GeneratorFailed or ValuesUnavailable, with the remedy in the message.
    """
    models = await generator.checked_models("set guidance.generator.address")
    try:
        await values.check()
    except ValuesUnavailable as error:
        remedy = "start `vllm serve --runner pooling` with the value model there, or set guidance.values.address"
        raise ValuesUnavailable(f"{error}; {remedy}") from error
    return models


def only_scoring(config: GuidanceConfig) -> GuidanceConfig:
    """Return the configuration with which answers are scored and never steered, as for the calibration of a
    threshold."""
    values = replace(config.values, on_failure=STOP)
    return replace(config, mode=MONITOR, calibration=None, threshold=-math.inf, log=None, values=values)


def messages_of(row: Any, where: str) -> Sequence[Any]:
    """Return the conversation of a row of data: its ``prompt`` as a user message, or its ``messages``.

    Raises ValueError for a row that has neither.
    """
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return [{"role": "user", "content": row["prompt"]}]
    if isinstance(row, dict) and isinstance(row.get("messages"), list) and row["messages"]:
        messages: list[Any] = row["messages"]
        return messages
    raise ValueError(f"{where}: neither prompt, a text, nor messages, a list")
