"""Programs that the vLLM tests start: ``python -m tests.rollout.vllm_processes fresh|owner …``."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from rollout import engine_server
from rollout.engine import Engine, EngineSettings


def fresh(settings: str, requests: str, sampling: str, output: str) -> None:
    """vLLM that loads its weights from disk: digests of its parameters and the samples it makes, as JSON."""
    os.environ[engine_server.ENGINE_PID] = str(os.getpid())
    loaded = EngineSettings.from_json(settings)
    loop = engine_server.EngineLoop(loaded, engine_server.build_llm_engine(loaded, load_format="auto"))
    loop.weights.version = 0
    lines: list[Any] = []
    loop.add_batch({"requests": json.loads(requests), "sampling": json.loads(sampling)}, lines.append)
    while loop.llm.has_unfinished_requests():
        loop._step()
    Path(output).write_text(json.dumps({**loop.weights.digest(), "samples": [line["sample"] for line in lines]}))


def load_from_disk_server() -> None:
    """The engine server, but with the checkpoint's weights in place of dummy ones (and no version, as ever)."""
    build = engine_server.build_llm_engine
    engine_server.build_llm_engine = partial(build, load_format="auto")
    engine_server.main()


def owner(settings: str, log_path: str, output: str) -> None:
    """Own an engine that runs :func:`load_from_disk_server` until killed; its pid and port go to ``output`` at once."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([word.replace("rollout.engine_server", __spec__.name) for word in command], **options)

    subprocess.Popen = start  # type: ignore[assignment,misc]
    engine = Engine(EngineSettings.from_json(settings), Path(log_path))
    Path(output).write_text(json.dumps({"pid": engine.pid, "port": engine.port}))
    time.sleep(3600)


class ForeignEngine(Engine):
    """Handle of an engine that another process owns."""

    def __init__(self, settings: EngineSettings, log_path: Path, pid: int, port: int) -> None:
        self.settings, self.log_path, self.port, self._pid = settings, log_path, port, pid

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        return Path(f"/proc/{self._pid}").exists()

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def as_argument(value: Any) -> str:
    if isinstance(value, EngineSettings):
        return value.to_json()
    return json.dumps([request.to_json() for request in value] if isinstance(value, list) else asdict(value))


if __name__ == "__mp_main__":
    engine_server.die_with_engine()
if __name__ == "__main__":
    if sys.argv[1] in ("fresh", "owner"):
        (fresh if sys.argv[1] == "fresh" else owner)(*sys.argv[2:])
    else:
        load_from_disk_server()
