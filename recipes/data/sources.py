"""Sources of rows, which are read on demand.

A source is JSON lines in one file or several, a parquet file, a folder saved by `datasets`, or a data set of the hub.

A file of JSON lines is memory-mapped, and a line is parsed when its row is read. The other formats become `datasets`'
Arrow tables, which are memory-mapped too (`datasets` converts a parquet file or a hub's data set once, into its cache).
The memory per row is 18 bytes, and 8 more for the end of a line.

`datasets`' streams are not used. An exact shuffle and an exact resume read rows by number, and streams only give rows
in order or shuffled within a buffer.
"""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from recipes.data.source_spec import HUB_NAME, SourceSpec
from recipes.errors import ConfigError

Row = Mapping[str, Any]
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
CHUNK_BYTES = 1 << 26  # how much of a file is searched at a time for the ends of lines


class JsonLines:
    """The objects of a file of JSON lines, by number. Raises ValueError when a line that is no JSON object is read."""

    def __init__(self, path: str) -> None:
        with Path(path).open("rb") as file:
            size = file.seek(0, 2)
            # An empty file can't be mapped.
            self.bytes: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        line_ends = [np.array([-1])]
        for start in range(0, size, CHUNK_BYTES):
            chunk = np.frombuffer(self.bytes, np.uint8, min(CHUNK_BYTES, size - start), start)
            line_ends.append(np.flatnonzero(chunk == ord("\n")) + start)
        if size and self.bytes[-1] != ord("\n"):
            line_ends.append(np.array([size]))
        # Line i is the bytes between line_ends[i] and line_ends[i + 1].
        self.line_ends = np.concatenate(line_ends)

    def __len__(self) -> int:
        return len(self.line_ends) - 1

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Line ``number``, from 0."""
        line = self.bytes[self.line_ends[number] + 1 : self.line_ends[number + 1]]
        try:
            row = json.loads(line)
        except ValueError as error:  # UnicodeDecodeError too
            raise ValueError(f"not JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f"not a JSON object but {type(row).__name__}; write one object a line")
        if SURROGATE.search(line):
            for field, value in row.items():
                check_encodable(field, value)
        return row


class JsonLinesFolder:
    """The objects of all ``.jsonl`` files of a folder, in the order of the files' names, like :class:`JsonLines`."""

    def __init__(self, folder: str) -> None:
        self.files = [JsonLines(str(path)) for path in sorted(Path(folder).glob("*.jsonl"))]
        # File i has the objects from starts[i] up to starts[i + 1].
        self.starts = np.cumsum([0, *map(len, self.files)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self):
            raise IndexError(number)
        file = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.files[file][number - int(self.starts[file])]


def check_encodable(field: str, value: Any) -> None:
    """Raises ValueError for a text with half of a surrogate pair (\\ud83d in JSON), which no tokenizer accepts.

    ``value`` may also be a list or mapping of texts.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_encodable(f"{field}.{key}", item)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_encodable(f"{field}[{i}]", item)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(
                f"field {field!r} has half of a character, {half}, at place {error.start}: write the complete "
                "surrogate pair or take it out"
            ) from None


@dataclass(frozen=True)
class Source:
    """An open source of rows."""

    name: str
    weight: int
    # The raw rows, by number.
    table: Any
    # File names in the rows are relative to this folder.
    folder: Path
    # Whether error messages name the line of a row instead of the row's number.
    by_line: bool

    def location(self, number: int) -> str:
        """The location of row ``number`` (from 0), for error messages."""
        return f"{self.name}:{number + 1}" if self.by_line else f"{self.name}: row {number + 1}"


def open_source(spec: SourceSpec) -> Source:
    """Open a source. Raises ConfigError, with the reason, for a file that can't be read."""
    if spec.format in ("jsonl", "jsonl_folder"):
        is_file = spec.format == "jsonl"
        try:
            lines = JsonLines(spec.name) if is_file else JsonLinesFolder(spec.name)
        except (OSError, ValueError) as error:  # mmap raises them for anything but a regular file
            raise ConfigError(
                f"{spec.name}: can't be read ({error}); see to its permissions, or name another"
            ) from error
        folder = Path(spec.name).resolve()
        return Source(spec.name, spec.weight, lines, folder.parent if is_file else folder, by_line=is_file)
    try:
        table = _open_table(spec)
    except Exception as error:  # `datasets`, its readers and its hub raise many kinds of exceptions
        raise ConfigError(
            f"{spec.name}: `datasets` can't read it ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    folders = {"parquet": Path(spec.name).parent, "folder": Path(spec.name), "hub": Path()}
    return Source(spec.name, spec.weight, table, folders[spec.format].resolve(), by_line=False)


def _open_table(spec: SourceSpec) -> Any:
    import datasets  # the import takes a second, and JSON lines don't need it

    datasets.disable_progress_bars()
    if spec.format == "parquet":
        return datasets.Dataset.from_parquet(spec.name)
    if spec.format == "folder":
        dataset = datasets.load_from_disk(spec.name)
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(f"it has the splits {', '.join(dataset)}: name the folder of one of them")
        return dataset
    hub = HUB_NAME.fullmatch(spec.name)
    assert hub is not None
    return datasets.load_dataset(hub["repository"], hub["subset"], split=hub["split"], revision=hub["revision"])


class Rows(Sequence[Row]):
    """The rows of several sources, one source after the other, read on demand.

    ``normalise(raw row, folder)`` converts a source's row to the form of ``recipes.data.rows``, or raises ValueError
    naming the field. The constructor reads all rows once, to check them and to index ids and kinds. Raises ConfigError,
    naming the source and the line or row number, for an invalid row and for an id that occurs twice.
    """

    def __init__(self, sources: Sequence[Source], normalise: Callable[[Row, Path], Row]) -> None:
        self.sources = sources
        self._normalise = normalise
        # Source i has the rows from starts[i] up to starts[i + 1].
        self.starts = np.cumsum([0, *(len(source.table) for source in sources)])
        total = int(self.starts[-1])
        self.kinds: dict[Any, int] = {}  # kind → its code in _kind_codes
        self._kind_codes = np.zeros(total, np.int16)
        id_hashes = np.zeros(total, np.uint64)
        for number, row in enumerate(self):
            self._kind_codes[number] = self.kinds.setdefault(row.get("kind"), len(self.kinds))
            id_hashes[number] = _hash_of_id(row["id"])
        self._rows_by_hash = np.argsort(id_hashes, kind="stable")
        self._sorted_hashes = id_hashes[self._rows_by_hash]
        self._check_ids_differ()

    def _check_ids_differ(self) -> None:
        equal_hashes = np.flatnonzero(self._sorted_hashes[1:] == self._sorted_hashes[:-1])
        for place in equal_hashes:
            first, second = sorted(map(int, self._rows_by_hash[place : place + 2]))
            if self[first]["id"] == self[second]["id"]:
                raise ConfigError(f"{self.location(second)}: id {self[second]['id']!r} occurs twice; make ids unique")

    def __len__(self) -> int:
        return int(self.starts[-1])

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> list[Row]: ...
    def __getitem__(self, number: int | slice) -> Row | list[Row]:
        """Row ``number`` (negative: from the end), or the rows of a slice."""
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        source, number_in_source = self._locate(range(len(self))[number])
        try:
            return self._normalise(source.table[number_in_source], source.folder)
        except ValueError as error:
            raise ConfigError(f"{source.location(number_in_source)}: {error}") from error

    def __iter__(self) -> Iterator[Row]:
        """All rows in order. This is faster than reading by number, since `datasets` converts many rows at once."""
        for source in self.sources:
            raw_rows = iter(source.table)
            for number in range(len(source.table)):
                try:
                    row = self._normalise(next(raw_rows), source.folder)
                except ValueError as error:
                    raise ConfigError(f"{source.location(number)}: {error}") from error
                yield row

    def _locate(self, number: int) -> tuple[Source, int]:
        """The source of row ``number`` and the row's number in it."""
        index = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sources[index], number - int(self.starts[index])

    def location(self, number: int) -> str:
        """The source and line (or row number) of row ``number``, for error messages."""
        source, number_in_source = self._locate(number)
        return source.location(number_in_source)

    def check_each(self, check: Callable[[Row], object]) -> None:
        """Call ``check`` on every row in order. A ConfigError that it raises gets the row's location."""
        for number, row in enumerate(self):
            try:
                check(row)
            except ConfigError as error:
                raise ConfigError(f"{self.location(number)}: {error}") from error

    @cached_property
    def streams(self) -> dict[Any, list[tuple[int, np.ndarray]]]:
        """Kind → the sources that have rows of it, as (the source's weight, the numbers of these rows)."""
        streams: dict[Any, list[tuple[int, np.ndarray]]] = {}
        for kind, code in self.kinds.items():
            numbers = np.flatnonzero(self._kind_codes == code)
            by_source = np.split(numbers, np.searchsorted(numbers, self.starts[1:-1]))
            streams[kind] = [
                (source.weight, of_source)
                for source, of_source in zip(self.sources, by_source, strict=True)
                if len(of_source)
            ]
        return streams


class RowsById(Mapping[str, Row]):
    """The rows by id. A row is looked up by binary search for the hash of its id, and read on demand."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, row_id: str) -> Row:
        hashes = self.rows._sorted_hashes
        wanted = np.uint64(_hash_of_id(row_id))
        for place in range(int(np.searchsorted(hashes, wanted)), len(hashes)):
            if hashes[place] != wanted:
                break
            row = self.rows[int(self.rows._rows_by_hash[place])]
            if row["id"] == row_id:
                return row
        raise KeyError(row_id)

    def __iter__(self) -> Iterator[str]:
        return (row["id"] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def _hash_of_id(row_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(row_id.encode(), digest_size=8).digest(), "little")
