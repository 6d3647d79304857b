"""Rows of a data set, their order, and their tokens.

The order is a pure function of (seed, position): resuming needs no state.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from recipes.data import specification
from recipes.data.sources import Row, Rows, open_source
from recipes.errors import ConfigError

PROMPT_FIELDS = ("id", "label", "kind", "prompt")
SFT_FIELDS = ("id", "prompt", "response")
PAIR_FIELDS = ("id", "prompt", "chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")
TEXTS, LISTS = ("answer", "check", "label", "kind"), ("tags", "keywords")
# Rounds of the keyed permutation: with fewer the orders of five rows are not equally frequent (measured).
ROUNDS = 12


def load_rows(source: Any, required: Sequence[str] = PROMPT_FIELDS) -> Rows:
    """The rows of a source, or of a list of {source, weight}: see :mod:`recipes.data.specification`.

    ``messages`` ({role, content} each) may stand in for ``prompt``, which is then made of them for what wants text
    (judges, reports), and ``reference`` for ``answer``. ``images`` (files) and ``videos`` (lists of frame files) are
    relative to the data file, in the result absolute; the prompt has ``<image>`` and ``<video>`` where they stand. A
    null is a field that is not there.

    Raises ConfigError naming source, line or row number, and field for a missing field or file, a field of another
    form, a repeated id, and marks in the prompt that are not as many as the files.
    """
    try:
        wanted = specification.read(source)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    rows = Rows([open_source(each) for each in wanted], partial(_usable, required=required))
    if not rows:
        raise ConfigError(f"{specification.shown(source)}: holds no rows")
    return rows


def _usable(raw: Row, folder: Path, required: Sequence[str]) -> Row:
    """A source's row as the others want it. Raises ValueError naming the field."""
    row = without_nulls(raw)
    for given, made in (("messages", "prompt"), ("reference", "answer")):
        if given in row and made in row:
            raise ValueError(f"fields {made!r} and {given!r} say the same: give one of them")
    if "reference" in row:
        row["answer"] = row.pop("reference")
    if "messages" in row:
        row["prompt"] = transcript(asked(row))
        _check_order(row, answered="prompt" not in required)
    missing = [field for field in required if not isinstance(row.get(field), str) or not row[field]]
    if missing:
        instead = ", or messages" if missing[0] == "prompt" else ""
        raise ValueError(f"field {missing[0]!r} is missing or empty; every row needs {list(required)}{instead}")
    for field in TEXTS:
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f"field {field!r} is {row[field]!r}; write text")
    for field in LISTS:
        if not _is_texts(row.get(field, [])):
            raise ValueError(f"field {field!r} is {row[field]!r}; write a list of texts")
    return row | _media(row, folder)


def without_nulls(value: Any) -> Any:
    """Without the fields that are null, at any depth: tables have every field in every row."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_order(row: Row, answered: bool) -> None:
    """Raises ValueError for messages that no chat has; unless ``answered`` the user's must be the last."""
    roles = [turn["role"] for turn in row["messages"]]
    if not roles:
        raise ValueError("field 'messages' is empty; write at least one of the user")
    for place, role in enumerate(roles):
        if role not in ROLES:
            raise ValueError(f"field 'messages[{place}].role' is {role!r}; use one of {', '.join(ROLES)}")
        if role == "system" and place:
            raise ValueError(f"field 'messages[{place}].role' is 'system'; only the first message may be that")
    if not answered and roles[-1] not in ("user", "tool"):
        raise ValueError(
            f"field 'messages[{len(roles) - 1}].role' is {roles[-1]!r}; the last message is what the model answers: "
            "end with one of the user"
        )


def transcript(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text; a single message is its content."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def asked(row: Row) -> list[dict[str, str]]:
    """The row's ``messages``; its ``prompt`` is one of the user. Raises ValueError for messages of another form."""
    turns = row["messages"] if "messages" in row else [{"role": "user", "content": row.get("prompt", "")}]
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content")) for turn in turns
    ):
        raise ValueError("field 'messages' is not a list of {role, content}, both text")
    return turns


