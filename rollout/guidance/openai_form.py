"""Parses requests in OpenAI's form, and checks what they contain."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Fields that go to the generator unchanged. The generator checks them.
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "stop_token_ids", "ignore_eos",
    "bad_words",
)  # fmt: skip
# Fields of the chat template.
TEMPLATE = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")
# Fields that are accepted only with these values, which have no effect. Our endpoints do not support other values: they
# give one answer to one prompt, and a penalty on earlier tokens would start anew at each segment or turn.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "stream_options": ({}, {"include_usage": False}),
}
OWN = ("model", "messages", "prompt", "max_tokens", "max_completion_tokens", "seed", "stop", "stream", "user")
MAX_STOPS = 16
LONGEST_STOP = 200  # characters


class BadRequest(ValueError):
    """A request that the endpoint refuses, because of its field ``field``."""

    def __init__(self, message: str, field: str | None) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class GuidedRequest:
    """A request that was checked."""

    model: str | None
    # The messages of a chat; None for a completion.
    messages: list[Any] | None
    # The text or token ids of a completion; None for a chat.
    prompt: str | list[int] | None
    # The fields of the chat template.
    template: dict[str, Any]
    sampling: dict[str, Any]
    # None where the request has none.
    max_tokens: int | None
    seed: int | None
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool


def parse(body: object, is_chat: bool) -> GuidedRequest:
    """Return the request in a JSON body. Raises BadRequest."""
    if not isinstance(body, dict):
        raise BadRequest("the body is not a JSON object", None)
    given = {field: value for field, value in body.items() if value is not None}
    include_usage = given.get("stream_options") == {"include_usage": True}
    if include_usage:
        del given["stream_options"]
    allowed = (*OWN, *SAMPLING, "return_token_ids", *(TEMPLATE if is_chat else ()))
    for field, value in given.items():
        if field in NEUTRAL:
            # The type is compared too, because 1 == True, and logprobs=1 of a completion asks for log-probs.
            if not any(value == neutral and type(value) in (type(neutral), float) for neutral in NEUTRAL[field]):
                raise BadRequest(f"{field}={value!r}: this server does not have it; leave it out", field)
        elif field not in allowed:
            raise BadRequest(f"{field}: this server does not know it; leave it out", field)
    return GuidedRequest(
        model=_text(given, "model"),
        messages=_messages(given) if is_chat else None,
        prompt=None if is_chat else _prompt(given),
        template={field: given[field] for field in TEMPLATE if field in given},
        sampling={field: given[field] for field in SAMPLING if field in given},
        max_tokens=_max_tokens(given),
        seed=_integer(given, "seed", 0, 2**62),
        stops=_stops(given),
        stream=_boolean(given, "stream"),
        include_usage=include_usage,
        return_token_ids=_boolean(given, "return_token_ids"),
    )


def _text(given: Mapping[str, Any], field: str) -> str | None:
    value = given.get(field)
    if value is not None and not isinstance(value, str):
        raise BadRequest(f"{field}={value!r}: give a text", field)
    return value


def _boolean(given: Mapping[str, Any], field: str) -> bool:
    value = given.get(field, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{field}={value!r}: use true or false", field)
    return value


def _integer(given: Mapping[str, Any], field: str, least: int, most: float = math.inf) -> int | None:
    value = given.get(field)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise BadRequest(f"{field}={value!r}: give an integer of {least} or more", field)
    return value


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    names = [field for field in ("max_completion_tokens", "max_tokens") if field in given]
    return _integer(given, names[0], 1) if names else None


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= LONGEST_STOP for text in stops)
    ):
        raise BadRequest(f"stop: give up to {MAX_STOPS} texts of 1 to {LONGEST_STOP} characters", "stop")
    return tuple(stops)


def _messages(given: Mapping[str, Any]) -> list[Any]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages: give a list of {role, content}", "messages")
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else message
        parts = content if isinstance(content, list) else []
        if not isinstance(message, dict) or not isinstance(content, str | list):
            raise BadRequest("messages: each is {role, content}, and the content a text", "messages")
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            # The `classify` of a value model takes only token ids.
            raise BadRequest("messages: this server takes text alone, no images or other parts", "messages")
    return messages


def _prompt(given: Mapping[str, Any]) -> str | list[int]:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    is_ids = isinstance(prompt, list) and all(type(token) is int and token >= 0 for token in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise BadRequest("prompt: give one text, or the token ids of one", "prompt")
    assert isinstance(prompt, str | list)
    return prompt
