"""One cluster of four nodes for all tests of this folder."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster

NODES = 4
PATIENCE_SECONDS = 10  # of a busy machine; less than what a job script sleeps


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    if reason := cluster.install():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # a socket's path must be short
        virtual_cluster = cluster.Cluster(Path(folder), NODES)
        try:
            virtual_cluster.start()
            yield virtual_cluster
        finally:
            virtual_cluster.stop()


@pytest.fixture
def folder(slurm: cluster.Cluster, tmp_path: Path) -> Iterator[Path]:
    """An empty one from which jobs are submitted. No process of a test outlives its jobs, but for Slurm's SIGKILL."""
    yield tmp_path
    slurm.cancel_all()
    deadline = time.monotonic() + cluster.KILL_SECONDS + PATIENCE_SECONDS
    while slurm.processes_with(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.25)
    assert slurm.processes_with(str(tmp_path)) == {}
