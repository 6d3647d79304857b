"""Copies many tensors in few calls, with threads that keep all cores of a CPU busy."""

import ctypes
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import torch

# Imported here, because vLLM's CPU worker later replaces torch.set_num_threads by a function that does nothing.
from torch import set_num_threads

from rollout import vllm_platform
from rollout.weight_sync.plan import Copy

# The least number of bytes that a thread copies in one call. It is small enough that all threads end at about the same
# time, and that a round that becomes ready during a call waits only briefly. A part of a copy has at most this many
# bytes, or one row if a row is longer.
BATCH_BYTES = 4 << 20


@dataclass
class Batch:
    """Copies that one thread executes in one call, each in the fastest way."""

    moves: list[tuple[int, int, int]] = field(default_factory=list)
    """(target address, source address, bytes) of contiguous tensors of one dtype in host memory. The C library copies
    them, with non-temporal stores where that is faster (see the engine's environment in ``rollout.vllm_platform``)."""
    moved_tensors: list[torch.Tensor] = field(default_factory=list)
    """Keeps the memory of ``moves`` alive."""
    joins: list[tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=list)
    """(target, sources), with the same conditions as ``moves``. The sources are concatenated along the last dimension.
    Writing them in one pass takes two thirds of the time of copying one source after another."""
    targets: list[torch.Tensor] = field(default_factory=list)
    """All other copies: the targets of ``sources``."""
    sources: list[torch.Tensor] = field(default_factory=list)


def by_rows(copies: Iterable[Copy], parameters: Mapping[str, torch.Tensor]) -> Iterator[list[Copy]]:
    """Group the copies that together fill complete rows of a matrix, from left to right.

    Every other copy is a group of its own. No two of ``copies`` may write the same element; a plan ensures this.
    """
    copies_of_rows: dict[tuple[str, int, int], list[Copy]] = defaultdict(list)
    for copy in copies:
        copies_of_rows[copy.parameter, copy.parameter_start[0], copy.shape[0]].append(copy)
    for (name, _, _), parts in copies_of_rows.items():
        shape = parameters[name].shape
        if len(shape) == 2 and sum(part.shape[1] for part in parts) == shape[1]:
            yield sorted(parts, key=lambda part: part.parameter_start)
        else:
            for part in parts:
                yield [part]


def batches(copies: Iterable[tuple[torch.Tensor, list[torch.Tensor]]]) -> list[Batch]:
    """Put copies into batches. Large copies are split along their first dimension.

    ``copies`` are pairs (target, sources). The target takes the concatenation of its sources along the last dimension.
    All are views of at least one dimension.
    """
    all_batches: list[Batch] = []
    room = 0
    for target, sources in copies:
        can_move = vllm_platform.of(target.device.type).in_host_memory and all(
            source.dtype == target.dtype and source.device == target.device for source in sources
        )
        rows = max(BATCH_BYTES * len(target) // max(target.nbytes, 1), 1)
        source_parts = [source.split(rows) for source in sources]
        for target_part, *parts in zip(target.split(rows), *source_parts, strict=True):
            if room <= 0:
                all_batches.append(Batch())
                room = BATCH_BYTES
            batch = all_batches[-1]
            if can_move and all(tensor.is_contiguous() for tensor in (target_part, *parts)):
                if len(parts) == 1:
                    batch.moves.append((target_part.data_ptr(), parts[0].data_ptr(), target_part.nbytes))
                    batch.moved_tensors += (target_part, parts[0])
                else:
                    batch.joins.append((target_part, parts))
            else:
                batch.targets += target_part.split([part.shape[-1] for part in parts], dim=-1)
                batch.sources += parts
            room -= target_part.nbytes
    return all_batches


def copy_batch(batch: Batch) -> None:
    """Copy every source into its target, converting to the target's dtype."""
    for target_address, source_address, size in batch.moves:
        ctypes.memmove(target_address, source_address, size)
    for target, sources in batch.joins:
        torch.cat(sources, dim=-1, out=target)
    if batch.targets:
        torch._foreach_copy_(batch.targets, batch.sources)


def even_threads(cores: int, workers: int) -> int:
    """Return the number of threads for each of ``workers`` processes that copy at the same time.

    It is the smallest number that loads all cores equally. Linux may leave two threads on one core for a whole sync
    while another core is idle. On two cores, three workers with one thread each took 1.1 times as long.
    """
    return cores // math.gcd(cores, workers)


class Copiers:
    """Threads that share work. With one thread, the caller does the work.

    Each thread uses one core, because a parallel loop inside each small copy takes longer than the copy.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None
        if self.pool:
            process_threads = torch.get_num_threads()
            all_started = threading.Barrier(threads)

            def start(_: int) -> None:
                # The first of these calls in a thread sets its number of threads to that of the process, so it must
                # happen before ``set_num_threads``.
                torch.get_num_threads()
                # This applies to this thread and to threads that start later. It is reset below.
                set_num_threads(1)
                all_started.wait()

            list(self.pool.map(start, range(threads)))
            set_num_threads(process_threads)

    def run(self, work: Callable[[], bool]) -> None:
        """Call ``work`` on all threads until it returns False. Once all threads have ended, raises what it raised."""

        def work_until_done() -> None:
            while work():
                pass

        if self.pool:
            running = [self.pool.submit(work_until_done) for _ in range(self.threads)]
            wait(running)
            for thread in running:
                thread.result()
        else:
            work_until_done()

    def stop(self) -> None:
        if self.pool:
            self.pool.shutdown()
