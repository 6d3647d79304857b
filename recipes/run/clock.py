"""The wall time of a step's phases on this rank."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from recipes.run.watchdog import Watchdog

BETWEEN = "loop"  # what a rank does between two phases


class PhaseClock:
    """Measures the seconds of each phase since the last :meth:`restart`.

    The begin and the end of a phase count as progress for the watchdog. ``laps`` lists the phases and the intervals
    between them in order, each with its seconds.
    """

    def __init__(self, watchdog: Watchdog) -> None:
        self.watchdog = watchdog
        self.seconds: dict[str, float] = defaultdict(float)
        self.laps: list[tuple[str, float]] = []
        self.lap_began = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall time to ``seconds[name]``."""
        self.lap(BETWEEN)
        self.watchdog.beat(name)
        yield
        self.seconds[name] += self.lap(name)
        self.watchdog.beat(BETWEEN)

    def lap(self, name: str) -> float:
        """Assign the time since the last call to a lap of this name and return its seconds."""
        now = time.perf_counter()
        seconds = now - self.lap_began
        self.laps.append((name, seconds))
        self.lap_began = now
        return seconds

    def restart(self) -> None:
        """Discard the measurements and start anew.

        Call it where all ranks are at the same place, since laps of different ranks are compared.
        """
        self.laps = []
        self.seconds.clear()
        self.lap_began = time.perf_counter()
