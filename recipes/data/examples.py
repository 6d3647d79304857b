"""Conversations → what is learnt from them: a prompt, the tokens behind it, and which of those are the assistant's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.packing import PackedSequence, VisionInputs
from recipes.data import judging, specification
from recipes.data.conversations import ASSISTANT, conversation
from recipes.data.episodes import episode_tokens
from recipes.data.processor import PromptProcessor
from recipes.data.prompts import Row
from recipes.errors import ConfigError

Aggregation = Callable[[list[int]], list[list[float]]]


@dataclass(frozen=True)
class Example:
    """``response``: all tokens behind the prompt; ``learnt`` marks the assistant's, whose loss counts. Between two
    answers stand what the others say and the chat template's own tokens, in an answer an environment's replies."""

    prompt: list[int]
    response: list[int]
    learnt: list[bool]
    vision: VisionInputs | None


def check(processor: PromptProcessor, source: Any, judge: str | None, thinking_begins: str, longest: int) -> int:
    """Load a source and make every example once; returns their number. Raises ConfigError naming row and field."""
    rows = judging.judge_sft_rows(source, judge)
    for row in rows:
        try:
            example(processor, row, thinking_begins, longest)
        except ConfigError as error:
            raise ConfigError(f"{specification.shown(source)}: {error}") from error
    return len(rows)


def example(processor: PromptProcessor, row: Row, thinking_begins: str, longest: int) -> Example:
    """The row as the engines would see it: the prompt is what they are asked, an answer ends by the end-of-turn token.

    Where the chat template has written ``thinking_begins`` at the end of the prompt already, an answer that begins with
    it goes on behind it.

    Raises ConfigError naming the row for messages in an impossible order, an image behind the first answer, a chat
    template that shows an answer otherwise once the conversation goes on, and more than ``longest`` tokens.
    """
    turns = conversation(row)
    answers = [place for place, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    made = processor({**row, "messages": turns[: answers[0]]} if "messages" in row else row)
    prompt = list(made.prompt.token_ids)
    opened = processor.tokenizer.decode(prompt[-16:]).rstrip().endswith(thinking_begins)
    response: list[int] = []
    learnt: list[bool] = []
    shown = ""
    for place in answers:
        if response:
            text = _behind(processor.tokenizer, row, turns[:place], shown)
            between = processor.tokenizer.encode(text, add_special_tokens=False)
            response, learnt = response + between, learnt + [False] * len(between)
        text = turns[place]["content"]
        if opened and text.lstrip().startswith(thinking_begins):
            text = text.lstrip().removeprefix(thinking_begins).lstrip("\n")
        spans = row.get("environment", []) if place == answers[-1] else []
        removed = len(turns[place]["content"]) - len(text)  # before the first span, as it was thinking's mark
        spans = [[start - removed, end - removed] for start, end in spans]
        answer, own = episode_tokens(processor.tokenizer, {**row, "response": text, "environment": spans})
        response, learnt = response + answer, learnt + own
        shown = _rendered(processor.tokenizer, turns[:place]) + text + processor.tokenizer.eos_token
    if (tokens := len(prompt) + len(response)) > longest:
        raise ConfigError(
            f"row {row['id']!r} has {tokens} tokens, parallel.micro_batch_tokens={longest}: raise it or drop the row"
        )
    return Example(prompt, response, learnt, made.vision)


def _rendered(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _behind(tokenizer: Any, row: Row, turns: Sequence[dict[str, str]], shown: str) -> str:
    """What the template puts behind an answer up to the next one. Raises ConfigError naming the row."""
    text = _rendered(tokenizer, turns)
    if not text.startswith(shown):
        raise ConfigError(
            f"row {row['id']!r}: the chat template shows an answer otherwise once the conversation goes on (without "
            "its thinking, say): make a row for each answer"
        )
    return text.removeprefix(shown)


def weighted(examples: Sequence[Example], aggregation: Aggregation) -> list[PackedSequence]:
    """Sequences whose learnt tokens have the aggregation's weights, of the whole update; the others weigh 0."""
    found = []
    for made, weights in zip(examples, aggregation([sum(e.learnt) for e in examples]), strict=True):
        own = iter(weights)
        values: dict[str, Sequence[float]] = {"weight": [next(own) if learnt else 0.0 for learnt in made.learnt]}
        found.append(PackedSequence(made.prompt, made.response, values, made.vision))
    return found
