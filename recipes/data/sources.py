"""Rows that stay where they are: JSON lines, parquet, a folder that `datasets` saved, a data set of a hub.

A file of JSON lines is memory-mapped and a line parsed when its row is asked for; the others are `datasets`' Arrow
tables, memory-mapped too (a parquet file and a hub's data set are converted once, into its cache). What is held of a
row is 18 bytes, and 8 more for a line's place. An exact shuffle and an exact place to go on from need rows by number;
`datasets`' streams give them in order only, shuffled in a buffer, so they are not used.
"""

import hashlib
import json
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from recipes.data.specification import HUB, Specification
from recipes.errors import ConfigError

Row = Mapping[str, Any]
CHUNK = 1 << 26  # bytes of a file looked through at once for the ends of its lines


class JsonLines:
    """Row by row what a file of JSON lines has. A row that is no JSON object raises ValueError when it is read."""

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            self.bytes: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        ends = [
            np.flatnonzero(np.frombuffer(self.bytes, np.uint8, min(CHUNK, size - start), start) == ord("\n")) + start
            for start in range(0, size, CHUNK)
        ]
        if size and self.bytes[-1] != ord("\n"):
            ends.append(np.array([size]))
        self.bounds = np.concatenate([np.array([-1]), *ends])

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        line = self.bytes[self.bounds[number] + 1 : self.bounds[number + 1]]
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError too
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"not a JSON object but {type(row).__name__}; write one object a line")
        return row


@dataclass(frozen=True)
class Source:
    """``raw``: rows by number; ``folder``: what file names in them are relative to."""

    name: str
    weight: int
    raw: Any
    folder: Path
    by_line: bool

    def where(self, number: int) -> str:
        """Of row ``number`` (from 0), for messages."""
        return f"{self.name}:{number + 1}" if self.by_line else f"{self.name}: row {number + 1}"


def open_source(wanted: Specification) -> Source:
    """Raises ConfigError for what `datasets` can't read, with its reason."""
    if wanted.form == "jsonl":
        return Source(wanted.name, wanted.weight, JsonLines(wanted.name), Path(wanted.name).resolve().parent, True)
    try:
        raw = _table(wanted)
    except Exception as error:  # `datasets`, its readers and its hub raise many kinds
        raise ConfigError(
            f"{wanted.name}: `datasets` can't read it ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    folder = {"parquet": Path(wanted.name).parent, "folder": Path(wanted.name), "hub": Path()}[wanted.form]
    return Source(wanted.name, wanted.weight, raw, folder.resolve(), False)


def _table(wanted: Specification) -> Any:
    import datasets  # takes a second, and JSON lines do without

    datasets.disable_progress_bars()
    if wanted.form == "parquet":
        return datasets.Dataset.from_parquet(wanted.name)
    if wanted.form == "folder":
        found = datasets.load_from_disk(wanted.name)
        if isinstance(found, datasets.DatasetDict):
            raise ValueError(f"it has the splits {', '.join(found)}: name the folder of one of them")
        return found
    part = HUB.fullmatch(wanted.name)
    assert part is not None
    return datasets.load_dataset(part["repository"], part["subset"], split=part["split"], revision=part["revision"])


class Rows(Sequence[Row]):
    """The rows of several sources, one behind the other, read when they are asked for.

    ``usable(raw row, folder)`` makes a row of what a source has, or raises ValueError naming the field; each row goes
    through it once here. Raises ConfigError naming source and line or row number, and for an id that occurs twice.
    """

    def __init__(self, found: Sequence[Source], usable: Callable[[Row, Path], Row]) -> None:
        self.sources, self._usable = found, usable
        self.starts = np.cumsum([0, *(len(source.raw) for source in found)])
        total = int(self.starts[-1])
        self.kinds: dict[Any, int] = {}
        self._kind = np.zeros(total, np.int16)
        hashes = np.zeros(total, np.uint64)
        for number, row in enumerate(self):
            self._kind[number] = self.kinds.setdefault(row.get("kind"), len(self.kinds))
            hashes[number] = _hash(row["id"])
        self._by_hash = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._by_hash]
        for place in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]):
            first, second = sorted(map(int, self._by_hash[place : place + 2]))
            if self[first]["id"] == self[second]["id"]:
                raise ConfigError(f"{self.where(second)}: id {self[second]['id']!r} occurs twice; make ids unique")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        number = range(len(self))[number]
        source, own = self._place(number)
        try:
            return self._usable(source.raw[own], source.folder)
        except ValueError as error:
            raise ConfigError(f"{source.where(own)}: {error}") from error

    def __iter__(self) -> Iterator[Row]:
        """In order. Of `datasets`' tables many rows are converted at once, which is faster than each by itself."""
        for source in self.sources:
            own = iter(source.raw)
            for number in range(len(source.raw)):
                try:
                    row = self._usable(next(own), source.folder)
                except ValueError as error:
                    raise ConfigError(f"{source.where(number)}: {error}") from error
                yield row

    def _place(self, number: int) -> tuple[Source, int]:
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sources[index], number - int(self.starts[index])

    def where(self, number: int) -> str:
        """Source and line of a row, for messages."""
        source, own = self._place(number)
        return source.where(own)

    @cached_property
    def streams(self) -> dict[str, list[tuple[int, np.ndarray]]]:
        """Of each kind the sources that have it: their weights and the numbers of their rows."""
        found: dict[str, list[tuple[int, np.ndarray]]] = {}
        for kind, code in self.kinds.items():
            numbers = np.flatnonzero(self._kind == code)
            cuts = np.split(numbers, np.searchsorted(numbers, self.starts[1:-1]))
            found[kind] = [(source.weight, own) for source, own in zip(self.sources, cuts, strict=True) if len(own)]
        return found


class ById(Mapping[str, Row]):
    """The same rows by their ids."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, name: str) -> Row:
        hashes, order = self.rows._hashes, self.rows._by_hash
        wanted = np.uint64(_hash(name))
        for place in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[place] != wanted:
                break
            if (row := self.rows[int(order[place])])["id"] == name:
                return row
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (row["id"] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
