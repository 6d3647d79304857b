"""Convert labelled answers to SFT conversations for a judge.

A conversation is the request that the judge's verifier sends, and the reply that the verifier parses.

A row has ``question`` (or ``prompt``, which may have images), ``answer`` and ``label``. It may have a ``reason``. If
the judge's template compares with a reference, it has ``reference``.
"""

from typing import Any

from recipes.data.rows import Row, load_rows
from recipes.errors import ConfigError
from rewards import registry
from rewards.verifiers.judges import Judge
from rewards.verifiers.text import without_thinking

LABELLED_FIELDS = ("id", "answer", "label")
MEDIA_FIELDS = ("images", "videos")


def find_judge(template: str) -> Judge:
    """The judge that ``stage.sft.judge`` names. Raises ConfigError for any other name."""
    try:
        judge = registry.find_template(template)
    except ValueError as error:
        raise ConfigError(f"stage.sft.judge={template!r}: {error}") from error
    if not isinstance(judge, Judge):
        raise ConfigError(f"stage.sft.judge={template!r}: a {type(judge).__name__} writes nothing: choose a judge")
    return judge


def load_labelled_answers(source: Any, judge: Judge) -> list[Row]:
    """The rows of a source. Raises ConfigError naming file, line and field of a row that the judge can't train on."""
    rows = load_rows(source, LABELLED_FIELDS)
    for number, row in enumerate(rows):
        if not row.get("question", row.get("prompt")):
            raise ConfigError(f"{rows.location(number)}: field 'question' is missing or empty")
        if row["label"] not in judge.labels:
            raise ConfigError(
                f"{rows.location(number)}: label {row['label']!r}: the judge's are {', '.join(judge.labels)}"
            )
        if judge.compares and not row.get("reference"):
            raise ConfigError(f"{rows.location(number)}: field 'reference' is missing: the judge compares with it")
    return list(rows)


def load_judge_rows(source: Any, judge: Judge) -> list[Row]:
    """An SFT conversation for each row of a source. Raises ConfigError like :func:`load_labelled_answers`."""
    return [judge_conversation(judge, row) for row in load_labelled_answers(source, judge)]


def verifier_row(row: Row) -> dict[str, Any]:
    """The row that the judge's verifier gets together with the answer."""
    kept = {key: row[key] for key in ("id", "kind", "tags", *MEDIA_FIELDS) if key in row}
    return kept | {"prompt": row.get("question", row.get("prompt")), "answer": row.get("reference", "")}


def judge_conversation(judge: Judge, row: Row) -> Row:
    """The SFT row of a labelled answer: the messages that the verifier sends, and the reply with the row's label."""
    media = {key: row[key] for key in MEDIA_FIELDS if key in row}
    # Without media files, the request keeps the marks <image> and <video> in its text, as SFT rows have them.
    text_only = {key: value for key, value in verifier_row(row).items() if key not in media}
    request = judge.request(text_only, without_thinking(row["answer"]), "").body["messages"]
    reply = judge.reply_text(row["label"], row.get("reason"))
    return {"id": row["id"], "messages": [*request, {"role": "assistant", "content": reply}], **media}
