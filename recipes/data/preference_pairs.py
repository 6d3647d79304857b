"""Preference pairs: rows with ``prompt`` or ``messages`` and two answers, ``chosen`` and ``rejected``."""

from megatron_ext.packing import PackedSequence
from recipes.data.processor import PromptProcessor
from recipes.data.rows import Row, messages
from recipes.errors import ConfigError
from rewards.verifiers.text import without_thinking


def scored_sequence(processor: PromptProcessor, row: Row, answer: str) -> PackedSequence:
    """The conversation with ``answer`` (without its thinking) as the chat template writes it, the same text that a
    server of the reward model gets (``rewards.verifiers.judges.Scalar``).

    The answer's score is the model's value after the last token. An end-of-turn token is appended as the response, so
    that this value is one of a response token.
    """
    tokenizer = processor.tokenizer
    turns = [*messages(row), {"role": "assistant", "content": without_thinking(answer)}]
    appended = [tokenizer.eos_token_id]
    if not row.get("images") and not row.get("videos"):
        tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        return PackedSequence(list(tokens), appended)
    processed = processor(row)
    prompt_text = tokenizer.apply_chat_template(messages(row), add_generation_prompt=True, tokenize=False)
    answer_text = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(prompt_text)
    answer_ids = tokenizer.encode(answer_text, add_special_tokens=False)
    return PackedSequence([*processed.prompt.token_ids, *answer_ids], appended, vision=processed.vision)


def chosen_and_rejected(processor: PromptProcessor, row: Row, max_tokens: int) -> list[PackedSequence]:
    """The sequences of both answers, chosen first. They go through the model in one micro-batch: raises ConfigError
    naming a row whose answers have more than ``max_tokens`` tokens together."""
    sequences = [scored_sequence(processor, row, row[answer]) for answer in ("chosen", "rejected")]
    tokens = sum(map(len, sequences))
    if tokens > max_tokens:
        raise ConfigError(
            f"row {row['id']!r} has {tokens} tokens in both answers, parallel.micro_batch_tokens={max_tokens}: raise "
            "it or drop the row"
        )
    return sequences
