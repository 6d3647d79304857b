"""Start, call and stop generation engines, which run as child processes. This module imports neither torch nor vLLM.

An engine does not outlive the process that started it. In an orderly run, :func:`stop_engines` ends it. In any other
case the kernel kills it when its parent process ends (``megatron_ext.processes.die_with``).
"""

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_ext.batch import TokenBatch, extend
from megatron_ext.settings import read
from rollout import user_socket, vllm_platform
from rollout.frames import BATCH, DONE, ERROR, JSON, frame, read_frames
from rollout.sampling import Sampling
from rollout.settings import RolloutConfig

# Environment variables of a trainer rank that an engine must not inherit.
TRAINER_VARIABLES = {
    # The workers of an engine have a rendezvous of their own.
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    # The trainer sets a single hardware queue, which would keep the engine's kernels from running concurrently.
    "CUDA_DEVICE_MAX_CONNECTIONS",
}
LOG_TAIL_BYTES = 4000
STALL_POLLS = 20


class EngineError(RuntimeError):
    """An engine died, refused a request, or answered with an error."""


class EngineDied(EngineError):
    """An engine's process ended in the middle of a batch, or hung and was killed.

    Another engine can generate the unfinished responses.
    """


@dataclass(frozen=True)
class EngineSettings:
    """The settings of one engine: a vLLM instance with ``rollout.tensor`` workers."""

    rollout: RolloutConfig
    # A folder with ``config.json``. It needs weights only with ``loads_weights``.
    model: str
    # The dtype of the weights.
    dtype: str
    # The maximum number of tokens of a prompt and its response together.
    max_model_len: int
    # "cpu" or "cuda".
    platform: str
    # The GPUs of the node, the engine's own first. The engine sees the others too, to read trainer weights there.
    devices: tuple[int, ...] = ()
    # The token ids that begin and those that end the model's thinking, for ``Sampling.thinking_budget``.
    thinking: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    # Whether the engine reads its weights from ``model``, as version 0. Otherwise they come by weight sync.
    loads_weights: bool = False

    @property
    def tokenizer(self) -> bool:
        """Whether vLLM loads the tokenizer of the folder. It needs one for the strings that end a turn of the model
        where an environment replies."""
        return self.rollout.environment.name is not None

    def to_json(self) -> str:
        """Return the settings as text for the engine process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineSettings":
        """The inverse of :meth:`to_json`."""
        fields = json.loads(text)
        fields["rollout"] = read(RolloutConfig, "rollout", fields["rollout"])
        fields["devices"] = tuple(fields["devices"])
        if fields["thinking"] is not None:
            begin, end = fields["thinking"]
            fields["thinking"] = (tuple(begin), tuple(end))
        return cls(**fields)


def environment(settings: EngineSettings) -> dict[str, str]:
    """Return the environment variables of the engine process.

    These are the caller's without those in TRAINER_VARIABLES and those of torchrun, and the variables that vLLM needs.
    """
    variables = {
        key: value
        for key, value in os.environ.items()
        if key not in TRAINER_VARIABLES and not key.startswith("TORCHELASTIC")
    }
    project = str(Path(__file__).resolve().parents[1])
    python_path = [project, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **variables,
        # vLLM's engine core runs in the engine process itself, so vLLM is imported once. vLLM starts the
        # tensor-parallel workers.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Spawned workers import the engine's main module, which makes them end with the engine (engine_server). By
        # default vLLM on a GPU forks them from a process that has threads.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if settings.rollout.model_runner_v2 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(python_path),
        **vllm_platform.of(settings.platform).environment(settings.rollout.threads, settings.devices),
    }


class Engine:
    """A running engine process and the name of the socket on which it is called.

    ``starts`` counts the processes that were started. After :meth:`restart` the engine has no weights: it needs a plan
    and a weight sync.
    """

    def __init__(self, settings: EngineSettings, log_path: Path) -> None:
        """Start the process without waiting until it is ready (see :meth:`wait_until_ready`).

        Call this from a thread that lives as long as the engine, because the kernel kills the engine with that thread.
        """
        self.settings = settings
        self.log_path = log_path
        self.starts = 0
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self._start()

    def _start(self) -> None:
        self.starts += 1
        # The engine inherits the listening socket.
        listener, self.socket_name = user_socket.listen()
        with listener, open(self.log_path, "ab") as log:
            arguments = [self.settings.to_json(), str(listener.fileno()), str(os.getpid())]
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rollout.engine_server", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.settings),
                pass_fds=(listener.fileno(),),
                # So that Ctrl-C reaches only the owner, which stops its engines in an orderly way.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def restart(self) -> None:
        """Replace the process by a new one without waiting until it is ready (see :meth:`wait_until_ready`).

        Call this from a thread that lives as long as the engine.
        """
        self.kill()
        self._start()

    def wait_until_ready(self, deadline: float) -> None:
        """Block until the engine answers.

        Raises EngineError with the end of the log when the engine dies first or when ``deadline`` passes. The deadline
        is a time of ``time.monotonic``.
        """
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
        """Return the engine's state.

        Among its entries: ``weight_version`` (None before the first successful sync), ``stale`` (true after a failed
        sync) and ``workers``, the number of workers.
        """
        return self.call("GET", "/health", timeout=30.0)

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        """Yield the responses in completion order, each as a batch of one.

        A response includes the tokens that its request continued from. The iterator ends when all responses of
        ``num_complete`` prompts are finished, by default of all prompts.

        All requests enter the engine between the same two of its steps. So the same requests on the same weights give
        the same bits, as long as no other batch runs at the same time.

        Raises EngineError before the first weight sync, after a failed one, and for a request that does not fit.
        Raises EngineDied when the engine dies, breaks off or hangs; it is then killed.
        """
        with self._watched():
            yield from self._generate(requests, sampling, num_complete)

    def _generate(self, requests: TokenBatch, sampling: Sampling, num_complete: int | None) -> Iterator[TokenBatch]:
        place = {key: i for i, key in enumerate(requests.keys)}
        header = {"sampling": asdict(sampling), "num_complete": num_complete}
        body = frame(JSON, json.dumps(header).encode()) + frame(BATCH, requests.to_bytes())
        connection = self._connect(timeout=None)
        try:
            connection.request("POST", "/generate", body, {"Content-Type": "application/octet-stream"})
            finished = False
            for kind, payload in read_frames(self._response(connection).read):
                if kind == ERROR:
                    raise EngineError(self._describe(payload.decode(), log=False))
                if kind == BATCH:
                    continuation = TokenBatch.from_bytes(payload)
                    request = requests.select([place[continuation.keys[0]]])
                    yield extend(request, continuation)
                finished = kind == DONE
            if not finished:
                raise http.client.IncompleteRead(b"")
        except (OSError, EOFError, http.client.HTTPException) as error:
            self.kill()
            raise EngineDied(self._describe(f"broke off in the middle of a batch ({error})")) from error
        finally:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> dict[str, Any]:
        """Send a JSON request and return its JSON answer. Raises EngineError.

        ``timeout`` is in seconds. With None, the call waits until the engine answers, dies or hangs.
        """
        return self.begin_call(method, path, body, timeout)()

    def begin_call(
        self, method: str, path: str, body: Any = None, timeout: float | None = None
    ) -> Callable[[], dict[str, Any]]:
        """Send the request of a :meth:`call` now, and return a function that waits for the answer.

        That function, not this one, raises EngineError when sending failed.
        """
        with ExitStack() as stack:
            if timeout is None:
                stack.enter_context(self._watched())
            connection = self._connect(timeout)
            stack.callback(connection.close)
            failure: OSError | None = None
            try:
                self._send(connection, method, path, body)
            except OSError as error:
                failure = error
            # The stall watch and the connection stay open until the answer has arrived.
            until_answered = stack.pop_all()

        def wait_for_answer() -> dict[str, Any]:
            with until_answered:
                try:
                    if failure:
                        raise failure
                    return json.loads(self._response(connection).read())
                except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                    raise EngineError(self._describe(f"{method} {path} failed: {error!r}")) from error

        return wait_for_answer

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Kill the engine when it makes no progress during the block, which then raises EngineDied.

        Progress is a step of vLLM, an accepted request or an executed command (a weight sync is one command). A thread
        of the engine reports it in ``/health`` while the main thread works, so a slow engine is killed only if a single
        step takes longer than ``stall_timeout``. A hang is detected after one to two times ``stall_timeout``.

        The watch counts polls instead of seconds: when the trainer process itself was paused, the pause must not count
        as a stall of the engine.
        """
        limit = self.settings.rollout.stall_timeout
        ended = threading.Event()
        hung = threading.Event()

        def watch() -> None:
            last_progress = None
            polls_without_progress = 0
            while polls_without_progress < STALL_POLLS:
                if ended.wait(limit / STALL_POLLS):
                    return
                try:
                    progress = self.call("GET", "/health", timeout=limit / STALL_POLLS)["progress"]
                except EngineError:
                    # The engine does not answer. If it is dead, the block itself detects that.
                    progress = last_progress
                polls_without_progress = polls_without_progress + 1 if progress == last_progress else 0
                last_progress = progress
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
        """End the process and its workers by a shutdown request, and by a kill if that takes over ``grace`` seconds.

        Does nothing when the process has already ended.
        """
        if self.alive:
            try:
                self.call("POST", "/shutdown", timeout=grace)
                self.process.wait(grace)
            except (EngineError, subprocess.TimeoutExpired):
                self.kill()

    def _connect(self, timeout: float | None) -> http.client.HTTPConnection:
        return user_socket.UserConnection(self.socket_name, timeout)

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


def stop_engines(engines: Sequence[Engine]) -> None:
    """Stop all engines. Engines that have ended are skipped."""
    for engine in engines:
        engine.stop()
