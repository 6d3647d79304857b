"""The only rank of a run, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_ext import parallel
from recipes.run import folder as run_folder
from tests.recipes import tiny

ENVIRONMENT = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}


@contextmanager
def one_rank() -> Iterator[pytest.MonkeyPatch]:
    """Within the block this process is rank 0 of 1, in the repository's root. What is within destroys the group."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(tiny.ROOT)
            for name, value in ENVIRONMENT.items():
                patched.setenv(name, value)
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            yield patched
    finally:
        torch.set_num_threads(threads)
        if dist.is_initialized():
            parallel.destroy()


def make_folder(run_dir: Path) -> None:
    """As the launch makes it."""
    run_dir.mkdir(exist_ok=True)
    run_folder.mark(run_dir)
