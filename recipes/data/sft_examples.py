"""SFT rows: conversations that end with an answer → token ids and a loss mask over them.

A row has ``prompt`` and ``response``, or ``messages`` ({role, content} each).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.batch import Prompt
from megatron_ext.packing import VisionInputs
from recipes.data.judge_sft import find_judge, load_judge_rows
from recipes.data.processor import ProcessedPrompt, PromptProcessor
from recipes.data.rows import SFT_FIELDS, Row, load_rows, messages
from recipes.data.source_spec import source_names
from recipes.data.sources import Rows
from recipes.errors import ConfigError
from rollout.thinking import opens_thinking, without_opening

ASSISTANT = "assistant"


@dataclass(frozen=True)
class Example:
    """The token ids of a conversation.

    ``prompt``: up to the assistant's first answer. ``response``: all tokens after it. ``loss_mask``: one entry per
    token of ``response``, true for the assistant's own tokens, false for the other roles' messages and the chat
    template's tokens between two answers, and for an environment's replies within an answer.
    """

    prompt: Prompt
    response: list[int]
    loss_mask: list[bool]
    vision: VisionInputs | None


def load_sft_rows(source: Any, judge_template: str | None) -> Sequence[Row]:
    """The rows that SFT trains on: conversations, or, where ``judge_template`` names a judge, conversations with that
    judge made of labelled answers (:mod:`recipes.data.judge_sft`).

    Raises ConfigError naming file, line and field.
    """
    if judge_template is None:
        return load_conversations(source)
    return load_judge_rows(source, find_judge(judge_template))


def load_conversations(source: Any) -> Rows:
    """The rows of a source. Raises ConfigError naming file, line and field of a row that is not a conversation."""
    rows = load_rows(source, ("id",))
    rows.check_each(conversation)
    return rows


def conversation(row: Row) -> list[dict[str, str]]:
    """The row's messages, with the assistant's answer as the last. Raises ConfigError naming the row."""
    turns = messages(row)
    if "messages" not in row:
        missing = [field for field in SFT_FIELDS if not isinstance(row.get(field), str) or not row[field]]
        if missing:
            raise ConfigError(
                f"field {missing[0]!r} is missing or empty; every row needs {list(SFT_FIELDS)}, or messages"
            )
        turns = [*turns, {"role": ASSISTANT, "content": row["response"]}]
    roles = [turn["role"] for turn in turns]
    if len(turns) < 2 or roles[-1] != ASSISTANT or roles[0] == ASSISTANT:
        raise ConfigError(
            f"row {row['id']!r}: messages of {roles}: begin with a request, end with the assistant's answer"
        )
    after_first_answer = "".join(turn["content"] for turn in turns[roles.index(ASSISTANT) :])
    has_late_image = row.get("images") and "<image>" in after_first_answer
    has_late_video = row.get("videos") and "<video>" in after_first_answer
    if has_late_image or has_late_video:
        raise ConfigError(f"row {row['id']!r}: an image after the first answer: make a row that ends with that answer")
    return turns


def check_examples(
    processor: PromptProcessor, source: Any, judge_template: str | None, think_begin: str, max_tokens: int
) -> int:
    """Load a source and tokenize every row. Returns the number of rows. Raises ConfigError naming row and field."""
    rows = load_sft_rows(source, judge_template)
    for row in rows:
        try:
            tokenize_example(processor.tokenizer, row, processor(prompt_row(row)), think_begin, max_tokens)
        except ConfigError as error:
            raise ConfigError(f"{source_names(source)}: {error}") from error
    return len(rows)


def prompt_row(row: Row) -> Row:
    """The row without what follows the request to which the assistant's first answer is. Raises ConfigError as
    :func:`conversation`."""
    turns = conversation(row)
    if "messages" not in row:
        return row
    roles = [turn["role"] for turn in turns]
    return {**row, "messages": turns[: roles.index(ASSISTANT)]}


def tokenize_example(
    tokenizer: Any, row: Row, processed: ProcessedPrompt, think_begin: str, max_tokens: int
) -> Example:
    """The token ids of a row as an engine would see them: the prompt ends where generation starts, and each answer ends
    with the end-of-turn token. ``processed`` is the prompt of its :func:`prompt_row`.

    Some chat templates end the prompt with ``think_begin``. An answer that begins with it too then continues after the
    template's.

    Raises ConfigError naming the row: for messages in an order that no chat has, an image after the first answer, a
    chat template that shows an answer differently once the conversation continues, and more than ``max_tokens`` tokens.
    """
    turns = conversation(row)
    answer_places = [place for place, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    prompt = processed.prompt
    template_opens_thinking = opens_thinking(tokenizer, prompt.token_ids, think_begin)
    response: list[int] = []
    loss_mask: list[bool] = []
    text_so_far = ""  # as the chat template has it, up to the end of the last answer
    for place in answer_places:
        if response:
            between = _text_between(tokenizer, row, turns[:place], text_so_far)
            between_ids = tokenizer.encode(between, add_special_tokens=False)
            response += between_ids
            loss_mask += [False] * len(between_ids)
        answer = turns[place]["content"]
        text = without_opening(answer, think_begin) if template_opens_thinking else answer
        spans = row.get("environment", []) if place == answer_places[-1] else []
        # What was removed, the mark of thinking, stood before the first span.
        removed = len(answer) - len(text)
        spans = [[start - removed, end - removed] for start, end in spans]
        answer_ids, answer_mask = episode_tokens(tokenizer, {**row, "response": text, "environment": spans})
        response += answer_ids
        loss_mask += answer_mask
        text_so_far = _open_prompt(tokenizer, turns[:place]) + text + tokenizer.eos_token
    total = len(prompt.token_ids) + len(response)
    if total > max_tokens:
        raise ConfigError(
            f"row {row['id']!r} has {total} tokens, parallel.micro_batch_tokens={max_tokens}: raise it or drop the row"
        )
    return Example(prompt, response, loss_mask, processed.vision)


def _open_prompt(tokenizer: Any, turns: Sequence[dict[str, str]]) -> str:
    """The conversation's text by the chat template, up to where the next answer starts."""
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _text_between(tokenizer: Any, row: Row, turns: Sequence[dict[str, str]], text_so_far: str) -> str:
    """What the chat template writes between the last answer and the next one. Raises ConfigError naming the row."""
    text = _open_prompt(tokenizer, turns)
    if not text.startswith(text_so_far):
        raise ConfigError(
            f"row {row['id']!r}: the chat template shows an answer differently once the conversation continues "
            "(without its thinking, for example): make a row for each answer"
        )
    return text.removeprefix(text_so_far)


