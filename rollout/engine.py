"""Generation engines as child processes: start, call, stop. This side imports neither torch nor vLLM.

An engine does not outlive the process that started it: the kernel kills it when that process ends, however it ends
(``megatron_ext.processes.die_with``), and :func:`stop_engines` ends it in an orderly run.
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

# Variables of a trainer's rank that an engine must not have.
TRAINER_VARIABLES = {
    # An engine's workers have a rendezvous of their own.
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    # The trainer's single hardware queue would keep an engine's kernels from running at the same time.
    "CUDA_DEVICE_MAX_CONNECTIONS",
}
LOG_TAIL_BYTES = 4000
STALL_POLLS = 20


class EngineError(RuntimeError):
    """An engine died, refused a request, or answered with an error."""


class EngineDied(EngineError):
    """An engine's process ended in the middle of a batch, or hung and was killed. Another engine can generate what is
    unfinished."""


@dataclass(frozen=True)
class EngineSettings:
    """One engine: a vLLM instance with ``rollout.tensor`` workers.

    ``model`` is a folder with ``config.json``. With ``loads_weights`` the engine reads its weights there, as version 0;
    otherwise they come by weight sync, and the folder needs none. ``dtype`` is that of the weights, ``max_model_len``
    the longest prompt and response together, ``platform`` cpu or cuda. ``devices`` are the node's GPUs, the engine's
    own first: it sees the others too, to read trainer weights there. ``thinking`` are the token ids that begin and end
    a model's thinking (for ``Sampling.thinking_budget``).
    """

    rollout: RolloutConfig
    model: str
    dtype: str
    max_model_len: int
    platform: str
    devices: tuple[int, ...] = ()
    thinking: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    loads_weights: bool = False

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
        fields["rollout"] = read(RolloutConfig, "rollout", fields["rollout"])
        fields["devices"] = tuple(fields["devices"])
        if fields["thinking"] is not None:
            begin, end = fields["thinking"]
            fields["thinking"] = (tuple(begin), tuple(end))
        return cls(**fields)


def environment(settings: EngineSettings) -> dict[str, str]:
    """Environment of the engine process: the caller's without what is the trainer's alone, and what vLLM needs."""
    variables = {
        key: value
        for key, value in os.environ.items()
        if key not in TRAINER_VARIABLES and not key.startswith("TORCHELASTIC")
    }
    project = str(Path(__file__).resolve().parents[1])
    python_path = [project, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **variables,
        # vLLM runs in the engine's own process, so it is imported once. It starts tensor-parallel workers itself.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Spawned workers import the engine's main module, which ties their lives to the engine's (engine_server). By
        # default vLLM forks them on a GPU, out of a process with threads.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_USE_V2_MODEL_RUNNER": "1" if settings.rollout.model_runner_v2 else "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(python_path),
        **vllm_platform.of(settings.platform).environment(settings.rollout.threads, settings.devices),
    }


class Engine:
    """A running engine process, and the name of the socket over which it is called.

    ``starts`` counts its processes: after :meth:`restart` the engine has no weights and needs a plan and a sync.
    """

    def __init__(self, settings: EngineSettings, log_path: Path) -> None:
        """Start the process, without waiting for it (:meth:`wait_until_ready`).

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
                # Ctrl-C then reaches the owner only, which stops its engines in an orderly way.
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def restart(self) -> None:
        """Replace the process by a new one, without waiting for it (:meth:`wait_until_ready`).

        Call this from a thread that lives as long as the engine.
        """
        self.kill()
        self._start()

    def wait_until_ready(self, deadline: float) -> None:
        """Block until the engine answers.

        Raises EngineError with the log's tail when the engine dies first or ``deadline`` (of ``time.monotonic``)
        passes.
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
        """``weight_version`` (None before the first good sync), ``stale`` (a sync failed), ``workers``."""
        return self.call("GET", "/health", timeout=30.0)

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]:
        """Responses in completion order, each a batch of one with the tokens that it went on from. Ends when all
        responses of ``num_complete`` prompts are finished, by default of all prompts.

        All requests enter the engine between the same two of its steps: the same requests on the same weights give the
        same bits, as long as no other batch runs at the same time.
        Raises EngineError before the first sync, after a failed one, and for a request that does not fit; EngineDied
        when the engine dies, breaks off or hangs (it is killed then).
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

        ``timeout``: seconds; None waits until the engine dies or hangs.
        """
        return self.begin_call(method, path, body, timeout)()

    def begin_call(
        self, method: str, path: str, body: Any = None, timeout: float | None = None
    ) -> Callable[[], dict[str, Any]]:
        """Send the request of a :meth:`call` now. The returned function waits for the answer, and raises."""
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
            # Watch and connection stay open until the answer has arrived.
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

        Progress is a step of vLLM, an accepted request or an executed command (a sync counts as one). A thread of the
        engine reports it in ``/health`` while the main thread works, so a slow engine is killed only if a single step
        takes longer than ``stall_timeout``. A hang is detected after one to two times that. The watch counts polls
        and not seconds: if the trainer itself was stopped, its pause must not count as the engine's.
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
                except EngineError:  # It does not answer. If it is dead, the block detects it itself.
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
        """End the process and its workers: by a request, and after ``grace`` seconds by a kill. Does nothing when the
        process has ended."""
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
