"""Programs of several ranks, forked from one process that has imported what all need."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from megatron_ext.processes import die_with

ROOT = Path(__file__).resolve().parents[2]
LAUNCH_SECONDS = 1200


def start(log: Path, module: str, *arguments: str) -> "subprocess.Popen[bytes]":
    """``python -m module arguments…``. Nothing of it is left when pytest is killed: it dies with pytest, and the ranks
    with it."""
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=partial(die_with, os.getpid()),
        )


def run(module: str, folder: Path) -> None:
    """``python -m module folder``, until it ends; fails with the end of its output."""
    log = folder / "ranks.log"
    launcher = start(log, module, str(folder))
    try:
        code = launcher.wait(LAUNCH_SECONDS)
    finally:
        launcher.kill()
        launcher.wait()
    assert code == 0, f"the ranks failed:\n{log.read_text()[-6000:]}"
