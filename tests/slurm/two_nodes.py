"""A plug-in of pytest: the checks of two nodes take the folder ``TWO_NODES_ROOT`` for the repository."""

import os
from pathlib import Path


def pytest_collection_finish() -> None:
    from tests.gpu import test_two_nodes

    test_two_nodes.ROOT = Path(os.environ["TWO_NODES_ROOT"])
