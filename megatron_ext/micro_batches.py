"""The micro-batches of a plan, built while earlier ones are computed, so that few are on the device at a time."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing

import torch

from megatron_ext import platform
from megatron_ext.batch import TokenBatch
from megatron_ext.packing import MicroBatch, OnDevice

# The number of micro-batches that are built before they are asked for. The preflight counts their memory.
AHEAD = 2
# (batch, indices of responses, function that copies a tensor to the device) → micro-batch, as from ``packing.pack``.
Build = Callable[[TokenBatch, Sequence[int], OnDevice], MicroBatch]


class MicroBatches:
    """The micro-batches of a batch. Each entry of ``plan`` has the responses of one micro-batch.

    Each iteration builds the micro-batches anew, in a thread that is at most ``AHEAD`` micro-batches ahead of the
    caller. Neither the thread nor the caller waits for the copies to the device. An exception in the thread is raised
    in the caller. The number of micro-batches, and whether they have a column, are known before any is built.
    """

    def __init__(self, batch: TokenBatch, plan: Sequence[Sequence[int]], build: Build) -> None:
        self.batch = batch
        self.plan = plan
        self.build = build
        # Name → one tensor for each micro-batch, [R] on the device.
        self.added: dict[str, Sequence[torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        upload = platform.current().uploads()

        def build(indices: Sequence[int]) -> tuple[MicroBatch, Callable[[], None]]:
            return self.build(self.batch, indices, upload), upload.begun()

        with closing(built_ahead(build, self.plan)) as built:
            for number, (micro_batch, wait) in enumerate(built):
                wait()
                micro_batch.values |= {name: columns[number] for name, columns in self.added.items() if columns}
                yield micro_batch

    def has(self, name: str) -> bool:
        """Whether ``MicroBatch.values`` has the column ``name``."""
        return name in self.batch.columns or name in self.batch.response_columns or name in self.added

    def add(self, name: str, columns: Sequence[torch.Tensor]) -> None:
        """Add a column to ``MicroBatch.values``: what a pass over the micro-batches has computed.

        ``columns`` has a tensor [R] for each micro-batch. It is empty on ranks that do not have the column (all but the
        last pipeline stage).
        """
        self.added[name] = columns


class Joined:
    """The micro-batches of several updates, for one pass over all of them."""

    def __init__(self, parts: Sequence[MicroBatches]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __iter__(self) -> Iterator[MicroBatch]:
        for part in self.parts:
            yield from part

    def has(self, name: str) -> bool:
        """Like :meth:`MicroBatches.has`, for all parts."""
        return all(part.has(name) for part in self.parts)

    def add(self, name: str, columns: Sequence[torch.Tensor]) -> None:
        """Like :meth:`MicroBatches.add`, for the micro-batches of all parts in order."""
        first = 0
        for part in self.parts:
            part.add(name, columns[first : first + len(part)])
            first += len(part)


def built_ahead[Source, Built](build: Callable[[Source], Built], sources: Sequence[Source]) -> Generator[Built]:
    """Yield ``build(source)`` for each source. A thread builds them, at most ``AHEAD`` results ahead of the caller.

    Raises what ``build`` raises. The thread has ended when the iterator is exhausted or closed.
    """
    room = threading.Semaphore(AHEAD)
    done: queue.SimpleQueue[tuple[Built, None] | tuple[None, BaseException]] = queue.SimpleQueue()
    is_closed = threading.Event()

    def work() -> None:
        try:
            for source in sources:
                room.acquire()
                if is_closed.is_set():
                    return
                done.put((build(source), None))
        except BaseException as error:
            done.put((None, error))

    def take() -> Built:
        built, error = done.get()
        if error is not None:
            raise error
        room.release()
        return built  # type: ignore[return-value]

    thread = threading.Thread(target=work, name="micro-batches", daemon=True)
    thread.start()
    try:
        for _ in sources:
            yield take()
    finally:
        is_closed.set()
        room.release()
        thread.join()
