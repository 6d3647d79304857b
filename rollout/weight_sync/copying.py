"""Many copies from tensors to tensors in few calls, by as many threads as the process has on a CPU."""

import ctypes
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch
from torch import set_num_threads  # now: vLLM's CPU worker puts a function there that does nothing

# What a thread copies in one call, at least (of a tensor with longer rows at most one row): small enough that the
# threads end at the same time and a round that lands meanwhile waits little.
BATCH_BYTES = 4 << 20


@dataclass
class Batch:
    """``moves``: (target, source) in one piece each, of one dtype, in the host's memory: of these the C library copies
    the bytes, past the caches where that is faster (``rollout.engine.environment``). ``targets`` and ``sources``: the
    other pairs."""

    moves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)


def batches(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> list[Batch]:
    """(target, source) views of at least one dimension, in batches; large ones are cut along their first dimension."""
    made: list[Batch] = []
    room = 0
    for target, source in pairs:
        plain = target.dtype == source.dtype and target.device == source.device == torch.device("cpu")
        rows = max(BATCH_BYTES * len(target) // max(target.nbytes, 1), 1)
        for to, what in zip(target.split(rows), source.split(rows), strict=True):
            if room <= 0:
                made.append(Batch())
                room = BATCH_BYTES
            if plain and to.is_contiguous() and what.is_contiguous():
                made[-1].moves.append((to, what))
            else:
                made[-1].targets.append(to)
                made[-1].sources.append(what)
            room -= to.nbytes
    return made


def copy_batch(batch: Batch) -> None:
    """Copy every source into its target, converting to the target's dtype."""
    for target, source in batch.moves:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.nbytes)
    if batch.targets:
        torch._foreach_copy_(batch.targets, batch.sources)


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
