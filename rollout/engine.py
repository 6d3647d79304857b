"""Generation engines as child processes: start, talk to, stop. This side imports neither torch nor vLLM.

An engine lives exactly as long as the process that started it: the kernel kills it when that process dies in any way
(``PR_SET_PDEATHSIG``, set by the engine itself), and :func:`stop_engines` ends it on every ordinary way out.
"""

import atexit
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.settings import read
from rollout.sample import Request, Sample, Sampling
from rollout.settings import RolloutConfig

LOG_TAIL_BYTES = 4000
STALL_POLLS = 20


class EngineError(RuntimeError):
    """An engine died, refused a request, or answered with an error."""


class EngineDied(EngineError):
    """An engine's process ended in the middle of a batch, or hung and was killed. What it has not finished can be asked
    of another."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine: a vLLM instance with ``rollout.tensor`` workers.

    ``model`` is a folder with ``config.json``; weights are never read from it, they come by weight sync. ``dtype`` is
    that of the weights, ``max_model_len`` the longest prompt and response together, ``platform`` cpu or cuda.
    ``devices`` are the node's GPUs, the engine's own first: it sees the others too, to read trainer weights there.
    ``thinking`` are the token ids that begin and end a model's thinking (for ``Sampling.thinking_budget``).
    """

    rollout: RolloutConfig
    model: str
    dtype: str
    max_model_len: int
    platform: str
    devices: tuple[int, ...] = ()
    thinking: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    enforce_eager: bool = True

    @property
    def tokenizer(self) -> bool:
        """Whether vLLM reads the folder's tokenizer, which it needs for the texts that end an environment's turn."""
        return self.rollout.environment.name is not None

    def to_json(self) -> str:
        """For the engine's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineSettings":
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        return cls(**(fields | {"rollout": read(RolloutConfig, "rollout", fields["rollout"])}))


def environment(settings: EngineSettings) -> dict[str, str]:
    """Environment of the engine process: the caller's, minus its distributed rendezvous, plus what vLLM needs.

    On a CPU: no thread pinning (the trainer shares the cores; pinned, a batch took 12 times as long), passive OpenMP
    waiting (an idle engine burns no core), no torch.compile (its first call costs half a minute), freed memory kept by
    malloc (each weight sync packs every linear layer anew; fresh pages for that took as long as the packing), in huge
    pages where the kernel gives them (copies into them take 0.9 of the time), copies of 32 KiB and more past the caches
    (all weights do not fit there; 1.4 times as fast).
    """
    torchrun = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    torchrun |= {"GROUP_RANK", "GROUP_WORLD_SIZE"}
    env = {
        key: value for key, value in os.environ.items() if key not in torchrun and not key.startswith("TORCHELASTIC")
    }
    env |= {
        # One process, one import of vLLM; with several workers vLLM starts them itself.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        ),
    }
    if settings.devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(settings.devices))))).split(",")
        env["CUDA_VISIBLE_DEVICES"] = ",".join(visible[i] for i in settings.devices)
    if settings.platform == "cpu":
        env |= {
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_COMPILE_DISABLE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(settings.rollout.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={32 << 10}:glibc.malloc.hugetlb=1",
            "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
            "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
        }
    return env


class Engine:
    """A running engine process and its HTTP address. Made by :func:`start_engines`.

    ``starts`` counts its processes: after :meth:`restart` it is empty and needs a plan and a sync, like a new one.
    """

    def __init__(self, settings: EngineSettings, log_path: Path) -> None:
        """Start the process; :meth:`wait_until_ready` waits for it.

        Call from a thread that lives as long as the engine: the kernel ties the engine's life to that thread.
        """
        self.settings = settings
        self.log_path = log_path
        self.starts = 0
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        self.starts += 1
        # The listening socket is made here and inherited, so the port can't be taken by anyone else in between.
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener, open(self.log_path, "ab") as log:
            self.port: int = listener.getsockname()[1]
            arguments = [self.settings.to_json(), str(listener.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rollout.engine_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.settings),
                pass_fds=(listener.fileno(),),
                start_new_session=True,  # Ctrl-C reaches the owner only, which stops its engines in order
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def restart(self) -> None:
        """Put a new process in the place of the old one; :meth:`wait_until_ready` waits for it.

        Call from a thread that lives as long as the engine.
        """
        self.kill()
        self._start()

    def wait_until_ready(self, deadline: float) -> None:
        """Block until the engine answers. Raises EngineError with the log's tail when it dies or ``deadline`` (of
        ``time.monotonic``) passes first."""
        while True:
            try:
                self.call("GET", "/health", timeout=1.0)
                return
            except EngineError:
                if not self.alive:
                    raise EngineError(
                        self._describe(f"died while starting (exit code {self.process.returncode})")
                    ) from None
                if time.monotonic() > deadline:
                    raise EngineError(self._describe("did not become ready in time")) from None
            time.sleep(0.1)

    def health(self) -> dict[str, Any]:
        """``weight_version`` (None before the first good sync), ``stale`` (a sync failed), ``workers``."""
        return self.call("GET", "/health", timeout=30.0)

    def generate(self, requests: Sequence[Request], sampling: Sampling, enough: int | None = None) -> Iterator[Sample]:
        """Samples in completion order, with what had been begun of them; until ``enough`` prompts have all of theirs.

        All requests enter the engine between the same two of its steps: the same requests on the same weights give the
        same bits, as long as no other batch runs at the same time.
        Raises EngineError before the first sync, after a failed one, and for a request that does not fit; EngineDied
        when the engine dies, breaks off or hangs (it is killed then).
        """
        with self._watched():
            yield from self._generate(requests, sampling, enough)

    def _generate(self, requests: Sequence[Request], sampling: Sampling, enough: int | None) -> Iterator[Sample]:
        body = {"requests": [request.to_json() for request in requests], "sampling": asdict(sampling), "enough": enough}
        begun = {request.key: request.begun for request in requests}
        connection = self._connect(timeout=None)
        try:
            self._send(connection, "POST", "/generate", body)
            finished = False
            for line in self._response(connection):
                message = json.loads(line)
                if "error" in message:
                    raise EngineError(self._describe(message["error"], log=False))
                if "sample" in message:
                    sample = Sample.from_json(message["sample"])
                    yield sample.after(begun[sample.key])
                finished = "done" in message
            if not finished:
                raise http.client.IncompleteRead(b"")
        except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
            self.kill()
            raise EngineDied(self._describe(f"broke off in the middle of a batch ({error})")) from error
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> dict[str, Any]:
        """One JSON request and its JSON answer; ``timeout`` in seconds, None: until the engine dies or hangs. Raises
        EngineError."""
        return self.ask(method, path, body, timeout)()

    def ask(
        self, method: str, path: str, body: Any = None, timeout: float | None = None
    ) -> Callable[[], dict[str, Any]]:
        """Send the request of a :meth:`call` now; the function that is returned waits for the answer and raises."""
        with ExitStack() as stack:
            if timeout is None:
                stack.enter_context(self._watched())
            connection = self._connect(timeout)
            stack.callback(connection.close)
            failed: OSError | None = None
            try:
                self._send(connection, method, path, body)
            except OSError as error:
                failed = error
            until_answered = stack.pop_all()

        def answer() -> dict[str, Any]:
            with until_answered:
                try:
                    if failed:
                        raise failed
                    return json.loads(self._response(connection).read())
                except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                    raise EngineError(self._describe(f"{method} {path} failed: {error!r}")) from error

        return answer

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Kill the engine when it makes no progress during the block, which then raises EngineDied.

        Progress is a step of vLLM, a request taken in or a command done (a sync counts as one), as ``/health`` tells,
        which a thread of the engine answers while the main thread works. So a slow engine is never killed unless a
        single step takes longer than ``stall_timeout``. It is found after one to two times that: polls are counted,
        not seconds, because a trainer that was stopped itself must not take its own pause for the engine's.
        """
        limit = self.settings.rollout.stall_timeout
        ended, hung = threading.Event(), threading.Event()

        def watch() -> None:
            progress, idle = None, 0
            while idle < STALL_POLLS:
                if ended.wait(limit / STALL_POLLS):
                    return
                try:
                    now = self.call("GET", "/health", timeout=limit / STALL_POLLS)["progress"]
                except EngineError:  # silent, or dead, which the block finds out itself
                    now = progress
                progress, idle = now, idle + 1 if now == progress else 0
            if not ended.is_set():
                hung.set()
                self.kill()

        threading.Thread(target=watch, name="stall watch", daemon=True).start()
        try:
            yield
        except EngineError as error:
            if not hung.is_set():
                raise
            what = f"made no progress for rollout.stall_timeout={limit:g} seconds and was killed"
            raise EngineDied(self._describe(what)) from error
        finally:
            ended.set()

    def kill(self) -> None:
        """End the process at once; its workers die with it."""
        self.process.kill()
        self.process.wait()

    def stop(self, grace: float = 10.0) -> None:
        """End the process and its workers: ask, and after ``grace`` seconds kill. Does nothing when it is gone."""
        if self.alive:
            try:
                self.call("POST", "/shutdown", timeout=grace)
                self.process.wait(grace)
            except (EngineError, subprocess.TimeoutExpired):
                self.kill()

    def _connect(self, timeout: float | None) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def _send(self, connection: http.client.HTTPConnection, method: str, path: str, body: Any) -> None:
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )

    def _response(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        response = connection.getresponse()
        if response.status != 200:
            answer = response.read().decode(errors="replace")
            reason = (
                json.loads(answer)["error"] if response.headers.get_content_type() == "application/json" else answer
            )
            raise EngineError(self._describe(reason, log=False))
        return response

    def _describe(self, what: str, log: bool = True) -> str:
        text = f"engine {self.log_path.stem} (pid {self.pid}): {what}"
        if not log:
            return text
        tail = self.log_path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        return f"{text}\n--- end of {self.log_path} ---\n{tail}"


def start_engines(settings: EngineSettings, count: int, log_dir: Path, startup_timeout: float = 600.0) -> list[Engine]:
    """Start ``count`` engines at once and wait until all answer; logs go to ``log_dir/engine_<i>.log``.

    Call it from the main thread of the process that owns them. Raises EngineError (the others are stopped) when one
    does not come up within ``startup_timeout`` seconds.
    """
    engines: list[Engine] = []
    deadline = time.monotonic() + startup_timeout
    try:
        for i in range(count):
            engines.append(Engine(settings, log_dir / f"engine_{i}.log"))
        for engine in engines:
            engine.wait_until_ready(deadline)
    except BaseException:
        stop_engines(engines)
        raise
    atexit.register(stop_engines, engines)
    return engines


def stop_engines(engines: Sequence[Engine]) -> None:
    """Stop all; safe to call again."""
    for engine in engines:
        engine.stop()
