"""Preference rows: ``prompt`` or ``messages``, and two answers, of which ``chosen`` is the better one."""

from megatron_ext.packing import PackedSequence
from recipes.data.processor import PromptProcessor
from recipes.data.prompts import Row, asked
from recipes.errors import ConfigError
from rewards.verifiers.text import without_thinking


def scored(processor: PromptProcessor, row: Row, answer: str) -> PackedSequence:
    """The conversation with this answer, without its thinking, as the chat template writes it: what a server of the
    model is asked with (``rewards.verifiers.judges.Scalar``). Its score is the value before a further token."""
    tokenizer = processor.tokenizer
    turns = [*asked(row), {"role": "assistant", "content": without_thinking(answer)}]
    further = [tokenizer.eos_token_id]
    if not row.get("images") and not row.get("videos"):
        tokens = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        return PackedSequence(list(tokens), further)
    made = processor(row)
    opening = tokenizer.apply_chat_template(asked(row), add_generation_prompt=True, tokenize=False)
    behind = tokenizer.apply_chat_template(turns, tokenize=False).removeprefix(opening)
    tokens = [*made.prompt.token_ids, *tokenizer.encode(behind, add_special_tokens=False)]
    return PackedSequence(tokens, further, vision=made.vision)


def both(processor: PromptProcessor, row: Row, longest: int) -> list[PackedSequence]:
    """Chosen, rejected. Raises ConfigError naming a row of more than ``longest`` tokens: both go through the model
    together."""
    found = [scored(processor, row, row[answer]) for answer in ("chosen", "rejected")]
    if (tokens := sum(map(len, found))) > longest:
        raise ConfigError(
            f"row {row['id']!r} has {tokens} tokens in both answers, parallel.micro_batch_tokens={longest}: raise it "
            "or drop the row"
        )
    return found
