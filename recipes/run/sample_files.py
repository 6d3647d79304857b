"""The responses of an RL run as JSON lines, in files such as ``samples/step_000012_rank_00008.jsonl``.

There is one file for each step and each rank whose engines generated responses of the step. A thread writes the file,
so that no step waits for decoding or writing. Each rank writes its own file, so that no rank has to gather all
responses.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from recipes.run.records import append_rows, read_rows

FOLDER = "samples"  # in a run's folder
NAME = re.compile(r"step_(\d+)_rank_\d+\.jsonl(\.partial)?")

Row = dict[str, Any]


class SampleWriter:
    """Writes the responses that this rank's engines generated, one step at a time."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.folder = run_dir / FOLDER
        self.rank = rank
        self.thread = ThreadPoolExecutor(1, "samples")
        self.writing: Future[None] | None = None

    def write(self, step: int, make_rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Begin to write the rows of a step in the thread, which calls ``make_rows``.

        First waits until the previous step is written. Raises what that raised.
        """
        self.wait()
        self.writing = self.thread.submit(self._write, step, make_rows)

    def wait(self) -> None:
        """Wait until the last step is written. Raises OSError, naming the file, and what ``make_rows`` raised."""
        if self.writing is not None:
            self.writing.result()

    def _write(self, step: int, make_rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step_{step:06d}_rank_{self.rank:05d}.jsonl"
        partial = path.with_name(f"{path.name}.partial")
        partial.unlink(missing_ok=True)
        append_rows(partial, make_rows())
        partial.replace(path)


def read(run_dir: Path) -> Iterator[Row]:
    """Yield the rows of a run by step, and within a step by the rank that wrote them. Reads complete files only.

    Raises ValueError for a line that is not JSON, with its file and number.
    """
    for path in sorted((run_dir / FOLDER).glob("*.jsonl")):
        yield from read_rows(path)


def drop_after(run_dir: Path, step: int) -> None:
    """Remove the files of steps after ``step``, which a resumed run writes again, and incomplete files.

    A kill leaves incomplete files. No file is read.
    """
    for path in (run_dir / FOLDER).glob("step_*"):
        name = NAME.fullmatch(path.name)
        if name and (int(name[1]) > step or name[2]):
            path.unlink()
