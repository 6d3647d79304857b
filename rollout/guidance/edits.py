"""Edits of a text that a model has generated: its beginning stays, its tail is replaced, and the model continues.

The kept tokens do not change, and only the new tail is encoded. So the kept tokens keep their log-probs, and their
entries in a server's prefix cache stay valid. Automatic corrections and edits by a person both use this operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.guidance.clients import Generator


class EditRefused(ValueError):
    """The tokens after an edit would not decode to the edited text."""


@dataclass(frozen=True)
class Edit:
    """An edit by whole tokens."""

    # The number of tokens at the start of the old text that stay.
    kept: int
    # The text that follows the kept tokens, and its tokens.
    tail: str
    tail_ids: tuple[int, ...]


async def edit_text(generator: Generator, model: str, token_ids: Sequence[int], edited: str) -> Edit:
    """Return the edit that turns the text of ``token_ids`` into ``edited`` and keeps as many tokens as possible.

    A token that ends an answer is not kept, so that the model can continue. Raises EditRefused.
    """
    kept = await kept_tokens(generator, model, token_ids, edited)
    tail = edited[len(await generator.decode(model, token_ids[:kept])) :]
    return Edit(kept, tail, await replace_tail(generator, model, token_ids[:kept], tail))


async def kept_tokens(generator: Generator, model: str, token_ids: Sequence[int], edited: str) -> int:
    """Return the largest number of tokens at the start of a text with whose text the edited version also begins."""
    text = await generator.decode(model, token_ids)
    shared = shared_start(text, edited)
    kept, most = 0, len(token_ids)
    while kept < most:
        middle = (kept + most + 1) // 2
        if len(await generator.decode(model, token_ids[:middle])) <= shared:
            kept = middle
        else:
            most = middle - 1
    # Tokens that end inside a character decode to a replacement character.
    while not edited.startswith(await generator.decode(model, token_ids[:kept])):
        kept -= 1
    return kept


def shared_start(text: str, edited: str) -> int:
    """Return the length of the longest common prefix of two texts, in characters."""
    different = (place for place, (old, new) in enumerate(zip(text, edited, strict=False)) if old != new)
    return next(different, min(len(text), len(edited)))


async def replace_tail(generator: Generator, model: str, kept: Sequence[int], tail: str) -> tuple[int, ...]:
    """Return the token ids of ``tail``, which follow the unchanged ``kept`` tokens.

    Raises EditRefused when the tokens together do not decode to the kept text and the tail. This happens when the kept
    tokens end inside a character, or when the tokenizer changes the beginning of the text that it encodes.
    """
    if not tail:
        return ()
    tail_ids = await generator.encode(model, tail, special_tokens=False)
    kept_text = await generator.decode(model, kept) if kept else ""
    text = await generator.decode(model, [*kept, *tail_ids])
    if text != kept_text + tail:
        raise EditRefused(
            f"the tokens after the edit read {text[len(kept_text) :][:80]!r}, not {tail[:80]!r}: edit from an earlier "
            "place, where a word begins"
        )
    return tuple(tail_ids)
