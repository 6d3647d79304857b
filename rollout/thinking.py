"""Handles the thinking in responses.

Some functions are for texts whose thinking begins in the prompt. The others are for a thinking budget: vLLM forces the
end mark when the budget is used up, and :func:`forced_positions` finds the forced tokens.
"""

from collections.abc import Sequence
from typing import Any

from megatron_ext.batch import Array

Marks = tuple[Sequence[int], Sequence[int]]
"""Token ids of the mark that begins the thinking, and of the mark that ends it."""

# A mark that a chat template ends with is within this many tokens at the end of a prompt.
PROMPT_END = 16


def opens_thinking(tokenizer: Any, prompt: Array, begin: str) -> bool:
    """Return whether a prompt, int [tokens], ends with the mark that begins the thinking, as with some chat
    templates."""
    end = tokenizer.decode(prompt[-PROMPT_END:].tolist())
    return end.rstrip().endswith(begin)


def with_opening(text: str, begin: str) -> str:
    """Return the text of a response whose thinking begins in the prompt, with the begin mark in front."""
    return text if text.lstrip().startswith(begin) else f"{begin}\n{text}"


def without_opening(text: str, begin: str) -> str:
    """Return a text without a begin mark at its start, so that it can follow a prompt that ends with the mark."""
    if not text.lstrip().startswith(begin):
        return text
    return text.lstrip().removeprefix(begin).lstrip("\n")


def whole_text(tokenizer: Any, prompt: Array, text: str, begin: str) -> str:
    """Return the text of a response to a prompt, int [tokens], with the begin mark in front if the prompt ends with
    it."""
    return with_opening(text, begin) if opens_thinking(tokenizer, prompt, begin) else text


def reasoning_config(thinking: Marks) -> Any:
    """Return vLLM's ``ReasoningConfig`` with the token ids of the marks.

    vLLM encodes the marks from strings, which needs a tokenizer in the engine. vLLM 0.32 keeps ids that are already
    set. Raises RuntimeError for a version that does not.
    """
    from vllm.config.reasoning import ReasoningConfig

    begin, end = (list(mark) for mark in thinking)
    config = ReasoningConfig()
    config._reasoning_start_token_ids = begin
    config._reasoning_end_token_ids = end
    config._natural_reasoning_end_token_ids = end
    config.initialize_token_ids(None)
    if not config.enabled:
        raise RuntimeError(
            "this vLLM's ReasoningConfig does not take token ids: rollout.thinking_budget needs vLLM 0.32"
        )
    return config


def forced_positions(prompt: Sequence[int], response: Sequence[int], thinking: Marks, budget: int) -> tuple[int, ...]:
    """Return the positions in the response of the tokens that vLLM forced.

    These are the tokens of the end mark after ``budget`` tokens of thinking. Thinking may begin in the prompt, by the
    chat template, or in the response, and more than once. ``prompt`` includes the tokens of earlier rounds.
    """
    begin, end = (list(mark) for mark in thinking)
    tokens = [*prompt, *response]
    forced: list[int] = []
    # The position at which the present thinking started, 0 outside of thinking.
    thinking_start = max(_end_of_last(begin, prompt), 0)
    if thinking_start <= _end_of_last(end, prompt):
        thinking_start = 0
    position = len(prompt)
    while position < len(tokens):
        if not thinking_start:
            position += 1
            if tokens[position - len(begin) : position] == begin and position >= len(begin):
                thinking_start = position
        elif position - thinking_start >= budget:
            forced += range(position, min(position + len(end), len(tokens)))
            position += len(end)
            thinking_start = 0
        else:
            position += 1
            if tokens[max(position - len(end), thinking_start) : position] == end:
                thinking_start = 0
    return tuple(place - len(prompt) for place in forced)


def _end_of_last(mark: list[int], tokens: Sequence[int]) -> int:
    """Return where the last occurrence of ``mark`` ends, -1 if there is none."""
    for stop in range(len(tokens), len(mark) - 1, -1):
        if list(tokens[stop - len(mark) : stop]) == mark:
            return stop
    return -1
