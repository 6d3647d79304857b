"""Two worlds in a job: the trainer's ranks, and the processes of nodes that have engines and no part of the model.

torch.distributed's default group is a process's own world. So Megatron-Core and every collective of a training step see
the trainer's ranks alone. :func:`job_group` spans both worlds. torch has no public call that makes such a group; this
uses what ``init_process_group`` and ``new_group`` use, as OpenRLHF and slime do.
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
    """All processes of a job. ``store`` is theirs, ``rank`` of ``size`` is this one's number in it; ``first`` is that
    of this world's rank 0. ``numbers`` gives each group of the job a number of its own."""

    store: dist.Store
    rank: int
    size: int
    first: int
    timeout: timedelta
    numbers: "count[int]" = field(default_factory=count)


_job: Job | None = None
# Of the collectives of every group of this process's world.
_timeout: timedelta | None = None


def begin(timeout_seconds: float) -> None:
    """Collective over torchrun's processes: one world of all of them, if :func:`join` has not made two.
    ``timeout_seconds``: of every collective."""
    global _timeout
    _timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        dist.init_process_group(platform.current().backend, timeout=_timeout)


def new_group(backend: str) -> dist.ProcessGroup:
    """Collective: a group of all ranks of this world, with the world's timeout, which torch's own function does not
    take over: it gives every group half an hour."""
    return dist.new_group(backend=backend, timeout=_timeout)


def join(trainers: int, timeout_seconds: float) -> None:
    """Collective over all processes of the job (torchrun's variables): make this process's world.

    The first ``trainers`` of them are the trainer's ranks, the others a world of their own. ``timeout_seconds``: of
    every collective.
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
    """Collective over all processes of the job, after :func:`join`: a group of them, in the order of their numbers.

    Its ranks are named as the group's own (``group_src``, ``group_dst``, ``group_peer``). Its timeout is that of
    :func:`join`.
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
    # torch asks for a process's rank in a group by its rank in its world, and for no other world's rank.
    distributed_c10d._world.pg_group_ranks[group] = {(rank - _job.first) % _job.size: rank for rank in range(_job.size)}
    return group


def like(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """Collective over a group of all ranks of this world, or of the job: another of the same processes."""
    if dist.get_world_size(group) == dist.get_world_size():
        return new_group(backend)
    return job_group(backend)
