"""The order in which steps draw rows.

The order is a pure function of (seed, position). So a checkpoint needs no state for it, except the draws at which the
phases of a curriculum began.
"""

import hashlib
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from recipes.data.sources import Row, Rows
from recipes.errors import ConfigError

# Rounds of the keyed permutation. With fewer rounds, the possible orders of five rows are not equally frequent
# (measured).
ROUNDS = 12

# The phases of a curriculum, as (first step, mix). The first steps ascend from 0. A mix is kind → share.
type Phases = Sequence[tuple[int, Mapping[str, int]]]
NEVER = sys.maxsize  # the first draw of a phase that has not begun


def permuted(place: int, size: int, key: str) -> int:
    """The image of ``place`` under the permutation of range(size) that ``key`` selects: a shuffle without memory.

    This is a generalised Feistel cipher (Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002) with
    BLAKE2 as the round function. The number is written with two digits, in bases whose product is at least ``size``. An
    image of ``size`` or more is permuted again until it is below ``size``.
    """
    left_base = math.isqrt(size - 1) + 1
    # If both bases were odd, the rounds would give even permutations only.
    left_base += left_base % 2
    right_base = -(-size // left_base)
    while True:
        left, right = divmod(place, right_base)
        for round_number in range(ROUNDS):
            if round_number % 2:
                right = (right + _round_function(left, round_number, key)) % right_base
            else:
                left = (left + _round_function(right, round_number, key)) % left_base
        place = left * right_base + right
        if place < size:
            return place


def _round_function(value: int, round_number: int, key: str) -> int:
    digest = hashlib.blake2b(f"{key}/{round_number}/{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def ordered(position: int, size: int, seed: int, window: int = 1) -> int:
    """The number of the row at ``position`` of an endless stream that shuffles ``size`` rows anew in each epoch.

    No row occurs twice in ``window`` successive positions. This needs at least 2 x window - 2 rows. The function is
    pure. With 3 x window - 3 rows or more, its running time does not depend on the position.
    """
    epoch, place = divmod(position, size)
    if place < 2 * window - 2:
        return _epoch_opening(size, epoch, seed, window)[place]
    return permuted(place, size, f"{seed}/{epoch}")


@lru_cache(maxsize=64)
def _epoch_opening(size: int, epoch: int, seed: int, window: int) -> tuple[int, ...]:
    """The first rows of an epoch: its permutation, in which rows from the end of the previous epoch are delayed.

    The rows of the last ``window - 1`` places of the previous epoch come after the first ``window - 1`` places.
    """
    delay = window - 1
    opening_size = min(size, 2 * delay)
    # In a small data set, an epoch's opening may overlap the places whose rows the next epoch delays. Then each epoch
    # depends on the one before, and all are computed from the first one on.
    first_epoch = epoch if size >= 3 * delay else 0
    recent: set[int] = set()
    if first_epoch:
        recent = {permuted(place, size, f"{seed}/{epoch - 1}") for place in range(size - delay, size)}
    order: list[int] = []
    for number in range(first_epoch, epoch + 1):
        count = opening_size if first_epoch == epoch else size
        permutation = [permuted(place, size, f"{seed}/{number}") for place in range(count)]
        head = [row for row in permutation[:opening_size] if row not in recent][:delay]
        in_head = set(head)
        order = head + [row for row in permutation if row not in in_head]
        recent = set(order[len(order) - delay :])
    return tuple(order)


def shuffled(rows: Sequence[Row], start: int, count: int, seed: int, window: int = 1) -> list[Row]:
    """The rows at positions [start, start + count) of the stream of :func:`ordered`."""
    return [rows[ordered(position, len(rows), seed, window)] for position in range(start, start + count)]


def curriculum_phases(data: Any) -> list[tuple[int, dict[str, int]]]:
    """The :data:`Phases` of a configuration's ``data`` group, without kinds of share 0."""
    phases = [(phase.from_step, phase.mix) for phase in data.curriculum]
    if not phases:
        phases = [(0, data.mix)]
    return [(first_step, {kind: share for kind, share in mix.items() if share}) for first_step, mix in phases]


@dataclass
class Curriculum:
    """The phases of a curriculum, and the first draw of each phase that has begun.

    A checkpoint stores these first draws, because the number of draws of prompts in a step depends on the run (dynamic
    sampling, oversampling).
    """

    phases: Phases
    # A phase's first step → its first draw.
    first_draws: dict[int, int] = field(default_factory=dict, init=False)

    def reach(self, step: int, draws: int) -> None:
        """Record that the next draw is for ``step`` (from 0), after ``draws`` draws in total. Steps never descend."""
        for first_step, _ in self.phases:
            if first_step <= step:
                self.first_draws.setdefault(first_step, draws)

    def state(self) -> list[tuple[int, int]]:
        """The first step and the first draw of each phase that has begun, for :meth:`resume`."""
        return sorted(self.first_draws.items())

    def resume(self, state: Sequence[tuple[int, int]], finished: int, draws: int) -> None:
        """Restore the :meth:`state` that was saved after ``finished`` steps and ``draws`` draws.

        The phases may have changed since. A new phase that would have begun already has had no draw. Its first draw is
        that of the next phase that has begun, or the next draw if there is none.
        """
        known = dict(state)
        first_draw = draws
        self.first_draws = {}
        for first_step, _ in reversed(self.phases):
            has_begun = first_step in known or first_step < finished
            if has_begun:
                first_draw = known.get(first_step, first_draw)
                self.first_draws[first_step] = first_draw

    def of_draws(self) -> list[tuple[int, Mapping[str, int]]]:
        """The :data:`Phases` with first draws in place of first steps.

        A phase in which nothing was drawn has the same first draw as the next phase. A phase that has not begun has
        :data:`NEVER`.
        """
        return [(self.first_draws.get(first_step, NEVER), mix) for first_step, mix in self.phases]


def scheduled(rows: Sequence[Row], phases: Phases, draw: int, count: int, seed: int) -> list[Row]:
    """The ``count`` prompts of a draw (from 0), with kinds interleaved by their shares in the draw's phase.

    ``phases`` begin with draws, not steps (:meth:`Curriculum.of_draws`).

    Each kind is a separate stream, which continues across phases. Within a kind the sources take turns by their
    weights, and each source is a shuffled stream. No prompt occurs twice in a draw. Raises ConfigError if the data has
    too few prompts of a kind for that.
    """
    streams = _streams(rows)
    windows = _windows(phases, count)
    _check_enough(streams, windows, "data.curriculum" if len(phases) > 1 else "data.mix")
    first_draw, mix, drawn_before = _phase_of(phases, draw, count)
    kind_cycle = interleaved(mix)
    source_cycles = {}
    for kind in mix:
        weights = {source: weight for source, (weight, _) in enumerate(streams[kind])}
        source_cycles[kind] = interleaved(weights)
    batch = []
    first_place = (draw - first_draw) * count
    for place in range(first_place, first_place + count):
        kind, drawn_in_phase = _turn(kind_cycle, place)
        source, position = _turn(source_cycles[kind], drawn_before[kind] + drawn_in_phase)
        weight, numbers = streams[kind][source]
        window = _most_turns(windows[kind], weight, len(source_cycles[kind]))
        number = numbers[ordered(position, len(numbers), seed, window)]
        batch.append(rows[int(number)])
    return batch


def _streams(rows: Sequence[Row]) -> Mapping[str, Sequence[tuple[int, np.ndarray]]]:
    """Kind → the sources that have rows of it, as (the source's weight, the numbers of these rows)."""
    if isinstance(rows, Rows):
        return rows.streams
    by_kind: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_kind[row["kind"]].append(number)
    return {kind: [(1, np.array(numbers))] for kind, numbers in by_kind.items()}


def _windows(phases: Phases, count: int) -> dict[str, int]:
    """Kind → an upper bound of the prompts of this kind in one draw, over all phases."""
    windows: dict[str, int] = {}
    for _, mix in phases:
        for kind, share in mix.items():
            windows[kind] = max(windows.get(kind, 0), _most_turns(count, share, sum(mix.values())))
    return windows


def _most_turns(count: int, share: int, total: int) -> int:
    """An upper bound of an item's turns in ``count`` successive turns, if it has ``share`` turns in a cycle of
    ``total``.
    """
    return -(-count // total) * share


def _check_enough(
    streams: Mapping[str, Sequence[tuple[int, np.ndarray]]], windows: Mapping[str, int], field: str
) -> None:
    for kind, window in windows.items():
        sources = streams.get(kind, [(1, np.array([]))])
        total_weight = sum(weight for weight, _ in sources)
        for weight, numbers in sources:
            source_window = _most_turns(window, weight, total_weight)
            needed = max(source_window, 2 * source_window - 2)
            if not len(numbers):
                known = ", ".join(sorted(streams)) or "none"
                raise ConfigError(
                    f"{field} has {kind!r}, of which data.prompts holds 0 rows; its kinds are {known}: give your own "
                    "mix in a file of conf/data/, or leave the kind out, as ~data.mix.KIND does on the command line"
                )
            if len(numbers) < needed:
                one = " in one of its sources" if len(sources) > 1 else ""
                raise ConfigError(
                    f"{field} has {kind!r}, of which data.prompts holds {len(numbers)} rows{one}; {needed} are needed "
                    "so that no step asks one twice: add rows or lower algorithm.prompts_per_step"
                )


def _phase_of(phases: Phases, draw: int, count: int) -> tuple[int, Mapping[str, int], Counter[str]]:
    """The phase of a draw: its first draw, its mix, and how many prompts of each kind the earlier phases drew."""
    drawn: Counter[str] = Counter()
    first_draw, mix = phases[0]
    for next_first_draw, next_mix in phases[1:]:
        if next_first_draw > draw:
            break
        cycles, rest = divmod((next_first_draw - first_draw) * count, sum(mix.values()))
        drawn.update({kind: cycles * share for kind, share in mix.items()})
        drawn.update(interleaved(mix)[:rest])
        first_draw = next_first_draw
        mix = next_mix
    return first_draw, mix, drawn


def _turn[T](cycle: Sequence[T], place: int) -> tuple[T, int]:
    """The item at ``place`` of the endlessly repeated ``cycle``, and how often the item occurred before."""
    cycles, index = divmod(place, len(cycle))
    item = cycle[index]
    return item, cycles * cycle.count(item) + cycle[:index].count(item)


def interleaved[T](shares: Mapping[T, int]) -> list[T]:
    """One cycle of the keys, each as often as its share and evenly spread (smooth weighted round-robin)."""
    credit = dict.fromkeys(shares, 0)
    total = sum(shares.values())
    cycle = []
    for _ in range(total):
        for item, share in shares.items():
            credit[item] += share
        best = max(credit, key=lambda item: credit[item])
        credit[best] -= total
        cycle.append(best)
    return cycle
