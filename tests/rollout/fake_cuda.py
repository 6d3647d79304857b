"""A fake of the CUDA driver, of torch's CUDA IPC and of NCCL, for the transports of the weight sync on a CPU.

Device memory is host memory, processes are threads, and operations are done at once. What is real is the bookkeeping:

* **Order.** Every stream, and the host of every process, has a vector clock. Operations on one stream are in order; a
  stream follows its host's calls; a host follows a stream when it synchronises; streams of different processes follow
  each other through messages of NCCL and through the counters of ``Signals`` alone. Two operations on the same bytes,
  of which one writes, must be in order. It does not matter which of them happens to come first.
* **Device.** A process that opens memory on another GPU than its own, without peer access, or its own memory, is wrong.
* **Lifetime.** Memory that is freed while a living process maps it stays allocated for as long as torch's counter of
  readers says so (``kept``), and is an error otherwise. So is a handle that is opened after its memory was freed, and a
  mapping that is released twice.

Everything wrong is a :class:`DriverError` where it happens.
"""

import ctypes
import itertools
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rollout.weight_sync.memory import Signals

WAIT_SECONDS = 30
aten = torch.ops.aten


class DriverError(AssertionError):
    """What a GPU would answer with an error, other values, or not at all."""


Clock = dict[str, int]
"""Stream → how many of its operations have ended before."""


def join(clock: Clock, other: Clock) -> None:
    for stream, count in other.items():
        clock[stream] = max(clock.get(stream, 0), count)


@dataclass
class Process:
    """``gpu``: the number of its GPU among all; each process sees all of them in the same order."""

    name: str
    gpu: int
    alive: bool = True
    contexts: set[int] = field(default_factory=set)
    host: Clock = field(default_factory=dict)
    stream: Clock = field(default_factory=dict)
    nccl: Clock = field(default_factory=dict)


@dataclass
class Access:
    """Bytes [start, stop) of an allocation, by operation ``number`` of a stream."""

    start: int
    stop: int
    stream: str
    number: int
    writes: bool


@dataclass
class Allocation:
    """Device memory at ``address``. ``readers_counter``: torch's, 1 when it is shared, less by 1 for each release."""

    owner: Process
    address: int
    size: int
    freed: bool = False
    readers_counter: int = 0
    mappings: list[Process] = field(default_factory=list)
    accesses: list[Access] = field(default_factory=list)


