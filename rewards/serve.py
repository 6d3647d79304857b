"""Starts and supervises the servers that a recipe's verifiers need: ``python -m rewards.serve recipe=… [overrides…]``.

Each replica is stock `vllm serve`. Servers whose ``endpoints`` are given run elsewhere and are left alone. When all
answer a table says so; one that dies is started again. With ``rewards.placement=colocated`` they start one after the
other, each is put to sleep when it is ready, and none is started again. SIGTERM and Ctrl-C stop them, and they end with
this process whatever ends it. Logs: ``<run_dir>/servers/<server>_<replica>.log``, colocated in their host's folder.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from megatron_ext.platform import capabilities
from rewards import settings
from rewards.client import SLEEP, SLEEP_SECONDS
from rewards.settings import RewardsConfig, Server, SupervisorConfig

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
LOG_TAIL_BYTES = 3000
TRACKER_SECONDS = 5.0


class ServerDied(RuntimeError):
    """A server that did not become ready, or died once too often; with the end of its log."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C."""


@dataclass
class Replica:
    """One `vllm serve` of a server and its process. ``devices`` are GPUs, None on a CPU. ``sleeps``: it shares them and
    is put to sleep as soon as it is ready; on a CPU vLLM then takes no requests, and keeps its memory."""

    server: Server
    index: int
    log: Path
    devices: Sequence[int] | None
    cpu_arguments: Sequence[str]
    sleeps: bool = False
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    restarts: int = 0

    @property
    def name(self) -> str:
        return f"{self.server.name}_{self.index}"

    @property
    def port(self) -> int:
        return self.server.port + self.index

    def command(self) -> list[str]:
        """Behind `vllm`."""
        guard = ["--middleware", "rewards.token_guard.require_token"] if self.server.key_variable else []
        return [
            "serve",
            self.server.model,
            *("--host", self.server.host, "--port", str(self.port)),
            *("--served-model-name", self.server.model, "--runner", self.server.runner),
            *("--tensor-parallel-size", str(self.server.tensor)),
            *(self.cpu_arguments if self.devices is None else ()),
            *(["--enable-sleep-mode"] if self.sleeps and self.devices is not None else []),
            *guard,
            *self.server.arguments,
        ]

    def environment(self) -> dict[str, str]:
        """The caller's, with the token where vLLM looks for it (not in the command line, which others can read)."""
        environment = os.environ | {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # see rewards.vllm_process
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        if (key := self.server.key()) is not None:
            environment["VLLM_API_KEY"] = key
        if self.sleeps:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        if self.devices is not None:
            return environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.devices))}
        # No pinning and passive waiting: the trainer shares the cores. No compilation: it takes longer than it saves.
        return environment | {
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_COMPILE_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
            # The only worker in the engine's process; the server has its own all the same.
            **({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if self.server.tensor == 1 else {}),
        }

    def start(self) -> None:
        """Call it from the main thread: the kernel ties the process's life to the thread that starts it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.ready = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rewards.vllm_process", str(os.getpid()), *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C reaches this program only, which stops its servers in order
            )

    def answers(self) -> bool:
        """Also asleep."""
        try:
            return self._status("GET", "/health", 1.0) == 200
        except (OSError, http.client.HTTPException):
            return False

    def sleep(self) -> None:
        """Raises ServerDied when it does not fall asleep."""
        try:
            status: object = self._status("POST", SLEEP, SLEEP_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            status = repr(error)
        if status != 200:
            raise ServerDied(f"{self.name} does not fall asleep: {SLEEP}: {status}; see {self.log}")

    def _status(self, method: str, path: str, timeout: float) -> int:
        connection = http.client.HTTPConnection(
            self.server.addresses[self.index].removeprefix("http://"), timeout=timeout
        )
        key = self.server.key()
        try:
            connection.request(method, path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
            return connection.getresponse().status
        finally:
            connection.close()

    def died(self) -> str:
        tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        assert self.process is not None
        return f"{self.name} ended with code {self.process.poll()}\n--- end of {self.log} ---\n{tail}"


class Supervisor:
    """The replicas of a run."""

    def __init__(self, replicas: Sequence[Replica], config: SupervisorConfig) -> None:
        self.replicas, self.config = replicas, config

    def start(self) -> None:
        """Start all and wait until all answer. Raises ServerDied."""
        for replica in self.replicas:
            if replica.answers():
                address = replica.server.addresses[replica.index]
                raise ServerDied(
                    f"{replica.name}: something answers at {address} already; stop it, or "
                    f"set rewards.servers.{replica.server.name}.port to another or its endpoints to this address"
                )
        deadline = time.monotonic() + self.config.startup_timeout
        for replica in self.replicas:
            replica.start()
            if replica.sleeps:  # a vLLM measures what its GPUs have left: the others are to be asleep
                self._wait_for([replica], deadline)
        self._wait_for(self.replicas, deadline)

    def _wait_for(self, replicas: Sequence[Replica], deadline: float) -> None:
        while not all(replica.ready for replica in replicas):
            self.look()
            if time.monotonic() > deadline:
                late = ", ".join(f"{r.name} ({r.log})" for r in replicas if not r.ready)
                raise ServerDied(f"not ready within rewards.supervisor.startup_timeout: {late}")
            time.sleep(POLL_SECONDS)

    def look(self) -> list[str]:
        """What has happened since: who became ready, who died and is started again. Raises ServerDied.

        One that dies before it was ever ready will not do better the next time, nor will one whose GPUs are at work for
        others.
        """
        news = []
        for replica in self.replicas:
            if replica.process is None:  # its turn to start is to come
                continue
            if replica.process.poll() is not None:
                restarts = 0 if replica.sleeps else self.config.restarts
                if replica.restarts == restarts or not (replica.ready or replica.restarts):
                    raise ServerDied(replica.died())
                news.append(f"{replica.name} ended with code {replica.process.returncode}; it is started again")
                end(replica.process)
                replica.restarts += 1
                replica.start()
                note_restart(replica)
            elif not replica.ready and replica.answers():
                if replica.sleeps:
                    replica.sleep()
                replica.ready = True
                news.append(f"{replica.name} is ready")
        return news

    def stop(self) -> None:
        """End all in order, and what is left by force."""
        running = [r.process for r in self.replicas if r.process is not None]
        for process in running:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + self.config.stop_timeout
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            end(process)


def note_restart(replica: Replica) -> None:
    """A line in the run's events.jsonl, as ``recipes.run.records.event`` writes them, for the report."""
    event = {"time": round(time.time(), 3), "kind": "server restart", "server": replica.name}
    with (replica.log.parents[1] / "events.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(event).encode() + b"\n")


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a server and its children, which are a session of their own.

    The children die with it. multiprocessing's tracker then removes the semaphores that they had, if it is let live.
    """
    process.kill()  # nothing to a process that has ended
    process.wait()
    deadline = time.monotonic() + TRACKER_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def replicas(config: RewardsConfig, folder: Path, platform: str) -> list[Replica]:
    """Those to start: of each server that some verifier uses and that has no endpoints. GPUs are dealt out in order;
    colocated servers share them, each has the first ones."""
    device, colocated = config.supervisor.first_device, config.placement == settings.COLOCATED
    found = []
    for server in settings.used(config):
        if server.endpoints:
            continue
        if colocated:
            device = config.supervisor.first_device
        for i in range(server.replicas):
            devices = range(device, device + server.tensor) if capabilities(platform).has_gpus else None
            device += server.tensor
            log = folder / f"{server.name}_{i}.log"
            found.append(Replica(server, i, log, devices, config.supervisor.cpu_arguments, colocated))
    return found


def ready_table(config: RewardsConfig, started: Sequence[Replica]) -> Table:
    """Every replica with the verifiers that it serves."""
    table = Table("server", "verifiers", "model", "address", "pid", "log", title="servers are ready")
    for replica in started:
        server = replica.server
        verifiers = ", ".join(name for name, v in settings.verifiers(config).items() if v.server == server.name)
        assert replica.process is not None
        address = server.addresses[replica.index]
        table.add_row(replica.name, verifiers, server.model, address, str(replica.process.pid), str(replica.log))
    return table


def supervise(config: RewardsConfig, found: Sequence[Replica], console: Console) -> None:
    """Run the servers until stopped. Raises Stopped or ServerDied; none is left behind."""
    supervisor = Supervisor(found, config.supervisor)
    try:
        console.print(f"starting {', '.join(replica.name for replica in found)}; logs in {found[0].log.parent}")
        supervisor.start()
        console.print(ready_table(config, found))
        while True:
            for text in supervisor.look():
                console.print(text)
            time.sleep(POLL_SECONDS)
    finally:
        supervisor.stop()


def stop_on_signals() -> None:
    """The first SIGTERM or Ctrl-C raises Stopped in the main thread; further ones wait for its end."""

    def handler(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise Stopped

    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    console = Console(width=None if sys.stdout.isatty() else 160)
    stop_on_signals()
    try:
        config = settings.read(raw.rewards)
        folder = Path(raw.run_dir) / "servers"
        if config.placement == settings.COLOCATED:
            folder /= socket.gethostname()
        found = replicas(config, folder, raw.cluster.platform)
        for replica in found:
            replica.environment()  # a missing token is told before anything starts
        if not found:
            console.print(f"recipe {raw.recipe.name}: no verifier needs a server from here")
            return
        supervise(config, found, console)
    except (ValueError, ServerDied) as error:
        sys.exit(f"error: {error}")
    except Stopped:
        console.print("stopped")


if __name__ == "__main__":
    main()
