"""An edit of a text that a model has written: its beginning stays, its tail is replaced, and the model goes on.

The kept tokens stay as they are and only the new tail is encoded. So what was generated keeps its log-probs, and a
server's prefix cache holds it. An automatic correction and a person's edit are this one operation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rollout.guidance.clients import Generator


class EditRefused(ValueError):
    """The tokens after an edit would not read as the edited text."""


@dataclass(frozen=True)
class Edit:
    """``kept``: tokens of the old text that stay, counted from its start; ``tail_ids`` follow them now, the tokens of
    ``tail``."""

    kept: int
    tail: str
    tail_ids: tuple[int, ...]


async def edit_text(generator: Generator, model: str, token_ids: Sequence[int], edited: str) -> Edit:
    """The edit by whole tokens that turns the text of ``token_ids`` into ``edited`` and keeps the most tokens.

    A token that ends an answer is not kept, so that the model can go on. Raises EditRefused.
    """
    kept = await kept_tokens(generator, model, token_ids, edited)
    tail = edited[len(await generator.decode(model, token_ids[:kept])) :]
    return Edit(kept, tail, await replace_tail(generator, model, token_ids[:kept], tail))


async def kept_tokens(generator: Generator, model: str, token_ids: Sequence[int], edited: str) -> int:
    """How many tokens at the start of a text an edited version of it keeps: the most whose text it begins with."""
    text = await generator.decode(model, token_ids)
    shared = shared_start(text, edited)
    kept, most = 0, len(token_ids)
    while kept < most:
        middle = (kept + most + 1) // 2
        if len(await generator.decode(model, token_ids[:middle])) <= shared:
            kept = middle
        else:
            most = middle - 1
    # Tokens that only begin a character read as a replacement character.
    while not edited.startswith(await generator.decode(model, token_ids[:kept])):
        kept -= 1
    return kept


def shared_start(text: str, edited: str) -> int:
    """How many characters two texts have in common at their start."""
    different = (place for place, (old, new) in enumerate(zip(text, edited, strict=False)) if old != new)
    return next(different, min(len(text), len(edited)))


async def replace_tail(generator: Generator, model: str, kept: Sequence[int], tail: str) -> tuple[int, ...]:
    """Token ids of ``tail``, to follow the ``kept`` ones as they are.

    Raises EditRefused when the tokens together do not read as the kept text and the tail: the kept tokens end inside a
    character, or the tokenizer changes the beginning of what it encodes.
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
