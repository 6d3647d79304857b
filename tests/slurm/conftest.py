"""One cluster of four nodes for all tests of this folder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import cluster

NODES = 4


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    if reason := cluster.install():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="slurm") as folder:  # a socket's path must be short
        found = cluster.Cluster(Path(folder), NODES)
        try:
            found.start()
            yield found
        finally:
            found.stop()


@pytest.fixture
def folder(slurm: cluster.Cluster, tmp_path: Path) -> Iterator[Path]:
    """An empty one from which jobs are submitted. No process of a test lives when it is over."""
    yield tmp_path
    slurm.cancel_all()
    assert slurm.processes_with(str(tmp_path)) == {}
