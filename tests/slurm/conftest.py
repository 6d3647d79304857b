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
