"""Programs that the vLLM tests start: ``python -m tests.rollout.vllm_processes fresh|owner …``."""

import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from megatron_ext.batch import TokenBatch, extend
from rollout import engine_server, sampler
from rollout.engine import Engine, EngineSettings
from rollout.frames import BATCH, read_frames
from rollout.sampling import Sampling

# In the folder of :func:`fresh`.
REQUESTS = "requests.safetensors"
RESPONSES = "responses.safetensors"
DIGESTS = "digests.json"


def fresh(settings: str, sampling: str, folder: str) -> None:
    """vLLM that loads its weights from disk and answers the requests in ``folder``: its responses and the digests of
    its parameters go there."""
    os.environ[engine_server.ENGINE_PID] = str(os.getpid())
    loaded = replace(EngineSettings.from_json(settings), loads_weights=True)
    loop = engine_server.EngineLoop(loaded, engine_server.build_llm_engine(loaded))
    requests = TokenBatch.from_bytes(Path(folder, REQUESTS).read_bytes())
    responses = generate(loop, requests, sampling_from(sampling))
    Path(folder, RESPONSES).write_bytes(responses.to_bytes())
    Path(folder, DIGESTS).write_text(json.dumps(loop.weights.digest()["workers"]))


def generate(
    loop: engine_server.EngineLoop,
    requests: TokenBatch,
    sampling: Sampling,
    before_step: Callable[[int], None] = lambda step: None,
) -> TokenBatch:
    """The responses in the order of the requests, by an engine in this process."""
    messages: list[bytes] = []
    loop.add_batch(requests, sampling, None, messages.append)
    step = 0
    while loop.llm.has_unfinished_requests():
        before_step(step)
        loop._step()
        step += 1
    responses = []
    for message in messages:
        ((kind, payload),) = read_frames(io.BytesIO(message).read)
        assert kind == BATCH, payload.decode()
        response = TokenBatch.from_bytes(payload)
        place = requests.keys.index(response.keys[0])
        responses.append(extend(requests.select([place]), response))
    return sampler.in_order(requests.keys, responses)


def sampling_from(argument: str) -> Sampling:
    """Inverse of :func:`as_argument`."""
    fields = json.loads(argument)
    for name in ("stop_token_ids", "stops"):
        fields[name] = tuple(fields[name])
    return Sampling(**fields)


def load_from_disk_server() -> None:
    """The engine server, but with the checkpoint's weights in place of dummy ones (and no version, as ever)."""
    build = engine_server.build_llm_engine
    engine_server.build_llm_engine = lambda settings: build(replace(settings, loads_weights=True))
    engine_server.main()


def owner(settings: str, log_path: str, output: str) -> None:
    """Own an engine that runs :func:`load_from_disk_server` until killed; its pid and socket go to ``output``."""
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return popen([word.replace("rollout.engine_server", __spec__.name) for word in command], **options)

    subprocess.Popen = start  # type: ignore[assignment,misc]
    engine = Engine(EngineSettings.from_json(settings), Path(log_path))
    Path(output).write_text(json.dumps({"pid": engine.pid, "socket_name": engine.socket_name}))
    time.sleep(3600)


class ForeignEngine(Engine):
    """Handle of an engine that another process owns."""

    def __init__(self, settings: EngineSettings, log_path: Path, pid: int, socket_name: str) -> None:
        self.settings, self.log_path, self.socket_name, self._pid = settings, log_path, socket_name, pid

    @property
    def pid(self) -> int:
        return self._pid

    @property
    def alive(self) -> bool:
        return Path(f"/proc/{self._pid}").exists()

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def as_argument(settings: EngineSettings | Sampling) -> str:
    return settings.to_json() if isinstance(settings, EngineSettings) else json.dumps(asdict(settings))


# A worker does what it does where rollout.engine_server is the main module.
if __name__ == "__mp_main__":
    runpy.run_module(engine_server.__name__, run_name="__mp_main__")
if __name__ == "__main__":
    if sys.argv[1] in ("fresh", "owner"):
        (fresh if sys.argv[1] == "fresh" else owner)(*sys.argv[2:])
    else:
        load_from_disk_server()
