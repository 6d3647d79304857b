"""The process groups of a world."""

from pathlib import Path

from megatron_ext import platform

platform.activate("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed import distributed_c10d  # noqa: E402

from megatron_ext import checkpoint, parallel  # noqa: E402
from tests.settings import parallel_config  # noqa: E402

SECONDS = 4210.0  # more than the half an hour that torch gives a group by itself
OF_MEGATRON = 4260.0  # in whole minutes


def test_every_group_has_the_timeout_of_the_settings(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = set(distributed_c10d._world.pg_map)
        parallel.initialize(parallel_config(), seed=1, timeout_seconds=SECONDS)
        parallel.control_group()
        checkpoint.Saver(tmp_path, keep=2)
        groups = set(distributed_c10d._world.pg_map) - before
        timeouts = {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}
        assert len(groups) > 5 and timeouts == {SECONDS, OF_MEGATRON}
    finally:
        parallel.destroy()
