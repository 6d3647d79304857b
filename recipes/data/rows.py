"""Load the rows of a data set and check their fields."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from recipes.data.source_spec import parse_sources, source_names
from recipes.data.sources import Row, Rows, open_source
from recipes.errors import ConfigError

PROMPT_FIELDS = ("id", "label", "kind", "prompt")
SFT_FIELDS = ("id", "prompt", "response")
PAIR_FIELDS = ("id", "prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")
TEXT_FIELDS = ("answer", "reference", "check", "label", "kind")
LIST_FIELDS = ("tags", "keywords")
PACKAGE = "package:"  # prefix of the name of a media file in an installed package
# (field, the field that it stands in for)
SUBSTITUTES = (("messages", "prompt"), ("reference", "answer"))


def load_rows(source: Any, required: Sequence[str] = PROMPT_FIELDS) -> Rows:
    """Load the rows of a source, or of a list of {source, weight} (:mod:`recipes.data.source_spec`).

    - A row may have ``messages`` ({role, content} each) instead of ``prompt``. Its ``prompt`` is then the messages as
      text, for readers of text (judges, reports).
    - A row may have ``reference`` instead of ``answer``, unless ``answer`` is ``required``: a labelled answer has both.
    - ``images`` (files) and ``videos`` (lists of the frames' files) are relative to the data file, or in an installed
      package (``package:NAME/…``). They become absolute paths. The prompt has a mark ``<image>`` or ``<video>`` for
      each.
    - A field that is null counts as missing.

    Raises ConfigError, naming source, line or row number, and field, for a missing field or file, a value of the wrong
    type, an id that occurs twice, and a number of marks that differs from the number of files.
    """
    try:
        specs = parse_sources(source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = Rows([open_source(spec) for spec in specs], partial(_normalise, required=required))
    if not rows:
        raise ConfigError(f"{source_names(source)}: holds no rows")
    return rows


def _normalise(raw: Row, folder: Path, required: Sequence[str]) -> Row:
    """Convert a source's row to the form that :func:`load_rows` returns. Raises ValueError naming the field."""
    row = without_nulls(raw)
    for substitute, field in SUBSTITUTES:
        if field == "answer" and field in required:
            continue
        if substitute in row and field in row:
            raise ValueError(f"fields {field!r} and {substitute!r} say the same: give one of them")
        if substitute == "reference" and substitute in row:
            row[field] = row.pop(substitute)
    if "messages" in row:
        row["prompt"] = transcript(messages(row))
        _check_roles(row["messages"], may_end_with_answer="prompt" not in required)
    for field in (*required, *TEXT_FIELDS):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f"field {field!r} is {row[field]!r}; write text: {str(row[field])!r}")
    missing = [field for field in required if not row.get(field)]
    if missing:
        instead = ", or messages" if missing[0] == "prompt" else ""
        raise ValueError(f"field {missing[0]!r} is missing or empty; every row needs {list(required)}{instead}")
    for field in LIST_FIELDS:
        if not _is_list_of_texts(row.get(field, [])):
            raise ValueError(f"field {field!r} is {row[field]!r}; write a list of texts")
    return row | _absolute_media(row, folder)


def without_nulls(value: Any) -> Any:
    """``value`` without fields of mappings that are null, at any depth. Tables have every field in every row."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_roles(turns: Sequence[Mapping[str, str]], may_end_with_answer: bool) -> None:
    """Raises ValueError for an invalid order of roles.

    Unless ``may_end_with_answer``, the last message must be one that the model answers.
    """
    roles = [turn["role"] for turn in turns]
    if not roles:
        raise ValueError("field 'messages' is empty; write at least one of the user")
    for place, role in enumerate(roles):
        if role not in ROLES:
            raise ValueError(f"field 'messages[{place}].role' is {role!r}; use one of {', '.join(ROLES)}")
        if role == "system" and place:
            raise ValueError(f"field 'messages[{place}].role' is 'system'; only the first message may be that")
    if not may_end_with_answer and roles[-1] not in ("user", "tool"):
        raise ValueError(
            f"field 'messages[{len(roles) - 1}].role' is {roles[-1]!r}; the last message is what the model answers: "
            "end with one of the user"
        )


def transcript(turns: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text. For a single message, this is its content without the role."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def messages(row: Row) -> list[dict[str, str]]:
    """The row's conversation: ``messages``, or its ``prompt`` as a message of the user.

    Raises ValueError if ``messages`` is not a list of {role, content}.
    """
    if "messages" not in row:
        return [{"role": "user", "content": row.get("prompt", "")}]
    turns = row["messages"]
    if not isinstance(turns, list) or not all(map(_is_message, turns)):
        raise ValueError("field 'messages' is not a list of {role, content}, both text")
    return turns


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)


def _absolute_media(row: Row, folder: Path) -> dict[str, Any]:
    """The row's ``images`` and ``videos`` with absolute paths. Raises ValueError naming the field."""
    images = row.get("images", [])
    if not _is_list_of_texts(images):
        raise ValueError("field 'images' is not a list of file names")
    videos = row.get("videos", [])
    if not isinstance(videos, list) or not all(frames and _is_list_of_texts(frames) for frames in videos):
        raise ValueError("field 'videos' is not a list of clips, each a list of the names of its frames' files")
    prompt = "".join(turn["content"] for turn in messages(row))
    for field, mark, count in (("images", "<image>", len(images)), ("videos", "<video>", len(videos))):
        if prompt.count(mark) != count:
            raise ValueError(
                f"field {field!r} has {count} entries, the prompt has {prompt.count(mark)} times {mark}: write "
                f"{mark} once for each, where it stands in the prompt"
            )
    media: dict[str, Any] = {}
    if images:
        media["images"] = [_media_path(folder, name) for name in images]
    if videos:
        media["videos"] = [[_media_path(folder, name) for name in frames] for frames in videos]
    for field, file in media_files(media):
        if not Path(file).is_file():
            raise ValueError(f"field {field}: no file {file}; names are relative to the data file")
    return media


def _media_path(folder: Path, name: str) -> str:
    """The path of a media file in ``folder`` or, for package:NAME/…, in an installed package.

    Raises ValueError for a package that is not installed.
    """
    if not name.startswith(PACKAGE):
        return str(folder / name)
    package, _, file = name.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{name!r}: package {package!r} is not installed; install it in the run's environment")
    return str(Path(spec.submodule_search_locations[0]) / file)


def media_files(row: Row) -> list[tuple[str, str]]:
    """(field, file) of every image and every frame of a row. The field has its index, as in ``videos[0][2]``."""
    files = [(f"images[{i}]", file) for i, file in enumerate(row.get("images", []))]
    for i, frames in enumerate(row.get("videos", [])):
        files += [(f"videos[{i}][{j}]", file) for j, file in enumerate(frames)]
    return files
