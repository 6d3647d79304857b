"""Real `vllm serve` processes that tests ask, forked with vLLM's imports (``tests.warm``)."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rewards.serve import JudgeServer, running
from rewards.settings import Server, SupervisorConfig
from tests import warm
from tests.rewards.fake_server import free_port

PROGRAM = "import runpy; runpy.run_module('rewards.vllm_process', run_name='__main__')"
LIMITS = SupervisorConfig(startup_timeout=300, stop_timeout=20, restarts=0, first_device=0, cpu_arguments=[])
ARGUMENTS = ("--enforce-eager", "--dtype", "float32", "--kv-cache-memory-bytes", "64M")


class WarmServer(JudgeServer):
    """`vllm serve` as a run starts it, but forked with its imports, and so is its engine."""

    def start(self) -> None:
        environment = self.environment() | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
        with self.log.open("ab") as log, warm.processes():
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(os.getpid()), *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )


@dataclass(frozen=True)
class Model:
    """A folder to serve: by which ``runner``, and with which further ``arguments``."""

    folder: Path
    runner: str
    arguments: Sequence[str] = ()


@contextmanager
def serving(models: Sequence[Model], logs: Path) -> Iterator[list[WarmServer]]:
    """Servers of the models in FP32, ready; a served model has the name of its folder."""
    servers = []
    for place, model in enumerate(models):
        name = f"{model.runner}{place}"
        server = Server(str(model.folder), None, model.runner, [], None, "127.0.0.1", free_port(), 1, 1, [], name)
        servers.append(WarmServer(server, 0, logs / f"{name}.log", None, [*ARGUMENTS, *model.arguments]))
    with running(servers, LIMITS):
        yield servers
