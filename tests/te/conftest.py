"""The ranks of tests/megatron_ext twice: on the CPU platform, and on the platform ``cuda`` with a fake GPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.megatron_ext import cases, vl_twins
from tests.megatron_ext.ranks import ROOT, Ranks
from tests.te import packages

RUNNER = "tests.te.on_fake_gpu"


@pytest.fixture(scope="session", autouse=True)
def fetched() -> None:
    """The packages, before anything needs them; a failure names what could not be fetched."""
    packages.site()


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twins")
    cases.make_twins(folder)
    return folder


@pytest.fixture(scope="session")
def vision_twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    vl_twins.make_twins(folder)
    return folder


def ranks_of(program: str, twins: Path, earlier: dict[str, str], runner: str | None) -> Iterator[Ranks]:
    """Ranks in a copy of the twins' folder."""
    folder = twins.with_name(f"{twins.name}-{'cpu' if runner is None else 'gpu'}")
    shutil.copytree(twins, folder)
    ranks = Ranks(program, folder, earlier, runner)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def on_cpu(twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.worker", twins, cases.EARLIER, None)


@pytest.fixture(scope="session")
def on_gpu(twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.worker", twins, cases.EARLIER, RUNNER)


@pytest.fixture(scope="session")
def vision_on_cpu(vision_twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.vl_twins", vision_twins, vl_twins.EARLIER, None)


@pytest.fixture(scope="session")
def vision_on_gpu(vision_twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.vl_twins", vision_twins, vl_twins.EARLIER, RUNNER)


@pytest.fixture(scope="session")
def examined(twins: Path, vision_twins: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``examine`` found, from one process: importing Transformer Engine takes seconds."""
    output = tmp_path_factory.mktemp("examined") / "found.json"
    command = [sys.executable, "-m", "tests.te.examine", str(output), str(twins), str(vision_twins)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(output.read_text())