class Driver:
    """All GPUs of a host, and the processes on them. ``peers``: whether the first GPU can read the second's memory."""

    def __init__(self, gpus: int) -> None:
        self.gpus = gpus
        self.peers: Callable[[int, int], bool] = lambda a, b: True
        self.here = threading.local()
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.allocations: dict[int, Allocation] = {}
        self.limbo: list[Allocation] = []
        # Addresses of what is in the host's memory on GPUs too.
        self.host_memory: set[int] = set()
        self.handles: dict[bytes, Allocation] = {}
        self.published: dict[tuple[int, int], list[tuple[int, Clock]]] = defaultdict(list)
        self.numbers = itertools.count(1)
        self.wrong: list[str] = []
        self.groups: dict[Any, list[list[Any]]] = defaultdict(list)
        self.queues: dict[tuple[int, int, bool], list[tuple[Any, int, Any]]] = defaultdict(list)
        self.ranks: dict[int, Process] = {}

    def fail(self, text: str) -> None:
        with self.changed:
            self.wrong.append(text)
            self.changed.notify_all()
        raise DriverError(text)

    @property
    def process(self) -> Process:
        return self.here.process

    @contextmanager
    def within(self, process: Process) -> Iterator[None]:
        """This thread is the process for the block."""
        before = getattr(self.here, "process", None)
        self.here.process = process
        try:
            with Watch(self):
                yield
        finally:
            self.here.process = before

    # Memory

    def allocate(self, tensor: torch.Tensor) -> torch.Tensor:
        """Take the tensor's memory as this process's device memory."""
        storage = tensor.untyped_storage()
        allocation = Allocation(self.process, storage.data_ptr(), storage.nbytes())
        with self.lock:
            self.allocations[allocation.address] = allocation
        weakref.finalize(storage, self._free, allocation)
        return tensor

    def _free(self, allocation: Allocation) -> None:
        allocation.freed = True
        if self.allocations.get(allocation.address) is allocation:
            # torch may give the address to the next tensor.
            del self.allocations[allocation.address]
        mapping = [process.name for process in allocation.mappings if process.alive]
        if allocation.readers_counter > 0:
            self.limbo.append(allocation)
        elif mapping:
            self.wrong.append(f"{allocation.owner.name} frees memory that {', '.join(mapping)} still maps")

    @property
    def kept(self) -> int:
        """Bytes that are freed and stay allocated, because torch's counter says that somebody reads them."""
        return sum(a.size for a in self.limbo if a.readers_counter > 0 and a.address not in self.host_memory)

    def find(self, tensor: torch.Tensor) -> Allocation | None:
        address = tensor.untyped_storage().data_ptr()
        for allocation in self.allocations.values():
            if allocation.address <= address < allocation.address + max(allocation.size, 1):
                return allocation
        return None

    def share(self, storage: torch.UntypedStorage) -> tuple[Any, ...]:
        """torch's ``UntypedStorage._share_cuda_``."""
        with self.lock:
            allocation = self.allocations.get(storage.data_ptr())
            if allocation is None:
                # An empty one, or one of our code's own, such as its slots and counters.
                self.allocate(torch.empty(0, dtype=torch.uint8).set_(storage))
                allocation = self.allocations[storage.data_ptr()]
            if allocation.owner is not self.process:
                self.fail(f"{self.process.name} shares memory of {allocation.owner.name}")
            allocation.readers_counter = 1
            handle = f"handle {allocation.address}".encode()
            self.handles[handle] = allocation
        return self.process.gpu, handle, allocation.size, 0, b"counter", 0, b"event", True

    def open(
        self,
        device: int,
        handle: bytes,
        size: int,
        offset: int,
        counter: bytes,
        counter_offset: int,
        event: bytes,
        event_sync_required: bool,
    ) -> torch.UntypedStorage:
        """torch's ``UntypedStorage._new_shared_cuda``."""
        types = (int, bytes, int, int, bytes, int, bytes, bool)
        given = (device, handle, size, offset, counter, counter_offset, event, event_sync_required)
        if any(type(value) is not kind for value, kind in zip(given, types, strict=True)):
            self.fail(f"torch wants {types}, not {given}")
        process = self.process
        with self.lock:
            process.contexts.add(device)
            if device != process.gpu:
                self.fail(f"{process.name} on GPU {process.gpu} opens memory on GPU {device} and takes a context there")
            allocation = self.handles[handle]
            if allocation.owner is process:
                self.fail(f"{process.name} opens its own memory, which CUDA refuses")
            if allocation.freed or not allocation.owner.alive:
                self.fail(f"{process.name} opens memory that {allocation.owner.name} has freed")
            if allocation.owner.gpu != device and not self.peers(device, allocation.owner.gpu):
                self.fail(f"GPU {device} has no access to the memory of GPU {allocation.owner.gpu}")
            if size != allocation.size or offset:
                self.fail(f"size {size} at {offset} of an allocation of {allocation.size}")
            allocation.mappings.append(process)
            if not size:
                return torch.UntypedStorage(0)
            bytes_of_it = (ctypes.c_uint8 * size).from_address(allocation.address)
            storage = torch.frombuffer(bytes_of_it, dtype=torch.uint8).untyped_storage()
        weakref.finalize(storage, self._release, allocation, process)
        return storage

    def _release(self, allocation: Allocation, process: Process) -> None:
        if process not in allocation.mappings:
            self.wrong.append(f"{process.name} releases a mapping twice")
            return
        allocation.mappings.remove(process)
        if process.alive:
            allocation.readers_counter -= 1

    def end(self, process: Process) -> None:
        """The process is killed: it releases nothing, and torch's counters are as they were."""
        process.alive = False

    # Order

    def access(self, tensor: torch.Tensor, clock: Clock, stream: str, number: int, writes: bool) -> None:
        allocation = self.find(tensor)
        if allocation is None or not tensor.numel():
            return
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = tensor.data_ptr() - allocation.address
        stop = start + (last + 1) * tensor.element_size()
        with self.lock:
            for other in allocation.accesses:
                overlap = other.start < stop and start < other.stop
                conflict = overlap and (writes or other.writes) and other.stream != stream
                if conflict and clock.get(other.stream, 0) < other.number:
                    verb = "writes" if writes else "reads"
                    former = "write" if other.writes else "read"
                    self.fail(
                        f"{stream} {verb} bytes {start} to {stop} of {allocation.owner.name}'s memory, and nothing "
                        f"says that the {former} by {other.stream} has ended"
                    )
            # What this operation replaces needs no check any more, since its own successor follows both.
            allocation.accesses = [
                a
                for a in allocation.accesses
                if not (a.stream == stream and a.writes == writes and a.start >= start and a.stop <= stop)
            ]
            allocation.accesses.append(Access(start, stop, stream, number, writes))

    def launch(self, reads: Sequence[torch.Tensor], writes: Sequence[torch.Tensor]) -> None:
        """An operation on the current stream of this process."""
        process = self.process
        with self.lock:
            join(process.stream, process.host)
            name = f"{process.name}'s stream"
            number = next(self.numbers)
            for tensors, writing in ((reads, False), (writes, True)):
                for tensor in tensors:
                    self.access(tensor, process.stream, name, number, writing)
            process.stream[name] = number

    def synchronise(self) -> None:
        """This process's host waits for its current stream."""
        join(self.process.host, self.process.stream)

    # NCCL

    def call_group(self, operations: Sequence["Operation"]) -> list["Work"]:
        """``batch_isend_irecv``: returns at once. The transfers begin when the rank's earlier groups have ended."""
        process = self.process
        assert operations, "NCCL has no empty groups"
        with self.changed:
            join(process.stream, process.host)
            # A Network calls the same operations in each sync.
            group = [replace(operation, follows=dict(process.stream)) for operation in operations]
            self.groups[operations[0].rank].append(group)
            work = Work(self, process, group)
            for operation in group:
                key = (operation.rank, operation.peer) if operation.sends else (operation.peer, operation.rank)
                self.queues[*key, operation.sends].append((group, operation.rank, operation))
            self._transfer()
            self.changed.notify_all()
        return [work]

    def _in_progress(self, rank: int, group: list[Any]) -> bool:
        for earlier in self.groups[rank]:
            if earlier is group:
                return True
            if any(not operation.ended for operation in earlier):
                return False
        raise AssertionError("a group that nobody has called")

    def _transfer(self) -> None:
        moved = True
        while moved:
            moved = False
            for (sender, receiver, sends), queue in list(self.queues.items()):
                other = self.queues[sender, receiver, False]
                if not sends or not queue or not other:
                    continue
                (sending_group, _, send), (receiving_group, _, receive) = queue[0], other[0]
                if not self._in_progress(sender, sending_group) or not self._in_progress(receiver, receiving_group):
                    continue
                if send.tensor.nbytes != receive.tensor.nbytes:
                    self.fail(
                        f"rank {sender} sends {send.tensor.nbytes} bytes, {receiver} takes {receive.tensor.nbytes}"
                    )
                self._move(send, receive)
                queue.pop(0)
                other.pop(0)
                moved = True

    def _move(self, send: "Operation", receive: "Operation") -> None:
        """The bytes go from one rank's stream of NCCL to the other's, and each follows the other then."""
        number = next(self.numbers)
        for operation, writes in ((send, False), (receive, True)):
            process = operation.process
            join(process.nccl, operation.follows)
            self.access(operation.tensor, process.nccl, f"{process.name}'s NCCL", number, writes)
            process.nccl[f"{process.name}'s NCCL"] = number
        ctypes.memmove(receive.tensor.data_ptr(), send.tensor.data_ptr(), send.tensor.nbytes)
        join(send.process.nccl, receive.process.nccl)
        join(receive.process.nccl, send.process.nccl)
        for operation in (send, receive):
            operation.ended = True
            operation.tensor = None
            operation.after = dict(operation.process.nccl)

    # Counters

    def publish(self, address: int, place: int, count: int) -> None:
        with self.lock:
            self.published[address, place].append((count, dict(self.process.host)))

    def acquire(self, address: int, place: int, count: int) -> None:
        with self.lock:
            for published, clock in self.published[address, place]:
                if published >= count:
                    join(self.process.host, clock)
                    return


