"""How ``make test`` shares the tests and the cores out between its processes."""

import os
from typing import Any

from xdist.scheduler import LoadFileScheduling

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported; a run or an engine has threads of its own setting
    os.environ["OMP_NUM_THREADS"] = "1"


class Scheduling(LoadFileScheduling):
    """A process takes whole files, for their tests share runs and engines; those of ``tests/megatron_ext`` share two
    launches of four ranks and stay together."""

    def _split_scope(self, nodeid: str) -> str:
        folder = "tests/megatron_ext"
        return folder if nodeid.startswith(f"{folder}/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: Any, log: Any) -> Scheduling:
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Slurm's tests go first: they mostly wait, while the other process has both cores."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/slurm/"))
