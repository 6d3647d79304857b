"""A bound on thinking: vLLM forces the end mark behind it, and here is which tokens that were."""

from collections.abc import Sequence
from typing import Any

Marks = tuple[Sequence[int], Sequence[int]]  # token ids that begin and that end the thinking


def reasoning_config(thinking: Marks) -> Any:
    """vLLM's ``ReasoningConfig`` with token ids. It would make them from strings, which needs a tokenizer in the
    engine; it keeps those it has (vLLM 0.32). Raises RuntimeError where another version does not."""
    from vllm.config.reasoning import ReasoningConfig

    begin, end = (list(mark) for mark in thinking)
    config = ReasoningConfig()
    config._reasoning_start_token_ids = begin
    config._reasoning_end_token_ids = config._natural_reasoning_end_token_ids = end
    config.initialize_token_ids(None)
    if not config.enabled:
        raise RuntimeError(
            "this vLLM's ReasoningConfig does not take token ids: rollout.thinking_budget needs vLLM 0.32"
        )
    return config


def forced_positions(prompt: Sequence[int], response: Sequence[int], thinking: Marks, budget: int) -> tuple[int, ...]:
    """Positions in the response that vLLM forced: the end mark behind ``budget`` tokens of thinking.

    Thinking may begin in the prompt (the chat template opens it) or in the response, more than once. The prompt holds
    what was generated before, too.
    """
    begin, end = (list(mark) for mark in thinking)
    tokens = [*prompt, *response]
    forced: list[int] = []
    opened = max(_last(prompt, begin), 0)
    if opened <= _last(prompt, end):
        opened = 0  # closed again, or never opened
    position = len(prompt)
    while position < len(tokens):
        if not opened:
            position += 1
            if tokens[position - len(begin) : position] == begin and position >= len(begin):
                opened = position
        elif position - opened >= budget:
            forced += range(position, min(position + len(end), len(tokens)))
            position += len(end)
            opened = 0
        else:
            position += 1
            if tokens[max(position - len(end), opened) : position] == end:
                opened = 0
    return tuple(place - len(prompt) for place in forced)


def _last(tokens: Sequence[int], mark: list[int]) -> int:
    """Where the last occurrence of ``mark`` ends; -1 without one."""
    ends = range(len(tokens), len(mark) - 1, -1)
    return next((stop for stop in ends if list(tokens[stop - len(mark) : stop]) == mark), -1)
