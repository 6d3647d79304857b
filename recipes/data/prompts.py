"""Rows of a data set, their order, and their tokens.

The order is a pure function of (seed, position): resuming needs no state.
"""

import json
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from recipes.config import ConfigError

Row = Mapping[str, Any]
PROMPT_FIELDS = ("id", "label", "kind", "prompt")
SFT_FIELDS = ("id", "prompt", "response")
PAIR_FIELDS = ("id", "prompt", "chosen", "rejected")


def load_rows(path: str, required: Sequence[str] = PROMPT_FIELDS) -> list[Row]:
    """JSONL rows. ``images`` (files) and ``videos`` (lists of frame files) are relative to the data file, in the result
    absolute; the prompt has ``<image>`` and ``<video>`` where they stand.

    Raises ConfigError naming file, line and field for a missing field or file, a repeated id, and marks in the prompt
    that are not as many as the files.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number}: not a JSON object but {type(row).__name__}; write one object a line")
        missing = [field for field in required if not isinstance(row.get(field), str) or not row[field]]
        if missing:
            raise ConfigError(
                f"{path}:{number}: field {missing[0]!r} is missing or empty; every row needs {list(required)}"
            )
        if row["id"] in seen:
            raise ConfigError(f"{path}:{number}: id {row['id']!r} occurs twice; make ids unique")
        seen.add(row["id"])
        try:
            rows.append(row | _media(row, Path(path).resolve().parent))
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: {error}") from error
    if not rows:
        raise ConfigError(f"{path}: holds no rows")
    return rows


def _media(row: Row, folder: Path) -> dict[str, Any]:
    """The row's ``images`` and ``videos`` with absolute paths. Raises ValueError naming the field."""
    found: dict[str, Any] = {}
    images, videos = row.get("images", []), row.get("videos", [])
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError("field 'images' is not a list of file names")
    if not isinstance(videos, list) or not all(
        isinstance(frames, list) and frames and all(isinstance(path, str) for path in frames) for frames in videos
    ):
        raise ValueError("field 'videos' is not a list of clips, each a list of the names of its frames' files")
    prompt = "".join(turn["content"] for turn in asked(row))
    for field, mark, count in (("images", "<image>", len(images)), ("videos", "<video>", len(videos))):
        if prompt.count(mark) != count:
            raise ValueError(
                f"field {field!r} has {count} entries, the prompt has {prompt.count(mark)} times {mark}: write "
                f"{mark} once for each, where it stands in the prompt"
            )
    if images:
        found["images"] = [str(folder / path) for path in images]
    if videos:
        found["videos"] = [[str(folder / path) for path in frames] for frames in videos]
    for field, file in media_files(found):
        if not Path(file).is_file():
            raise ValueError(f"field {field}: no file {file}; names are relative to the data file")
    return found


def asked(row: Row) -> list[dict[str, str]]:
    """The row's ``messages``; its ``prompt`` is one of the user. Raises ValueError for messages of another form."""
    turns = row["messages"] if "messages" in row else [{"role": "user", "content": row.get("prompt", "")}]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    ):
        raise ValueError("field 'messages' is not a list of {role, content}, both text")
    return turns


def media_files(row: Row) -> list[tuple[str, str]]:
    """Field and file of each image and frame of a row."""
    images = [(f"images[{i}]", file) for i, file in enumerate(row.get("images", []))]
    return images + [
        (f"videos[{i}][{j}]", file) for i, frames in enumerate(row.get("videos", [])) for j, file in enumerate(frames)
    ]


def shuffled(rows: Sequence[Row], start: int, count: int, seed: int, window: int = 1) -> list[Row]:
    """Rows at positions [start, start + count) of an endless stream that shuffles all rows anew each epoch.

    No row occurs twice in ``window`` successive positions, which needs 2 x window - 2 rows.
    """
    found = []
    for position in range(start, start + count):
        epoch, index = divmod(position, len(rows))
        found.append(rows[_order(len(rows), epoch, seed, window)[index]])
    return found


@lru_cache(maxsize=64)
def _order(size: int, epoch: int, seed: int, window: int) -> tuple[int, ...]:
    """The permutation of an epoch. Its first window - 1 places avoid the last window - 1 of the epoch before."""
    order: list[int] = []
    for e in range(epoch + 1):
        recent = set(order[size - window + 1 :])
        order = list(range(size))
        random.Random(f"{seed}/{e}").shuffle(order)
        head = [i for i in order if i not in recent][: window - 1]
        first = set(head)
        order = head + [i for i in order if i not in first]
    return tuple(order)


def mixed(rows: Sequence[Row], mix: Mapping[str, int], step: int, count: int, seed: int) -> list[Row]:
    """The ``count`` prompts of ``step`` (from 0): kinds interleaved by their shares, each kind a shuffled stream.

    No prompt occurs twice in a step. Raises ConfigError when the data has too few prompts of a kind for that.
    """
    by_kind: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_kind[row["kind"]].append(row)
    mix = {kind: share for kind, share in mix.items() if share}
    cycle, windows = interleaved(mix), {}
    for kind, share in mix.items():
        windows[kind] = -(-count // len(cycle)) * share  # what one step may need
        needed = max(windows[kind], 2 * windows[kind] - 2)
        if len(by_kind[kind]) < needed:
            raise ConfigError(
                f"data.mix has {kind!r}, of which data.prompts holds {len(by_kind[kind])} rows; {needed} are needed "
                "so that no step asks one twice: add rows or lower algorithm.prompts_per_step"
            )
    found = []
    for position in range(step * count, (step + 1) * count):
        cycles, index = divmod(position, len(cycle))
        kind = cycle[index]
        nth = cycles * mix[kind] + cycle[:index].count(kind)
        found.extend(shuffled(by_kind[kind], nth, 1, seed, windows[kind]))
    return found


def interleaved(mix: Mapping[str, int]) -> list[str]:
    """One cycle of kinds, each as often as its share and spread evenly (smooth weighted round-robin)."""
    credit = dict.fromkeys(mix, 0)
    total = sum(mix.values())
    cycle = []
    for _ in range(total):
        for kind, share in mix.items():
            credit[kind] += share
        best = max(credit, key=lambda kind: credit[kind])
        credit[best] -= total
        cycle.append(best)
    return cycle


def prompt_tokens(tokenizer: Any, row: Row, max_prompt_tokens: int) -> list[int]:
    """The chat-templated prompt's token ids. Raises ConfigError naming the row when it is too long."""
    ids = tokenizer.apply_chat_template(asked(row), add_generation_prompt=True, tokenize=True, return_dict=False)
    check_length(row, ids, max_prompt_tokens)
    return list(ids)


def check_length(row: Row, ids: Sequence[int], max_prompt_tokens: int) -> None:
    """Raises ConfigError naming the row when its prompt is too long."""
    if len(ids) > max_prompt_tokens:
        raise ConfigError(
            f"row {row['id']!r} has {len(ids)} prompt tokens, data.max_prompt_tokens={max_prompt_tokens}: "
            "raise it or drop the row"
        )


def response_tokens(tokenizer: Any, row: Row) -> list[int]:
    """An SFT row's answer, ended by the end-of-turn token."""
    return [*tokenizer.encode(row["response"], add_special_tokens=False), tokenizer.eos_token_id]
