"""Programs of several ranks, forked from one process that has imported what all need.

Ranks that :class:`Ranks` starts wait for jobs by name and do the job that a test asks for, so that a test of one family
waits for that family's jobs alone.
"""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import parallel, platform
from megatron_ext.processes import die_with
from tests import warm
from tests.megatron_ext.cases import Case

ROOT = Path(__file__).resolve().parents[2]
JOB_SECONDS = 600
IDLE = timedelta(hours=3)  # for which ranks wait for the next job
# A job by name: its case, what each rank of the case computes (folder, *others, case, layout), and the others.
Jobs = Mapping[str, tuple[Case, Callable[..., dict[str, Any]], tuple[Case, ...]]]


def start(log: Path, module: str, *arguments: str, template: str | None = None) -> "subprocess.Popen[bytes]":
    """``python -m module arguments…``, forked from the template (see ``tests.warm``). Nothing of it is left when pytest
    is killed: it dies with pytest, and the ranks with it."""
    with log.open("w") as output, warm.processes(template):
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
        code = launcher.wait(JOB_SECONDS)
    finally:
        launcher.kill()
        launcher.wait()
    assert code == 0, f"the ranks failed:\n{log.read_text()[-6000:]}"


class Ranks:
    """Ranks of a program that calls :func:`serve` with ``folder``. A job that fails ends them; the next job starts new
    ones. ``earlier`` gives the job whose checkpoint a job reads, ``program`` is a module with its first arguments, and
    ``template`` what it is forked from (see ``tests.warm``).
    """

    def __init__(
        self, program: Sequence[str], folder: Path, earlier: Mapping[str, str], template: str | None = None
    ) -> None:
        self.program, self.template = program, template
        self.folder, self.earlier = folder, earlier
        self.log = folder / "ranks.log"
        self.launcher: subprocess.Popen[bytes] | None = None
        self.jobs_done: set[str] = set()
        self.results = cache(self._results)
        (folder / "results").mkdir()

    def after(self, name: str) -> Path:
        """The folder, as soon as the ranks have done the job."""
        if name not in self.jobs_done:
            if name in self.earlier:
                self.after(self.earlier[name])
            self._do(name)
            self.jobs_done.add(name)
        return self.folder

    def _results(self, name: str) -> list[dict[str, Any]]:
        """What each rank found in a job, by rank."""
        files = sorted((self.after(name) / "results").glob(f"{name}.*.pt"))
        return [torch.load(file, map_location="cpu", weights_only=True) for file in files]

    def _do(self, name: str) -> None:
        if self.launcher is None or self.launcher.poll() is not None:
            self._start()
        deadline = time.monotonic() + JOB_SECONDS
        done = f"done/{self.asked}"
        self.store.set(f"asked/{self.asked}", name)
        self.asked += 1
        while not self._is_set(done):
            self._check_alive()
            assert time.monotonic() < deadline, f"{name} took more than {JOB_SECONDS} s:\n{self._log_tail()}"
            time.sleep(0.01)

    def _is_set(self, key: str) -> bool:
        try:
            return self.store.check([key])
        except dist.DistError:
            # The ranks keep the store; one has failed, and the others are ending.
            assert self.launcher is not None
            self.launcher.wait(JOB_SECONDS)
            return False

    def _start(self) -> None:
        port = self.folder / "port"
        port.unlink(missing_ok=True)
        self.launcher = start(self.log, *self.program, str(self.folder), template=self.template)
        while not port.exists():
            self._check_alive()
            time.sleep(0.01)
        self.store = dist.TCPStore("127.0.0.1", int(port.read_text()), is_master=False, timeout=IDLE)
        self.asked = 0

    def _check_alive(self) -> None:
        assert self.launcher is not None and self.launcher.poll() is None, f"the ranks failed:\n{self._log_tail()}"

    def _log_tail(self) -> str:
        return self.log.read_text()[-6000:]

    def stop(self) -> None:
        if self.launcher is not None:
            self.launcher.kill()
            self.launcher.wait()


type RanksOf = Callable[[Case], Ranks]


def serve(folder: Path, jobs: Jobs, seed: int) -> None:
    """On each rank: do the jobs that :class:`Ranks` asks for, until killed. Each has a layout of its own, which is
    destroyed afterwards; ranks that it does not use skip it."""
    rank = int(os.environ["RANK"])
    world = int(os.environ["WORLD_SIZE"])
    port = os.environ["MASTER_PORT"]
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(port), is_master=False, timeout=IDLE)
    if rank == 0:
        partial_file = folder / "port.partial"
        partial_file.write_text(port)
        partial_file.rename(folder / "port")
    for number in itertools.count():
        name = store.get(f"asked/{number}").decode()
        case, compute, others = jobs[name]
        if rank < case.ranks:
            dist.init_process_group(
                platform.current().backend,
                store=dist.PrefixStore(f"job/{number}", store),
                rank=rank,
                world_size=case.ranks,
                timeout=timedelta(seconds=JOB_SECONDS),
            )
            layout = parallel.initialize(case.layout, seed, timeout_seconds=JOB_SECONDS)
            torch.save(compute(folder, *others, case, layout), folder / "results" / f"{name}.{rank}.pt")
            dist.barrier()
            parallel.destroy()
        if store.add(f"ranks done/{number}", 1) == world:
            store.set(f"done/{number}", "1")
