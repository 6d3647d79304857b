"""Start and supervise the servers that a recipe's verifiers need: ``python -m rewards.serve recipe=… [overrides…]``.

Each replica of a server is stock `vllm serve`. Servers with ``endpoints`` run elsewhere and are left alone. When all
servers are ready, a table of them is printed. A server that dies is restarted.

With ``rewards.placement=colocated`` the servers start one after the other. Each is put to sleep as soon as it is ready,
and none is restarted.

SIGTERM and Ctrl-C stop the servers. They also end with this process, however it ends. The logs are
``<run_dir>/servers/<server>_<replica>.log``. Those of colocated servers are in a folder per host.
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
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from megatron_ext.platform import capabilities
from rewards import settings
from rewards.client import SLEEP_PATH, SLEEP_SECONDS
from rewards.settings import RewardsConfig, Server, SupervisorConfig

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.2
LOG_TAIL_BYTES = 3000
# How long multiprocessing's resource tracker may take to remove the semaphores of a killed server.
TRACKER_SECONDS = 5.0


class ServerDied(RuntimeError):
    """A server did not become ready, died too often, or did not fall asleep.

    The message has the end of the log or names its file.
    """


class Stopped(Exception):
    """SIGTERM or Ctrl-C."""


@dataclass
class JudgeServer:
    """One `vllm serve` process: replica ``index`` of a server."""

    server: Server
    index: int
    log: Path
    # The numbers of its GPUs. None on a CPU.
    devices: Sequence[int] | None
    cpu_arguments: Sequence[str]
    # Whether the server shares its GPUs (colocated) and is put to sleep as soon as it is ready. On a CPU a sleeping
    # vLLM takes no requests, but keeps its memory.
    sleeps: bool = False
    process: subprocess.Popen[bytes] | None = None
    ready: bool = False
    restarts: int = 0

    @property
    def name(self) -> str:
        """The replica's name in the table and in the log's file name: <server>_<replica>."""
        return f"{self.server.name}_{self.index}"

    @property
    def port(self) -> int:
        """The port of this replica: one port per replica, from the server's port on."""
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
        """The environment of the process: the caller's, with the variables that vLLM needs.

        The server's token is passed in the environment because other users of the host can read a command line. Raises
        ValueError for a missing token.
        """
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
            # On a CPU, compilation takes more time than it saves.
            "TORCH_COMPILE_DISABLE": "1",
            # The trainer uses the same cores, so threads are not pinned and do not spin while they wait.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
        }
        if self.server.tensor == 1:
            # The engine's only worker then runs in the engine's process. The API server stays a process of its own.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return environment

    def start(self) -> None:
        """Start the process.

        Call this from the main thread, because the kernel ends the process together with the thread that started it.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.ready = False
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rewards.vllm_process", str(os.getpid()), *self.command()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                # Ctrl-C then reaches this program only, which stops its servers in order.
                start_new_session=True,
            )

    def is_healthy(self) -> bool:
        """Whether the server responds, awake or asleep."""
        try:
            return self._status("GET", "/health", 1.0) == 200
        except (OSError, http.client.HTTPException):
            return False

    def sleep(self) -> None:
        """Put the server to sleep. Raises ServerDied if it does not fall asleep."""
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
        """The message for a server that died: its exit code and the end of its log."""
        log_tail = self.log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        assert self.process is not None
        return f"{self.name} ended with code {self.process.poll()}\n--- end of {self.log} ---\n{log_tail}"


class Supervisor:
    """Starts, watches and stops the servers of a run."""

    def __init__(self, servers: Sequence[JudgeServer], config: SupervisorConfig) -> None:
        self.servers = servers
        self.config = config

    def start(self) -> None:
        """Start all servers and wait until they are ready.

        Raises ServerDied if a server dies or is late, or if something already answers at a server's address.
        """
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
                # vLLM measures the free memory of its GPUs when it starts, so all earlier servers must be asleep.
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
        """Check every server once and restart those that died. Return a line for each that became ready or died.

        Raises ServerDied for a server that has used up its restarts. It also does so for a server that died before it
        was ever ready, which would die again, and for a colocated server, whose GPUs others may be using.
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
    """Append a restart to the run's events.jsonl, for the report, in the format of ``recipes.run.records.event``."""
    event = {"time": round(time.time(), 3), "kind": "server restart", "server": server.name}
    with (server.log.parents[1] / "events.jsonl").open("ab", buffering=0) as file:
        file.write(json.dumps(event).encode() + b"\n")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a server, and then the rest of its process group.

    vLLM's child processes die with the server. multiprocessing's resource tracker then removes their semaphores. It has
    ``TRACKER_SECONDS`` for this before it is killed as well.
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
    """The processes to start: all replicas of every server that a verifier uses and that has no endpoints.

    GPUs are assigned in order, from ``supervisor.first_device`` on. Colocated servers share GPUs, so for each of them
    the assignment begins at ``first_device`` again. ``folder`` is the folder for the logs. ``platform`` is cpu or cuda.
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
    """A table of the running servers, with the verifiers that use each."""
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
    """Run the servers until SIGTERM or Ctrl-C. Raises Stopped or ServerDied, after all servers are stopped."""
    console.print(f"starting {', '.join(server.name for server in servers)}; logs in {servers[0].log.parent}")
    with running(servers, config.supervisor) as supervisor:
        console.print(ready_table(config, servers))
        while True:
            for event in supervisor.poll():
                console.print(event)
            time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def running(servers: Sequence[JudgeServer], config: SupervisorConfig) -> Iterator[Supervisor]:
    """Start the servers, run the block when they are ready, and stop them when it ends or a start fails.

    Raises ServerDied.
    """
    supervisor = Supervisor(servers, config)
    try:
        supervisor.start()
        yield supervisor
    finally:
        supervisor.stop()


def stop_on_signals() -> None:
    """Make the first SIGTERM or Ctrl-C raise Stopped in the main thread. Later ones are ignored."""

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
        # A server's model may be a folder of the run. "run_dir" stands outside of "rewards", which is read alone.
        OmegaConf.resolve(raw.rewards)
        config = settings.read(raw.rewards)
        folder = Path(raw.run_dir) / "servers"
        if config.placement == settings.COLOCATED:
            folder /= socket.gethostname()
        servers = judge_servers(config, folder, raw.cluster.platform)
        for server in servers:
            server.environment()  # raises for a missing token before anything starts
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
