"""Preference pairs: rows with ``prompt`` or ``messages`` and two answers, ``chosen`` and ``rejected``."""

from typing import Any

import numpy as np

from megatron_ext import batch as batches
from megatron_ext.batch import Prompt, TokenBatch
from recipes.data.processor import ProcessedPrompt
from recipes.data.rows import Row, messages
from recipes.errors import ConfigError
from rewards.verifiers.text import without_thinking


def scored_conversation(tokenizer: Any, row: Row, processed: ProcessedPrompt | None, answer: str) -> TokenBatch:
    """The batch of the conversation with one of the row's answers, without its thinking, for a reward model.

    ``answer`` is "chosen" or "rejected". The text is that of the chat template, the same that a server of the reward
    model gets (``rewards.verifiers.judges.Scalar``).

    The answer's score is the model's value after the last token. Therefore the whole conversation is the batch's
    prompt, and its response is one end-of-turn token, whose value is the score.

    ``processed`` is the processed prompt of a row with images or clips, and None for a text-only row.
    """
    name = f"{row['id']}/{answer}"
    turns = [*messages(row), {"role": "assistant", "content": without_thinking(row[answer])}]
    appended = [[tokenizer.eos_token_id]]
    if processed is None:
        tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        return batches.build([Prompt(name, np.array(tokens, np.int32))], appended, vision=[None])
    prompt_text = tokenizer.apply_chat_template(messages(row), add_generation_prompt=True, tokenize=False)
    conversation_text = tokenizer.apply_chat_template(turns, tokenize=False)
    if not conversation_text.startswith(prompt_text):
        raise ConfigError(
            f"row {row['id']!r}: the chat template shows the prompt differently once it is answered (it opens the "
            "thinking, for example), so that the prompt's images have no place in it: use another template"
        )
    answer_text = conversation_text.removeprefix(prompt_text)
    answer_ids = np.array(tokenizer.encode(answer_text, add_special_tokens=False), np.int32)
    prompt = Prompt(name, np.concatenate([processed.prompt.token_ids, answer_ids]))
    return batches.build([prompt], appended, vision=[processed.vision])


def chosen_and_rejected(tokenizer: Any, row: Row, processed: ProcessedPrompt | None, max_tokens: int) -> TokenBatch:
    """The batch of both answers, chosen first, each as :func:`scored_conversation`.

    They go through the model in one micro-batch. Raises ConfigError naming a row whose answers together have more than
    ``max_tokens`` tokens.
    """
    pair = batches.concatenate(
        [scored_conversation(tokenizer, row, processed, answer) for answer in ("chosen", "rejected")]
    )
    tokens = int(pair.lengths.sum())
    if tokens > max_tokens:
        raise ConfigError(
            f"row {row['id']!r} has {tokens} tokens in both answers, parallel.micro_batch_tokens={max_tokens}: raise "
            "it or drop the row"
        )
    return pair
