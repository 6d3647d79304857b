"""Two worlds in a job: the trainer's ranks, and the processes on nodes that run engines but no part of the model.

torch.distributed's default group is a process's own world. So Megatron-Core and every collective of a training step
include the trainer's ranks alone. :func:`job_group` spans both worlds. torch has no public function that creates such a
group. Like OpenRLHF and slime, this module calls the functions that ``init_process_group`` and ``new_group`` call.
"""

from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from megatron_ext import platform


@dataclass(frozen=True)
class Job:
    """The job as this process sees it."""

    # The store that all processes of the job share.
    store: dist.Store
    # The number of this process in the job, and the number of processes in the job.
    rank: int
    size: int
    # The number in the job of rank 0 of this process's world.
    first: int
    # The timeout of collectives.
    timeout: timedelta
    # Gives each group of the job a number of its own.
    numbers: "count[int]" = field(default_factory=count)


_job: Job | None = None
# The timeout of the collectives of every group of this process's world.
_timeout: timedelta | None = None


def begin(timeout_seconds: float) -> None:
    """Collective over torchrun's processes: create one world of all of them, unless :func:`join` has created two.

    ``timeout_seconds`` is the timeout of every collective.
    """
    global _timeout
    _timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        dist.init_process_group(platform.current().backend, timeout=_timeout)


def new_group(backend: str) -> dist.ProcessGroup:
    """Collective: create a group of all ranks of this world, with the world's timeout.

    torch's own function does not take over the world's timeout. It gives every group half an hour.
    """
    return dist.new_group(backend=backend, timeout=_timeout)


def join(trainers: int, timeout_seconds: float) -> None:
    """Collective over all processes of the job (from torchrun's variables): create this process's world.

    The first ``trainers`` processes are the trainer's ranks. The others form a world of their own. ``timeout_seconds``
    is the timeout of every collective.
    """
    global _job, _timeout
    _timeout = timeout = timedelta(seconds=timeout_seconds)
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    trains = rank < trainers
    first = 0 if trains else trainers
    dist.init_process_group(
        platform.current().backend,
        store=dist.PrefixStore("trainer" if trains else "engines", store),
        rank=rank - first,
        world_size=trainers if trains else size - trainers,
        timeout=timeout,
    )
    _job = Job(store, rank, size, first, timeout)


def job_group(backend: str) -> dist.ProcessGroup:
    """Collective over all processes of the job, after :func:`join`: create a group of all of them, ordered by number.

    Calls must name its ranks by their number in the group (``group_src``, ``group_dst``, ``group_peer``). Its timeout
    is that of :func:`join`.
    """
    assert _job is not None, "worlds.join comes first"
    group, _ = distributed_c10d._new_process_group_helper(
        _job.size,
        _job.rank,
        [],
        backend,
        _job.store,
        group_name=distributed_c10d.GroupName(f"job {next(_job.numbers)}"),
        timeout=_job.timeout,
    )
    # torch looks up a process's rank in a group by the process's rank in its own world. It never looks up a rank of the
    # other world.
    distributed_c10d._world.pg_group_ranks[group] = {(rank - _job.first) % _job.size: rank for rank in range(_job.size)}
    return group


def like(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """Collective over ``group``: create another group of the same processes.

    ``group`` has all ranks of this world, or all processes of the job.
    """
    if dist.get_world_size(group) == dist.get_world_size():
        return new_group(backend)
    return job_group(backend)
