"""The responses of an RL run as JSON lines: ``samples/step_000012_rank_00008.jsonl``, a file for each step and rank
whose engines made some of them. A thread writes it, so no step waits for text, and nothing passes through one rank."""

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
    """Writes the responses that this rank made, one step at a time."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        self.folder = run_dir / FOLDER
        self.rank = rank
        self.thread = ThreadPoolExecutor(1, "samples")
        self.writing: Future[None] | None = None

    def write(self, step: int, make_rows: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        """Begin to write a step's rows, which the thread makes, when the step before is written. Raises what that
        raised."""
        self.wait()
        self.writing = self.thread.submit(self._write, step, make_rows)

    def wait(self) -> None:
        """Until the last step is written. Raises OSError, naming the file, and what ``make_rows`` raised."""
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
    """The rows of a run, step by step; those of a step in the order of the ranks that made them. Complete files only.

    Raises ValueError for a line that is not JSON, with its file and number.
    """
    for path in sorted((run_dir / FOLDER).glob("*.jsonl")):
        yield from read_rows(path)


def drop_after(run_dir: Path, step: int) -> None:
    """Remove the files of later steps, which a run resumed at ``step`` writes again, and those that a kill cut off. No
    file is read."""
    for path in (run_dir / FOLDER).glob("step_*"):
        name = NAME.fullmatch(path.name)
        if name and (int(name[1]) > step or name[2]):
            path.unlink()
