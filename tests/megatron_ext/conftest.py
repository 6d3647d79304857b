"""The tiny models, one launch of four ranks for all that needs several, and Hugging Face's answer to compare with."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_ext import cases, ranks
from tests.megatron_ext.cases import Case
from tests.megatron_ext.reference import Reference, train_reference


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the models that ``cases.make_twins`` describes."""
    folder = tmp_path_factory.mktemp("trainer")
    cases.make_twins(folder)
    return folder


@pytest.fixture(scope="session")
def launched(twins: Path) -> Path:
    """The twins' folder after ``worker.py`` ran on four ranks: with results, exports and checkpoints."""
    ranks.run("tests.megatron_ext.worker", twins)
    return twins


@pytest.fixture(scope="session")
def results(launched: Path) -> Callable[[str], list[dict[str, Any]]]:
    """``results(name)`` is what each rank of a run found, by rank."""

    @cache
    def load(name: str) -> list[dict[str, Any]]:
        files = sorted((launched / "results").glob(f"{name}.*.pt"))
        assert files, f"the worker made nothing under the name {name}"
        return [torch.load(file, weights_only=True) for file in files]

    return load


@pytest.fixture(scope="session")
def reference(twins: Path) -> Callable[[Case], Reference]:
    @cache
    def compute(twin: str, precision: str, temperature: float) -> Reference:
        case = Case("reference", twin=twin, precision=precision, temperature=temperature)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the model is too small for more, and on a busy machine threads wait for each other
        try:
            return train_reference(twins / twin, case)
        finally:
            torch.set_num_threads(threads)

    return lambda case: compute(case.twin, case.precision, case.temperature)
