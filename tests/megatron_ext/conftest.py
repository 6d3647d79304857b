"""The tiny models, four ranks for all that needs several, and Hugging Face's answer to compare with."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_ext import cases, vl_twins
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import Ranks, RanksOf
from tests.megatron_ext.reference import Reference, train_reference


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the models that ``cases.make_twins`` describes."""
    folder = tmp_path_factory.mktemp("trainer")
    cases.make_twins(folder)
    return folder


@pytest.fixture(scope="session")
def launched(twins: Path) -> Iterator[Ranks]:
    """Ranks that do the jobs of ``worker.py`` in the twins' folder: with results, exports and checkpoints."""
    text = Ranks(["tests.megatron_ext.worker"], twins, cases.EARLIER)
    yield text
    text.stop()


@pytest.fixture(scope="session")
def vision_launched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Ranks that do the jobs of ``vl_twins.py``, in the folder of its twins."""
    folder = tmp_path_factory.mktemp("vision_language")
    vl_twins.make_twins(folder)
    vision = Ranks(["tests.megatron_ext.vl_twins"], folder, vl_twins.EARLIER)
    yield vision
    vision.stop()


@pytest.fixture(scope="session")
def ranks_of(request: pytest.FixtureRequest) -> RanksOf:
    """Text and vision-language cases have ranks and a folder of their own."""

    def of(case: Case) -> Ranks:
        return request.getfixturevalue("vision_launched" if isinstance(case, vl_twins.Run) else "launched")

    return of


@pytest.fixture(scope="session")
def results(launched: Ranks) -> Callable[[str], list[dict[str, Any]]]:
    """``results(name)`` is what each rank found in a job, by rank."""
    return launched.results


@pytest.fixture(scope="session")
def reference(twins: Path) -> Callable[[Case], Reference]:
    @cache
    def compute(twin: str, precision: str, temperature: float, shared_prompts: bool) -> Reference:
        case = Case("reference", twin=twin, precision=precision, temperature=temperature, shared_prompts=shared_prompts)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the model is too small for more, and on a busy machine threads wait for each other
        try:
            return train_reference(twins / twin, case)
        finally:
            torch.set_num_threads(threads)

    return lambda case: compute(case.twin, case.precision, case.temperature, case.shared_prompts)
