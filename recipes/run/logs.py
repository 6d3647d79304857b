"""One format for what libraries and this code log: ``time level rank module message``, a line each."""

import logging
from typing import TextIO


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00 WARNING rank 3 megatron.core.optimizer message``; further lines are set in."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s %(levelname)s rank {rank} %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).rstrip().replace("\n", "\n    ")


def configure(rank: int, stream: TextIO) -> None:
    """Have every logger without handlers of its own, and Python's warnings, write to ``stream`` from WARNING up."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(LineFormatter(rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
