"""A rank that stands still ends the run, with the stacks of all ranks in their logs; a rank that is slow is named."""

import ctypes
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median_low
from typing import Any

POLL = 0.5  # seconds between two looks
GRACE = 5.0  # seconds that the other ranks have to see the notice and write their stacks
NOTICE = "stalled"
PR_SET_NAME = 15


class Watchdog:
    """Watches this process from a thread of its own.

    After ``seconds`` without a :meth:`beat` it leaves a notice in ``folder``, says so on standard output, writes every
    thread's stack to standard error (the rank's log) and ends the process with exit code 1. Another rank's notice does
    the same at once, so all ranks' stacks are of the same moment: the folder must be one that all ranks see. Where the
    interpreter itself is held, in a library's code, faulthandler's own thread does it, a little later.
    """

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self.notice, self.rank, self.seconds = folder / NOTICE, rank, seconds
        self.ended = threading.Event()
        self.beat("start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """There is progress: this is what comes next. The process shows it as its name (``top``)."""
        self.last, self.doing = time.monotonic(), doing
        ctypes.CDLL(None).prctl(PR_SET_NAME, doing.encode()[:15])
        faulthandler.dump_traceback_later(self.seconds + 2 * GRACE, exit=True)

    def stop(self) -> None:
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.ended.wait(POLL):
            news = self.notice.read_text() if self.notice.exists() else ""
            if not news and time.monotonic() - self.last < self.seconds:
                continue
            if not news:
                news = f"rank {self.rank} has made no progress for {self.seconds:g} s in {self.doing}"
                with suppress(OSError):  # a full disk: the other ranks have clocks of their own
                    self.notice.write_text(news)
            print(  # on every rank: one of them has the terminal
                f"error: {news}; the stacks of all ranks are in {self.notice.parent}/rank_*.log. If that phase may "
                "take so long, raise cluster.watchdog; go on with resume=true",
                flush=True,
            )
            with suppress(OSError):
                print(f"watchdog: rank {self.rank} in {self.doing}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            time.sleep(GRACE)
            os._exit(1)


def probe(device: Any) -> float:
    """Seconds of a fixed piece of work on this rank alone, the best of five."""
    import torch

    matrix = torch.full([192 if device.type == "cpu" else 4096] * 2, 0.5, device=device)

    def once() -> float:
        started = time.perf_counter()
        float((matrix @ matrix).sum())  # waits for the device
        return time.perf_counter() - started

    return min(once() for _ in range(5))


def slow_ranks(laps: Sequence[Sequence[tuple[str, float]]], factor: float, least: float) -> list[str]:
    """What to say of ranks that took more than ``factor`` times the median of all ranks, and ``least`` seconds more,
    for a phase.

    ``laps``: of each rank its phases, in their order, with the seconds they took, from a moment at which all ranks were
    at the same place. A rank that comes to a phase before the last one waits for it, there or later: so many of its
    seconds are not its own.
    """
    found, passed = [], [0.0] * len(laps)
    for phase in zip(*laps, strict=True):
        name, seconds = phase[0][0], [taken for _, taken in phase]
        usual, last = median_low(seconds), max(passed)
        for number, taken in enumerate(seconds):
            own = taken - (last - passed[number])
            if own > factor * usual and own - usual > least:
                found.append(f"rank {number} is slow: {own:.3g} s for {name}, the median is {usual:.3g} s")
        passed = [before + taken for before, taken in zip(passed, seconds, strict=True)]
    return found
