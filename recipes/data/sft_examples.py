"""Convert SFT rows, which are conversations that end with an answer, to token ids and a loss mask.

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
    """The token ids of a conversation, with the loss mask."""

    # The conversation up to the assistant's first answer.
    prompt: Prompt
    # All tokens after the prompt.
    response: list[int]
    # One entry per token of ``response``. True for the assistant's own tokens. False for an environment's replies
    # within an answer and, between two answers, for the other roles' messages and the chat template's tokens.
    loss_mask: list[bool]
    vision: VisionInputs | None


def load_sft_rows(source: Any, judge_template: str | None) -> Sequence[Row]:
    """Load the conversations that SFT trains on.

    If ``judge_template`` names a judge, the source has labelled answers, and the rows are conversations with this judge
    (:mod:`recipes.data.judge_sft`). Raises ConfigError naming file, line and field.
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
    """The row whose conversation ends before the assistant's first answer.

    Raises ConfigError in the same cases as :func:`conversation`.
    """
    turns = conversation(row)
    if "messages" not in row:
        return row
    roles = [turn["role"] for turn in turns]
    return {**row, "messages": turns[: roles.index(ASSISTANT)]}


def tokenize_example(
    tokenizer: Any, row: Row, processed: ProcessedPrompt, think_begin: str, max_tokens: int
) -> Example:
    """Tokenize a row as an engine would see it.

    The prompt ends where generation starts, and each answer ends with the end-of-turn token. ``processed`` is the
    processed prompt of the row's :func:`prompt_row`.

    Some chat templates end the prompt with ``think_begin``. If an answer begins with ``think_begin`` too, it is removed
    from the answer.

    Raises ConfigError, naming the row, for messages in an invalid order, an image after the first answer, a chat
    template that shows an answer differently once the conversation continues, and more than ``max_tokens`` tokens.
    """
    turns = conversation(row)
    answer_places = [place for place, turn in enumerate(turns) if turn["role"] == ASSISTANT]
    prompt = processed.prompt
    template_opens_thinking = opens_thinking(tokenizer, prompt.token_ids, think_begin)
    response: list[int] = []
    loss_mask: list[bool] = []
    text_so_far = ""  # the chat template's text up to the end of the last answer
    for place in answer_places:
        if response:
            between = _text_between(tokenizer, row, turns[:place], text_so_far)
            between_ids = tokenizer.encode(between, add_special_tokens=False)
            response += between_ids
            loss_mask += [False] * len(between_ids)
        answer = turns[place]["content"]
        text = without_opening(answer, think_begin) if template_opens_thinking else answer
        spans = row.get("environment", []) if place == answer_places[-1] else []
        # The removed text, the mark of thinking, was before the first span, so all spans move by its length.
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
    """The chat template's text between the last answer and the next one. Raises ConfigError naming the row."""
    text = _open_prompt(tokenizer, turns)
    if not text.startswith(text_so_far):
        raise ConfigError(
            f"row {row['id']!r}: the chat template shows an answer differently once the conversation continues "
            "(without its thinking, for example): make a row for each answer"
        )
    return text.removeprefix(text_so_far)


def episode_tokens(tokenizer: Any, row: Row) -> tuple[list[int], list[bool]]:
    """The token ids of the row's ``response`` with the end-of-turn token, and their loss mask.

    The mask is True for the model's tokens. The row's ``environment`` lists the [start, end] characters that the
    environment wrote, in order. Every piece is encoded separately, as in a rollout, where the model's turns and the
    environment's replies are concatenated as token ids.

    Raises ConfigError, naming the row, for a span outside the response, an empty span, or spans out of order.
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
