"""One format for the log lines of libraries and of this code: time, level, rank, module and message."""

import faulthandler
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from recipes.errors import ConfigError
from recipes.run import failure


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00 WARNING rank 3 megatron.core.optimizer message``; continuation lines are indented."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s %(levelname)s rank {rank} %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip().replace("\n", "\n    ")


def redirect_output(folder: Path, rank: int) -> None:
    """Send warnings and library logs to ``rank_<n>.log``; only rank 0's standard output stays on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    if rank != 0:
        os.dup2(log, 1)
    os.close(log)
    # The disk may be full.
    with suppress(OSError):
        print(failure.header(rank), file=sys.stderr, flush=True)
    # Also writes the stacks where something other than Python ends the process, such as NCCL's watchdog.
    faulthandler.enable()
    configure(rank, sys.stderr)


def configure(rank: int, stream: TextIO) -> None:
    """Write Python's warnings, and log records from WARNING up, to ``stream``.

    Loggers that a library has given handlers keep them.
    """
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what libraries write to standard error within the block.

    It is shown if the block fails, except with a ConfigError, whose text is sufficient.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as notes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except ConfigError:
            raise
        except Exception:
            sys.stderr.flush()
            notes.seek(0)
            os.write(stderr, notes.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
