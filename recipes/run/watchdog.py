"""Ends a run in which a rank hangs, with the stacks of all ranks in their logs, and reports slow ranks."""

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

from megatron_ext import platform

POLL = 0.5  # seconds between two checks
# Seconds in which the other ranks see the notice and write their stacks.
GRACE = 5.0
# A file in the folder of the logs. Its text says which rank hangs, and in which phase.
NOTICE = "stalled"
# From <linux/prctl.h>.
PR_SET_NAME = 15
PROCESS_NAME_BYTES = 15
# The phase of this process that was last reported to its watchdog.
_phase = "start"


def phase() -> str:
    """The current phase of this process, which is the one that began last."""
    return _phase


class Watchdog:
    """A thread that ends this process when it makes no progress.

    After ``seconds`` without a :meth:`beat` the thread writes a notice into ``folder``, prints an error, writes the
    stacks of all threads to standard error (the rank's log) and ends the process with exit code 1. It does the same as
    soon as another rank has written a notice, so that the stacks of all ranks show the same moment. So all ranks must
    share ``folder``. While library code holds the GIL, this thread can't run. Then faulthandler's thread, which needs
    no GIL, writes the stacks and ends the process a little later.
    """

    def __init__(self, folder: Path, rank: int, seconds: float) -> None:
        self.notice = folder / NOTICE
        self.rank = rank
        self.seconds = seconds
        self.ended = threading.Event()
        self.beat("start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Report progress. ``doing`` is the phase that begins. It also becomes the process's name in ``top``."""
        global _phase
        self.last = time.monotonic()
        self.doing = _phase = doing
        ctypes.CDLL(None).prctl(PR_SET_NAME, doing.encode()[:PROCESS_NAME_BYTES])
        faulthandler.dump_traceback_later(self.seconds + 2 * GRACE, exit=True)

    def stop(self) -> None:
        """Stop watching. Called when the run has finished or failed."""
        self.ended.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self.ended.wait(POLL):
            stalled = self.notice.read_text() if self.notice.exists() else ""
            if not stalled and time.monotonic() - self.last < self.seconds:
                continue
            if not stalled:
                stalled = f"rank {self.rank} has made no progress for {self.seconds:g} s in {self.doing}"
                # On a full disk the notice is lost, but the watchdogs of the other ranks end them too.
                with suppress(OSError):
                    self.notice.write_text(stalled)
            # Every rank prints the error. One of them has the terminal.
            print(
                f"error: {stalled}; the stacks of all ranks are in {self.notice.parent}/rank_*.log. If that phase may "
                "take so long, raise cluster.watchdog; go on with resume=true",
                flush=True,
            )
            with suppress(OSError):
                print(f"watchdog: rank {self.rank} in {self.doing}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback()
            time.sleep(GRACE)
            os._exit(1)


def probe(device: Any) -> float:
    """The seconds that a fixed matrix product takes on this rank's device, as the best of five runs."""
    import torch

    side = platform.capabilities(device.type).probe_size
    matrix = torch.full((side, side), 0.5, device=device)

    def once() -> float:
        started = time.perf_counter()
        # float() waits for the device.
        float((matrix @ matrix).sum())
        return time.perf_counter() - started

    return min(once() for _ in range(5))


def slow_ranks(laps: Sequence[Sequence[tuple[str, float]]], factor: float, least: float) -> list[str]:
    """A message for each rank and phase that took much longer than the median of all ranks.

    A rank is slow if it took more than ``factor`` times the median and more than the median plus ``least`` seconds.

    ``laps[rank]`` lists (phase, seconds) in order, from a moment at which all ranks were at the same place. Every rank
    has the same phases. A rank that reaches a phase early waits for the last rank, in this phase or a later one. That
    wait is subtracted from its seconds.
    """
    messages = []
    elapsed = [0.0] * len(laps)
    for phase in zip(*laps, strict=True):
        name = phase[0][0]
        seconds = [taken for _, taken in phase]
        median = median_low(seconds)
        latest = max(elapsed)
        for rank, taken in enumerate(seconds):
            wait = latest - elapsed[rank]
            busy = taken - wait
            if busy > factor * median and busy - median > least:
                messages.append(f"rank {rank} is slow: {busy:.3g} s for {name}, the median is {median:.3g} s")
        elapsed = [before + taken for before, taken in zip(elapsed, seconds, strict=True)]
    return messages
