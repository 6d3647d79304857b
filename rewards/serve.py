"""Starts and supervises the servers that a recipe's verifiers need: ``python -m rewards.serve recipe=… [overrides…]``.

Each replica of a server is stock `vllm serve`. Servers with ``endpoints`` run elsewhere and are left alone. A table is
printed when all are ready. A server that dies is started again. With ``rewards.placement=colocated`` the servers start
one after the other, each is put to sleep when it is ready, and none is started again. SIGTERM and Ctrl-C stop them, and
they end with this process however it ends. Logs: ``<run_dir>/servers/<server>_<replica>.log``; of colocated servers in
a folder per host.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from megatron_ext.platform import capabilities
from rewards import settings
from rewards.client import SLEEP_PATH, SLEEP_SECONDS
from rewards.settings import RewardsConfig, Server, SupervisorConfig

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
LOG_TAIL_BYTES = 3000
# For multiprocessing's resource tracker, to remove the semaphores of a killed server.
TRACKER_SECONDS = 5.0


class ServerDied(RuntimeError):
    """A server did not become ready, or died too often. The message has the end of its log."""


class Stopped(Exception):
    """SIGTERM or Ctrl-C."""


@dataclass
class JudgeServer:
    """One `vllm serve` process: replica ``index`` of a server.

    ``devices``: the numbers of its GPUs, None on a CPU. ``sleeps``: it shares its GPUs (colocated) and is put to sleep
    as soon as it is ready. On a CPU a sleeping vLLM takes no requests, but keeps its memory.
    """

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
        """<server>_<replica>, as in the table and the log's file name."""
        return f"{self.server.name}_{self.index}"

    @property
    def port(self) -> int:
        """The port of this replica."""
        return self.server.port + self.index

    def command(self) -> list[str]:
        """The arguments of `vllm`."""
        server = self.server
        command = ["serve", server.model, "--host", server.host, "--port", str(self.port)]
        command += ["--served-model-name", server.model, "--runner", server.runner]
        command += ["--tensor-parallel-size", str(server.tensor)]
        if self.devices is None:
            command += self.cpu_arguments
        elif self.sleeps:
            command += ["--enable-sleep-mode"]
        if server.key_variable:
            command += ["--middleware", "rewards.token_guard.require_token"]
        return [*command, *server.arguments]

    def environment(self) -> dict[str, str]:
        """The environment of the process: the caller's, and the server's token where vLLM reads it. Other users of the
        host can read a command line, so the token is not there. Raises ValueError for a missing token."""
        python_path = [str(ROOT)]
        if os.environ.get("PYTHONPATH"):
            python_path.append(os.environ["PYTHONPATH"])
        environment = os.environ | {
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # see rewards.vllm_process
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(python_path),
        }
        key = self.server.key()
        if key is not None:
            environment["VLLM_API_KEY"] = key
        if self.sleeps:
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        if self.devices is not None:
            return environment | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, self.devices))}
        environment |= {
            "CUDA_VISIBLE_DEVICES": "",
            # Compilation takes longer than it saves.
            "TORCH_COMPILE_DISABLE": "1",
            # The trainer shares the cores: threads are not pinned, and wait passively.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.server.tensor == 1:
            # The engine's only worker runs in the engine's process. The API server stays a process of its own.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return environment

    def start(self) -> None:
        """Start the process. Call it from the main thread: the kernel ends the process with the thread that started
        it."""
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

    def is_healthy(self) -> bool:
        """Whether the server responds, awake or asleep."""
        try:
            return self._status("GET", "/health", 1.0) == 200
        except (OSError, http.client.HTTPException):
            return False

    def sleep(self) -> None:
        """Put the server to sleep. Raises ServerDied when it does not fall asleep."""
        try:
            status: object = self._status("POST", SLEEP_PATH, SLEEP_SECONDS)
        except (OSError, http.client.HTTPException) as error:
            status = repr(error)
        if status != 200:
            raise ServerDied(f"{self.name} does not fall asleep: {SLEEP_PATH}: {status}; see {self.log}")

    def _status(self, method: str, path: str, timeout: float) -> int:
        """The HTTP status of a request to the server."""
        host_and_port = self.server.addresses[self.index].removeprefix("http://")
        connection = http.client.HTTPConnection(host_and_port, timeout=timeout)
        key = self.server.key()
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        try:
            connection.request(method, path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    def death_message(self) -> str:
        """The exit code and the end of the log."""
        log_tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        assert self.process is not None
        return f"{self.name} ended with code {self.process.poll()}\n--- end of {self.log} ---\n{log_tail}"


class Supervisor:
    """Starts, watches and stops the servers of a run."""

    def __init__(self, servers: Sequence[JudgeServer], config: SupervisorConfig) -> None:
        self.servers = servers
        self.config = config

    def start(self) -> None:
        """Start all servers and wait until they are ready. Raises ServerDied, also where a port is in use already."""
        for server in self.servers:
            if server.is_healthy():
                address = server.server.addresses[server.index]
                raise ServerDied(
                    f"{server.name}: something answers at {address} already; stop it, or "
                    f"set rewards.servers.{server.server.name}.port to another or its endpoints to this address"
                )
        deadline = time.monotonic() + self.config.startup_timeout
        for server in self.servers:
            server.start()
            if server.sleeps:
                # vLLM measures the free memory of its GPUs when it starts: the servers before it must be asleep.
                self._wait_until_ready([server], deadline)
        self._wait_until_ready(self.servers, deadline)

    def _wait_until_ready(self, servers: Sequence[JudgeServer], deadline: float) -> None:
        while not all(server.ready for server in servers):
            self.poll()
            if time.monotonic() > deadline:
                late = ", ".join(f"{server.name} ({server.log})" for server in servers if not server.ready)
                raise ServerDied(f"not ready within startup_timeout={self.config.startup_timeout:g} s: {late}")
            time.sleep(POLL_SECONDS)

    def poll(self) -> list[str]:
        """Look at every server once, start those again that died, and return a line for each that became ready or died.

        Raises ServerDied when a server died once too often. A server that dies before it was ever ready is not started
        again: it would die again. Nor is a colocated one, whose GPUs may be in use by others.
        """
        events = []
        for server in self.servers:
            if server.process is None:  # not started yet
                continue
            if server.process.poll() is not None:
                max_restarts = 0 if server.sleeps else self.config.restarts
                was_ready = server.ready or server.restarts > 0
                if server.restarts == max_restarts or not was_ready:
                    raise ServerDied(server.death_message())
                events.append(f"{server.name} ended with code {server.process.returncode}; it is started again")
                kill(server.process)
                server.restarts += 1
                server.start()
                record_restart(server)
            elif not server.ready and server.is_healthy():
                if server.sleeps:
                    server.sleep()
                server.ready = True
                events.append(f"{server.name} is ready")
        return events

    def stop(self) -> None:
        """Terminate all servers, and kill those that still run after ``stop_timeout`` seconds."""
        processes = [server.process for server in self.servers if server.process is not None]
        for process in processes:
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + self.config.stop_timeout
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            kill(process)


def record_restart(server: JudgeServer) -> None:
    """Append a line to the run's events.jsonl for the report, in the form of ``recipes.run.records.event``."""
    event = {"time": round(time.time(), 3), "kind": "server restart", "server": server.name}
    with (server.log.parents[1] / "events.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(event).encode() + b"\n")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a server and what is left of its children, which are a session of their own.

    vLLM's children die with the server. multiprocessing's resource tracker then removes the semaphores that they had,
    if it has the time.
    """
    process.kill()  # has no effect on a process that has ended
    process.wait()
    deadline = time.monotonic() + TRACKER_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)


def judge_servers(config: RewardsConfig, folder: Path, platform: str) -> list[JudgeServer]:
    """The servers to start: the replicas of every server that some verifier uses and that has no endpoints.

    GPUs are handed out in order from ``supervisor.first_device`` on. Colocated servers share them: each has the first
    ones. ``folder`` is for their logs; ``platform`` is cpu or cuda.
    """
    colocated = config.placement == settings.COLOCATED
    device = config.supervisor.first_device
    servers = []
    for server in settings.used(config):
        if server.endpoints:
            continue
        if colocated:
            device = config.supervisor.first_device
        for index in range(server.replicas):
            devices = range(device, device + server.tensor) if capabilities(platform).has_gpus else None
            device += server.tensor
            log = folder / f"{server.name}_{index}.log"
            servers.append(JudgeServer(server, index, log, devices, config.supervisor.cpu_arguments, colocated))
    return servers


def ready_table(config: RewardsConfig, servers: Sequence[JudgeServer]) -> Table:
    """A row for every running server, with the verifiers that use it."""
    table = Table("server", "verifiers", "model", "address", "pid", "log", title="servers are ready")
    for server in servers:
        verifiers = ", ".join(
            name for name, verifier in settings.verifiers(config).items() if verifier.server == server.server.name
        )
        assert server.process is not None
        address = server.server.addresses[server.index]
        table.add_row(server.name, verifiers, server.server.model, address, str(server.process.pid), str(server.log))
    return table


def supervise(config: RewardsConfig, servers: Sequence[JudgeServer], console: Console) -> None:
    """Run the servers until this process is told to stop. Raises Stopped or ServerDied; then no server runs any
    more."""
    console.print(f"starting {', '.join(server.name for server in servers)}; logs in {servers[0].log.parent}")
    with running(servers, config.supervisor) as supervisor:
        console.print(ready_table(config, servers))
        while True:
            for event in supervisor.poll():
                console.print(event)
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def running(servers: Sequence[JudgeServer], config: SupervisorConfig) -> Iterator[Supervisor]:
    """Servers that are started and ready when the block begins, and stopped when it ends or a start fails.

    Raises ServerDied.
    """
    supervisor = Supervisor(servers, config)
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()


def stop_on_signals() -> None:
    """Have the first SIGTERM or Ctrl-C raise Stopped in the main thread. Later ones are ignored while it stops."""

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
        servers = judge_servers(config, folder, raw.cluster.platform)
        for server in servers:
            server.environment()  # a missing token is an error before anything starts
        if not servers:
            console.print(f"recipe {raw.recipe.name}: no verifier needs a server from here")
            return
        supervise(config, servers, console)
    except (ValueError, ServerDied) as error:
        sys.exit(f"error: {error}")
    except Stopped:
        console.print("stopped")


if __name__ == "__main__":
    sys.argv[1:] = settings.with_new_keys(sys.argv[1:])
    main()
