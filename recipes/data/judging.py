"""Labelled answers → conversations that teach a judge: asked as its verifier will ask it, answered as that reads it.

A row has ``question`` (or ``prompt``, which may have images), ``answer``, ``label`` and, if there is one, ``reason``;
``reference`` where the template compares with one.
"""

from collections.abc import Sequence
from typing import Any

from recipes.data import conversations
from recipes.data.prompts import Row, load_rows
from recipes.errors import ConfigError
from rewards import mixing
from rewards.verifiers.judges import Judge
from rewards.verifiers.text import without_thinking

LABELLED_FIELDS = ("id", "answer", "label")


def find_judge(template: str) -> Judge:
    """Raises ConfigError for a name that is no judge's."""
    try:
        found = mixing.find_template(template)
    except ValueError as error:
        raise ConfigError(f"stage.sft.judge={template!r}: {error}") from error
    if not isinstance(found, Judge):
        raise ConfigError(f"stage.sft.judge={template!r}: a {type(found).__name__} writes nothing: choose a judge")
    return found


def load(source: Any, judge: Judge) -> list[Row]:
    """The rows of a source. Raises ConfigError naming file, line and field for what the judge can't be taught by."""
    rows = load_rows(source, LABELLED_FIELDS)
    for number, row in enumerate(rows):
        if not row.get("question", row.get("prompt")):
            raise ConfigError(f"{rows.where(number)}: field 'question' is missing or empty")
        if row["label"] not in judge.labels:
            raise ConfigError(
                f"{rows.where(number)}: label {row['label']!r}: the judge's are {', '.join(judge.labels)}"
            )
        try:
            judge.check(to_judge(row))
        except ValueError as error:
            raise ConfigError(f"{rows.where(number)}: {error}") from error
    return list(rows)


def judge_sft_rows(source: Any, template: str | None) -> Sequence[Row]:
    """What SFT learns from a source: its answers, or, where ``template`` names a judge, that judge's.

    Raises ConfigError naming file, line and field.
    """
    if template is None:
        return conversations.load(source)
    judge = find_judge(template)
    return [lesson(judge, row) for row in load(source, judge)]


def to_judge(row: Row) -> dict[str, Any]:
    """The row as a verifier gets it beside the answer."""
    kept = {key: row[key] for key in ("id", "kind", "tags", "images", "videos") if key in row}
    return kept | {"prompt": row.get("question", row.get("prompt")), "answer": row.get("reference", "")}


def lesson(judge: Judge, row: Row) -> Row:
    """The conversation: the verifier's question and what the judge should say."""
    media = {key: row[key] for key in ("images", "videos") if key in row}
    about = {key: value for key, value in to_judge(row).items() if key not in media}  # <image> stays where it stands
    asked = judge.ask(about, without_thinking(row["answer"]), "").body["messages"]
    said = judge.says(row["label"], row.get("reason"))
    return {"id": row["id"], "messages": [*asked, {"role": "assistant", "content": said}], **media}
