"""An SFT row whose response has an environment's part in it → token ids, and which of them are learnt."""

from typing import Any

from recipes.data.prompts import Row, response_tokens
from recipes.errors import ConfigError


def episode_tokens(tokenizer: Any, row: Row) -> tuple[list[int], list[bool]]:
    """The token ids of the row's ``response`` with the end-of-turn token behind, and true for those the model wrote.

    ``environment`` has the [start, end] of the characters that the environment wrote, in order. Each piece is encoded
    by itself, as in a rollout, where the model's turns and the environment's replies meet as token ids.

    Raises ConfigError naming the row for spans that are not such.
    """
    ids: list[int] = []
    learnt: list[bool] = []
    done, text = 0, row["response"]
    for span in row.get("environment", []):
        if not (isinstance(span, list) and len(span) == 2 and done <= span[0] < span[1] <= len(text)):
            raise ConfigError(
                f"row {row['id']!r}: environment has {span!r}; give [start, end] of the response's characters, in order"
            )
        for piece, own in ((text[done : span[0]], True), (text[span[0] : span[1]], False)):
            encoded = tokenizer.encode(piece, add_special_tokens=False)
            ids, learnt = ids + encoded, learnt + [own] * len(encoded)
        done = span[1]
    last = response_tokens(tokenizer, {"response": text[done:]})
    return ids + last, learnt + [True] * len(last)
