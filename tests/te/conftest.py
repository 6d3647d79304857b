"""The ranks of tests/megatron_ext twice: on the CPU platform, and on the platform ``cuda`` with a fake GPU."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.megatron_ext import cases, vl_twins
from tests.megatron_ext.ranks import ROOT, Ranks
from tests.te import machine, packages


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


def ranks_of(program: str, twins: Path, earlier: dict[str, str], on_gpu: bool) -> Iterator[Ranks]:
    """Ranks in a copy of the twins' folder."""
    folder = twins.with_name(f"{twins.name}-{'gpu' if on_gpu else 'cpu'}")
    shutil.copytree(twins, folder)
    words, template = (["tests.te.on_fake_gpu", program], machine.NAME) if on_gpu else ([program], None)
    ranks = Ranks(words, folder, earlier, template)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def on_cpu(twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.worker", twins, cases.EARLIER, on_gpu=False)


@pytest.fixture(scope="session")
def on_gpu(twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.worker", twins, cases.EARLIER, on_gpu=True)


@pytest.fixture(scope="session")
def vision_on_cpu(vision_twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.vl_twins", vision_twins, vl_twins.EARLIER, on_gpu=False)


@pytest.fixture(scope="session")
def vision_on_gpu(vision_twins: Path) -> Iterator[Ranks]:
    yield from ranks_of("tests.megatron_ext.vl_twins", vision_twins, vl_twins.EARLIER, on_gpu=True)


@pytest.fixture(scope="session")
def found_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """``found_by(module, *arguments)``: what a program of ``machine`` wrote to its first argument, as JSON."""

    def run(module: str, *arguments: Path) -> dict[str, Any]:
        output = tmp_path_factory.mktemp("found") / "found.json"
        command = [sys.executable, "-m", module, str(output), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}
        with warm.processes(machine.NAME):
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
        print(done.stdout[-8000:], done.stderr[-2000:])
        return json.loads(output.read_text())

    return run


@pytest.fixture(scope="session")
def examined(twins: Path, vision_twins: Path, found_by: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What ``examine`` found."""
    return found_by("tests.te.examine", twins, vision_twins)
