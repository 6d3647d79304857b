"""Many copies from tensors to tensors in few calls, by threads that keep all cores of a CPU busy."""

import ctypes
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import set_num_threads  # now: vLLM's CPU worker puts a function there that does nothing

from rollout.weight_sync.plan import Copy

# What a thread copies in one call, at least (of a tensor with longer rows at most one row): small enough that the
# threads end at the same time and a round that lands meanwhile waits little.
BATCH_BYTES = 4 << 20


@dataclass
class Batch:
    """``moves``: addresses of target and source, each in one piece, of one dtype, in the host's memory, and the bytes,
    which the C library copies, past the caches where that is faster (``rollout.engine.environment``); ``held`` are the
    tensors there. ``joins``: such targets whose rows several sources make, side by side: written in one go they take
    two thirds of the time of one source after the other. ``targets`` and ``sources``: the other pairs."""

    moves: list[tuple[int, int, int]] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    joins: list[tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)


def by_rows(copies: Iterable[Copy], parameters: Mapping[str, torch.Tensor]) -> Iterator[list[Copy]]:
    """The copies that make whole rows of a matrix together, from left to right; every other one alone. As in a plan, no
    two of ``copies`` write the same element."""
    rows: dict[tuple[str, int, int], list[Copy]] = defaultdict(list)
    for c in copies:
        rows[c.parameter, c.parameter_start[0], c.shape[0]].append(c)
    for (name, _, _), parts in rows.items():
        shape = parameters[name].shape
        if len(shape) == 2 and sum(c.shape[1] for c in parts) == shape[1]:
            yield sorted(parts, key=lambda c: c.parameter_start)
        else:
            yield from ([c] for c in parts)


def batches(copies: Iterable[tuple[torch.Tensor, list[torch.Tensor]]]) -> list[Batch]:
    """(target, its sources side by side in the last dimension), views of at least one dimension, in batches; large ones
    are cut along their first dimension."""
    made: list[Batch] = []
    room = 0
    for target, sources in copies:
        plain = all(s.dtype == target.dtype and s.device == target.device == torch.device("cpu") for s in sources)
        rows = max(BATCH_BYTES * len(target) // max(target.nbytes, 1), 1)
        for to, *parts in zip(target.split(rows), *(source.split(rows) for source in sources), strict=True):
            if room <= 0:
                made.append(Batch())
                room = BATCH_BYTES
            if plain and all(tensor.is_contiguous() for tensor in (to, *parts)):
                if len(parts) == 1:
                    made[-1].moves.append((to.data_ptr(), parts[0].data_ptr(), to.nbytes))
                    made[-1].held += (to, parts[0])
                else:
                    made[-1].joins.append((to, parts))
            else:
                made[-1].targets += to.split([part.shape[-1] for part in parts], dim=-1)
                made[-1].sources += parts
            room -= to.nbytes
    return made


def copy_batch(batch: Batch) -> None:
    """Copy every source into its target, converting to the target's dtype."""
    for to, source, size in batch.moves:
        ctypes.memmove(to, source, size)
    for target, sources in batch.joins:
        torch.cat(sources, dim=-1, out=target)
    if batch.targets:
        torch._foreach_copy_(batch.targets, batch.sources)


def even_threads(cores: int, workers: int) -> int:
    """Threads for each of so many processes that copy at the same time: the fewest with which all cores have as many.
    Linux leaves two threads on one core for the whole of a sync while another core is idle: three workers with one
    each took 1.1 times as long on two cores."""
    return cores // math.gcd(cores, workers)


class Copiers:
    """Threads that share work out among them; with one, the caller does it. Each uses one core: a parallel loop within
    each small copy costs more than the copy."""

    def __init__(self, threads: int) -> None:
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        if self.pool:
            before, started = torch.get_num_threads(), threading.Barrier(threads)

            def start(_: int) -> None:
                torch.get_num_threads()  # the first call in a thread takes the process's number, over the next line's
                set_num_threads(1)  # of this thread, and of those that start later
                started.wait()

            list(self.pool.map(start, range(threads)))
            set_num_threads(before)
        self.threads = threads

    def run(self, work: Callable[[], bool]) -> None:
        """Call ``work`` on all threads until it returns False. Raises what it raises, when all have ended."""

        def drain() -> None:
            while work():
                pass

        if self.pool:
            running = [self.pool.submit(drain) for _ in range(self.threads)]
            wait(running)
            for each in running:
                each.result()
        else:
            drain()

    def stop(self) -> None:
        if self.pool:
            self.pool.shutdown()
