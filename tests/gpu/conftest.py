"""What the GPU checks share: one message where GPUs lack, their record, a tiny model, this process as the only rank."""

import socket
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.parallel import Parallel
from rollout.engine import EngineSettings
from tests.gpu import record
from tests.rollout.twins import Twin
from tests.settings import engine_settings, optimizer_config, parallel_config, precision_config, schedule_config

# FP8 with a scale for each block of 128 x 128 needs sizes in multiples of 128, and the kernels of all sizes take these.
TINY = Twin(heads=8, kv_heads=4, vocab=256, tied=False, bias=False, dtype=torch.bfloat16, intermediate=256)
OPTIMIZER = optimizer_config(weight_decay=0.1)
SCHEDULE = schedule_config(0.1)  # far above what BF16 rounds away


def tiny_engine(model: Path, **changes: Any) -> EngineSettings:
    """Settings of an engine for the tiny model in a folder; ``changes`` are of ``rollout``."""
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "kv_cache_gib": 0.5}
    return engine_settings(model=str(model), dtype="bfloat16", max_model_len=96, platform="cuda", **(sizes | changes))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", type=Path, help="JSON file into which each check's outcome and figures go")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record a check that has run; its figures are what it gave to pytest's ``record_property``."""
    report = yield
    file = item.config.getoption("--gpu-record")
    if file is not None and report.when == "call":
        path, _, test = report.nodeid.partition("::")
        check = f"{Path(path).name}::{test}"
        figures: dict[str, Any] = dict(report.user_properties)
        # Of the run, where another machine than this one has made it.
        environment = figures.pop("environment", None)
        record.add(file, check, report.outcome, report.duration, figures, environment)
    return report


@pytest.fixture(scope="session")
def gpu() -> None:
    if not torch.cuda.is_available():
        pytest.fail("no CUDA device is visible: these checks need one NVIDIA GPU and `make gpu-check EXTRA=gpu`")


@pytest.fixture(scope="module", autouse=True)
def enough_gpus(request: pytest.FixtureRequest) -> None:
    """A module of checks says in ``GPUS`` how many it needs of this machine, if not one."""
    needed = getattr(request.module, "GPUS", 1)
    if needed == 1:
        request.getfixturevalue("gpu")
    elif torch.cuda.device_count() < needed:
        pytest.fail(
            f"{torch.cuda.device_count()} CUDA devices are visible: these checks need {needed} of one node and "
            "`make gpu-check-node EXTRA=gpu`"
        )


@pytest.fixture(scope="session")
def folder(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a Hugging Face folder, BF16, seed 0."""
    return TINY.save(tmp_path_factory.mktemp("tiny"), seed=0)


@pytest.fixture(scope="session")
def layout(gpu: None) -> Iterator[Parallel]:
    """This process as a world of one rank, on NCCL."""
    yield from only_rank("cuda")


def only_rank(device: str) -> Iterator[Parallel]:
    """This process as a world of one rank on the platform ``device``. What a test starts later is not told that it is a
    rank."""
    from megatron_ext import parallel, platform

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in rank.items():
            environment.setenv(name, value)
        platform.activate(device)
        here = parallel.initialize(parallel_config(), seed=1, timeout_seconds=120)
    yield here
    parallel.destroy()


@pytest.fixture
def policy(layout, folder: Path):
    """A fresh trainer model on Transformer Engine with the tiny model's weights."""
    from megatron_ext import hf_checkpoint, model

    built = model.build(hf_checkpoint.config(folder), layout, precision_config())
    hf_checkpoint.load(built.shards, folder)
    return built