@dataclass
class Operation:
    """A send or a receive of a rank."""

    process: Process
    rank: int
    sends: bool
    tensor: Any
    peer: int
    follows: Clock = field(default_factory=dict)
    after: Clock = field(default_factory=dict)
    ended: bool = False


@dataclass
class Work:
    """``wait``: the current stream follows the group. The thread waits too, for the operations to have a clock."""

    driver: Driver
    process: Process
    group: list[Operation]

    def wait(self) -> None:
        driver = self.driver
        with driver.changed:
            driver.changed.wait_for(lambda: driver.wrong or all(o.ended for o in self.group), WAIT_SECONDS)
        if not all(operation.ended for operation in self.group):
            driver.fail(f"{self.process.name} waits for a message for ever")
        for operation in self.group:
            join(self.process.stream, operation.after)


class Watch(TorchDispatchMode):
    """Tells the driver what torch's operations read and write."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads: list[torch.Tensor] = []
        writes: list[torch.Tensor] = []
        schema = func._schema
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if not is_view and func.overloadpacket is not aten.set_:
            for argument, value in itertools.zip_longest(schema.arguments, args):
                written = argument.alias_info is not None and argument.alias_info.is_write
                given = (kwargs or {}).get(argument.name) if value is None else value
                tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
                (writes if written else reads).extend(tensors)
        result = func(*args, **(kwargs or {}))
        if reads or writes:
            self.driver.launch(reads, writes)
        if func is aten._local_scalar_dense.default:
            self.driver.synchronise()
        return result


def install(driver: Driver) -> Any:
    """torch, our counters and our use of NCCL in this process are the driver's. Returns the platform of a CPU that the
    project's code then has: the GPU's, with tensors in the host's memory."""
    import torch.distributed as dist

    from rollout import vllm_platform
    from rollout.weight_sync import network

    torch.UntypedStorage._share_cuda_ = lambda storage: driver.share(storage)  # type: ignore[method-assign]
    torch.UntypedStorage._new_shared_cuda = driver.open  # type: ignore[method-assign, assignment]
    cuda: dict[str, Any] = {
        "device_count": lambda: driver.gpus,
        "current_device": lambda: driver.process.gpu,
        "get_device_properties": lambda n: SimpleNamespace(uuid=f"GPU-{driver.process.gpu if n is None else n}"),
        "can_device_access_peer": lambda a, b: driver.peers(a, b),
        "synchronize": lambda device=None: driver.synchronise(),
        "current_stream": lambda device=None: SimpleNamespace(synchronize=driver.synchronise),
    }
    for name, function in cuda.items():
        setattr(torch.cuda, name, function)

    def operation(sends: bool, tensor: torch.Tensor, group: Any, group_peer: int) -> Operation:
        (rank,) = (n for n, process in driver.ranks.items() if process is driver.process)
        return Operation(driver.process, rank, sends, tensor, group_peer)

    network.dist = SimpleNamespace(  # type: ignore[assignment]
        P2POp=operation, isend=True, irecv=False, batch_isend_irecv=driver.call_group, Work=Any, ProcessGroup=Any
    )
    dist.all_reduce = lambda tensor, group=None: None  # type: ignore[assignment]
    dist.new_group = lambda **options: object()  # type: ignore[assignment]
    watch_signals(driver)
    fake = replace(vllm_platform.CUDA, name="cpu", current_device=lambda: torch.device("cpu"))
    vllm_platform._cuda_device = fake.current_device
    vllm_platform.CPU = fake
    vllm_platform.PLATFORMS["cpu"] = fake
    return fake