def episode_tokens(tokenizer: Any, row: Row) -> tuple[list[int], list[bool]]:
    """The token ids of the row's ``response`` with the end-of-turn token, and their loss mask: true for the model's.

    ``environment`` lists the [start, end] characters that the environment wrote, in order. Every piece is encoded on
    its own, as in a rollout, where the model's turns and the environment's replies are joined as token ids.

    Raises ConfigError naming the row for a span outside the response, an empty one, or spans out of order.
    """
    text = row["response"]
    ids: list[int] = []
    loss_mask: list[bool] = []

    def append(piece: str, by_model: bool) -> None:
        piece_ids = tokenizer.encode(piece, add_special_tokens=False)
        ids.extend(piece_ids)
        loss_mask.extend([by_model] * len(piece_ids))

    end_of_last = 0
    for span in row.get("environment", []):
        if not (isinstance(span, list) and len(span) == 2 and end_of_last <= span[0] < span[1] <= len(text)):
            raise ConfigError(
                f"row {row['id']!r}: environment has {span!r}; give [start, end] of the response's characters, in order"
            )
        start, end = span
        append(text[end_of_last:start], by_model=True)
        append(text[start:end], by_model=False)
        end_of_last = end
    append(text[end_of_last:], by_model=True)
    ids.append(tokenizer.eos_token_id)
    loss_mask.append(True)
    return ids, loss_mask
