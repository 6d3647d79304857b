"""Rows with answers: ``prompt`` and ``response``, or ``messages`` ({role, content} each) that end with an answer."""

from typing import Any

from recipes.data.prompts import SFT_FIELDS, Row, asked, load_rows
from recipes.data.sources import Rows
from recipes.errors import ConfigError

ASSISTANT = "assistant"


def load(source: Any) -> Rows:
    """The rows of a source. Raises ConfigError naming file, line and field for what is neither of both forms."""
    rows = load_rows(source, ("id",))
    for number, row in enumerate(rows):
        try:
            conversation(row)
        except ConfigError as error:
            raise ConfigError(f"{rows.where(number)}: {error}") from error
    return rows


def conversation(row: Row) -> list[dict[str, str]]:
    """The row's messages, the assistant's answer last. Raises ConfigError naming the row."""
    if "messages" not in row and (missing := [f for f in SFT_FIELDS if not isinstance(row.get(f), str) or not row[f]]):
        raise ConfigError(f"field {missing[0]!r} is missing or empty; every row needs {list(SFT_FIELDS)}, or messages")
    turns = [*asked(row)] if "messages" in row else [*asked(row), {"role": ASSISTANT, "content": row["response"]}]
    roles = [turn["role"] for turn in turns]
    if len(turns) < 2 or roles[-1] != ASSISTANT or roles[0] == ASSISTANT:
        raise ConfigError(
            f"row {row['id']!r}: messages of {roles}: begin with a request, end with the assistant's answer"
        )
    later = "".join(turn["content"] for turn in turns[roles.index(ASSISTANT) :])
    if (row.get("images") and "<image>" in later) or (row.get("videos") and "<video>" in later):
        raise ConfigError(f"row {row['id']!r}: an image behind the first answer: make a row that ends with that answer")
    return turns