def watch_signals(driver: Driver) -> None:
    """Who sees a counter follows who has set it. Counters are in the host's memory on GPUs too."""
    originals = {name: getattr(Signals, name) for name in ("set_ready", "is_ready", "set_consumed", "wait_consumed")}

    def unwatched(name: str, *arguments: Any) -> Any:
        with _disable_current_modes():
            return originals[name](*arguments)

    def set_ready(signals: Signals, rounds: int) -> None:
        driver.publish(signals.values.data_ptr(), 0, rounds)
        unwatched("set_ready", signals, rounds)

    def is_ready(signals: Signals, rounds: int) -> bool:
        ready = unwatched("is_ready", signals, rounds)
        if ready:
            driver.acquire(signals.values.data_ptr(), 0, rounds)
        return ready

    def set_consumed(signals: Signals, reader: int, rounds: int) -> None:
        driver.publish(signals.values.data_ptr(), 1 + reader, rounds)
        unwatched("set_consumed", signals, reader, rounds)

    def wait_consumed(signals: Signals, rounds: int) -> None:
        unwatched("wait_consumed", signals, rounds)
        for reader in range(len(signals.values) // 2):
            driver.acquire(signals.values.data_ptr(), 1 + reader, rounds)

    for function in (set_ready, is_ready, set_consumed, wait_consumed):
        setattr(Signals, function.__name__, function)