def _media(row: Row, folder: Path) -> dict[str, Any]:
    """The row's ``images`` and ``videos`` with absolute paths. Raises ValueError naming the field."""
    found: dict[str, Any] = {}
    images, videos = row.get("images", []), row.get("videos", [])
    if not _is_texts(images):
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


def media_files(row: Row) -> list[tuple[str, str]]:
    """Field and file of each image and frame of a row."""
    images = [(f"images[{i}]", file) for i, file in enumerate(row.get("images", []))]
    return images + [
        (f"videos[{i}][{j}]", file) for i, frames in enumerate(row.get("videos", [])) for j, file in enumerate(frames)
    ]


def permuted(place: int, size: int, key: str) -> int:
    """Where a keyed permutation of range(size) has ``place``: a shuffle of any size without memory.

    A Feistel network on the digits of a number in two bases, walked until it falls below ``size`` (Black and Rogaway,
    Ciphers with Arbitrary Finite Domains, CT-RSA 2002, the generalised Feistel cipher), with BLAKE2 as its rounds.
    """
    first = math.isqrt(size - 1) + 1
    first += first % 2  # rounds in two odd bases make even permutations only
    second = -(-size // first)
    while True:
        left, right = divmod(place, second)
        for round_number in range(ROUNDS):
            if round_number % 2:
                right = (right + _mixed_up(left, round_number, key)) % second
            else:
                left = (left + _mixed_up(right, round_number, key)) % first
        place = left * second + right
        if place < size:
            return place


def _mixed_up(value: int, round_number: int, key: str) -> int:
    digest = hashlib.blake2b(f"{key}/{round_number}/{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def ordered(position: int, size: int, seed: int, window: int = 1) -> int:
    """The number of the row at a position of an endless stream that shuffles ``size`` rows anew each epoch.

    No row occurs twice in ``window`` successive positions, which needs 2 x window - 2 rows. A pure function, whose time
    does not depend on the position where there are 3 x window - 3 rows.
    """
    epoch, place = divmod(position, size)
    if place < 2 * window - 2:
        return _opening(size, epoch, seed, window)[place]
    return permuted(place, size, f"{seed}/{epoch}")


@lru_cache(maxsize=64)
def _opening(size: int, epoch: int, seed: int, window: int) -> tuple[int, ...]:
    """What an epoch begins with: its permutation, but for the rows of the last window - 1 places of the epoch before,
    which have to wait for the first window - 1 places to pass."""
    edge = window - 1
    reaches = min(size, 2 * edge)
    # In small data an opening may reach into the places that the next one avoids.
    begin = epoch if size >= 3 * edge else 0
    recent = {permuted(place, size, f"{seed}/{epoch - 1}") for place in range(size - edge, size)} if begin else set()
    order: list[int] = []
    for e in range(begin, epoch + 1):
        raw = [permuted(place, size, f"{seed}/{e}") for place in range(reaches if begin == epoch else size)]
        head = [i for i in raw[:reaches] if i not in recent][:edge]
        first = set(head)
        order = head + [i for i in raw if i not in first]
        recent = set(order[len(order) - edge :])
    return tuple(order)


def shuffled(rows: Sequence[Row], start: int, count: int, seed: int, window: int = 1) -> list[Row]:
    """Rows at positions [start, start + count) of :func:`ordered`'s stream."""
    return [rows[ordered(position, len(rows), seed, window)] for position in range(start, start + count)]


type Phases = Sequence[tuple[int, Mapping[str, int]]]  # the first step of each, ascending from 0, and its mix


def scheduled(rows: Sequence[Row], phases: Phases, step: int, count: int, seed: int) -> list[Row]:
    """The ``count`` prompts of ``step`` (from 0): kinds interleaved by their shares in the step's phase.

    Each kind is a stream of its own, which goes on in the next phase where it stopped. In it the sources that have the
    kind take turns by their weights, each again a shuffled stream of its own. No prompt occurs twice in a step. Raises
    ConfigError when the data has too few prompts of a kind for that.
    """
    streams, windows = _streams(rows), _windows(phases, count)
    _check_enough(streams, windows, "data.curriculum" if len(phases) > 1 else "data.mix")
    begin, mix, before = _phase(phases, step, count)
    cycle = interleaved(mix)
    turns = {kind: interleaved(dict(enumerate(weight for weight, _ in streams[kind]))) for kind in mix}
    found = []
    for place in range((step - begin) * count, (step - begin + 1) * count):
        kind, drawn = _drawn(cycle, place)
        source, nth = _drawn(turns[kind], before[kind] + drawn)
        weight, numbers = streams[kind][source]
        window = _share(windows[kind], weight, len(turns[kind]))
        found.append(rows[int(numbers[ordered(nth, len(numbers), seed, window)])])
    return found


def _streams(rows: Sequence[Row]) -> Mapping[str, Sequence[tuple[int, np.ndarray]]]:
    """Of each kind the sources that have it: their weights and the numbers of their rows."""
    if isinstance(rows, Rows):
        return rows.streams
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_kind[row["kind"]].append(number)
    return {kind: [(1, np.array(numbers))] for kind, numbers in by_kind.items()}


def _windows(phases: Phases, count: int) -> dict[str, int]:
    """How many prompts of each kind one step may need, in any phase."""
    found: dict[str, int] = {}
    for _, mix in phases:
        for kind, share in mix.items():
            found[kind] = max(found.get(kind, 0), _share(count, share, sum(mix.values())))
    return found


def _share(count: int, share: int, total: int) -> int:
    """The most that successive ``count`` turns of a cycle hold of what has ``share`` of its ``total`` turns."""
    return -(-count // total) * share


def _check_enough(
    streams: Mapping[str, Sequence[tuple[int, np.ndarray]]], windows: Mapping[str, int], field: str
) -> None:
    for kind, window in windows.items():
        sources = streams.get(kind, [(1, np.array([]))])
        total = sum(weight for weight, _ in sources)
        for weight, numbers in sources:
            own = _share(window, weight, total)
            needed = max(own, 2 * own - 2)
            if len(numbers) < needed:
                one = " in one of its sources" if len(sources) > 1 else ""
                raise ConfigError(
                    f"{field} has {kind!r}, of which data.prompts holds {len(numbers)} rows{one}; {needed} are needed "
                    "so that no step asks one twice: add rows or lower algorithm.prompts_per_step"
                )


def _phase(phases: Phases, step: int, count: int) -> tuple[int, Mapping[str, int], Counter[str]]:
    """The first step and the mix of the step's phase, and what the phases before it drew of each kind."""
    before: Counter[str] = Counter()
    begin, mix = phases[0]
    for following, following_mix in phases[1:]:
        if following > step:
            break
        cycles, rest = divmod((following - begin) * count, sum(mix.values()))
        before.update({kind: cycles * share for kind, share in mix.items()})
        before.update(interleaved(mix)[:rest])
        begin, mix = following, following_mix
    return begin, mix, before


def _drawn[T](cycle: Sequence[T], place: int) -> tuple[T, int]:
    """What an endless repetition of ``cycle`` has at a place, and how often it had it before."""
    cycles, index = divmod(place, len(cycle))
    what = cycle[index]
    return what, cycles * cycle.count(what) + cycle[:index].count(what)


def interleaved[T](mix: Mapping[T, int]) -> list[T]:
    """One cycle of the keys, each as often as its share and spread evenly (smooth weighted round-robin)."""
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


def templated(model: Any, row: Row, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """The row's messages by the chat template of the model's tokenizer or processor, up to where the answer begins.

    Raises ConfigError naming the row where the template refuses them.
    """
    try:
        return model.apply_chat_template(messages, add_generation_prompt=True, **options)
    except Exception as error:  # templates raise what they like
        raise ConfigError(
            f"row {row['id']!r}: field 'messages': the model's chat template refuses them ({error}): change them or "
            "drop the row"
        ) from error


def prompt_tokens(tokenizer: Any, row: Row, max_prompt_tokens: int) -> list[int]:
    """The chat-templated prompt's token ids. Raises ConfigError naming the row when it is too long."""
    ids = templated(tokenizer, row, asked(row), tokenize=True, return_dict=False)
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
