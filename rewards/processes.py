"""Python processes that answer one request at a time and can be killed, for work without a bound on time and memory.

A thread can't be ended, and one that runs a regular expression stops all others meanwhile. A process that takes too
long is killed with what it started, and a new one takes its place.
"""

import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from megatron_ext.processes import die_with

START_SECONDS = 120.0  # for the process to import what it needs


class Stuck(Exception):
    """The process died, or took too long and was killed."""


class TooSlow(Stuck):
    """It took too long."""


class Process:
    """``python -m MODULE OWNER_PID ARGUMENTS…``, which calls :func:`serve`. Requests and replies are lines of JSON."""

    def __init__(self, module: str, arguments: Sequence[str], quiet: bool) -> None:
        # What this process can import, that one can.
        python_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(os.getpid()), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if quiet else None,
            env=os.environ | {"PYTHONPATH": python_path},
            start_new_session=True,
        )
        self._read(START_SECONDS)

    def call(self, request: Any, seconds: float) -> Any:
        """The reply to a request. Raises Stuck after ``seconds``, and TypeError for a request that JSON can't hold."""
        assert self.process.stdin is not None
        line = json.dumps(request).encode() + b"\n"
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.close()
            raise Stuck("it died") from None
        return self._read(seconds)

    def close(self) -> None:
        """Kill the process, and what it started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # of what is not written yet
                pipe.close()

    def _read(self, seconds: float) -> Any:
        # The process writes a line in one go, so a readable pipe soon has a complete line, or is at its end.
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if not line.endswith(b"\n"):
            self.close()
            raise Stuck("it died") if ready else TooSlow(f"it took more than {seconds:g} s")
        return json.loads(line)


class Pool:
    """At most ``count`` such processes, started on demand and shared by all threads.

    The kernel ends a process with the thread that started it (``die_with``). A thread of this object's own starts them
    all, because the threads that call may end.
    """

    def __init__(self, count: int, module: str, arguments: Sequence[str] = (), quiet: bool = False) -> None:
        self.module = module
        self.arguments = arguments
        self.quiet = quiet
        # The process that was used last is used first, and None means one that is still to be started.
        self.free: queue.LifoQueue[Process | None] = queue.LifoQueue()
        for _ in range(count):
            self.free.put(None)
        # Each entry is the queue for the new process, or for the error of its start.
        self.start_requests: queue.Queue[queue.Queue[Process | Exception]] = queue.Queue()
        self.starter: threading.Thread | None = None
        self.lock = threading.Lock()

    def call(self, request: Any, seconds: float) -> Any:
        """As :meth:`Process.call`, in a free process, which is waited for."""
        process = self.free.get()
        try:
            if process is not None and process.process.poll() is not None:
                process.close()
                process = None
            process = process or self.start()
            return process.call(request, seconds)
        except Stuck:
            process = None
            raise
        finally:
            self.free.put(process)

    def start(self) -> Process:
        """A new process. Raises Stuck when it dies at once."""
        with self.lock:
            if self.starter is None:
                self.starter = threading.Thread(target=self._keep_starting, name="process starter", daemon=True)
                self.starter.start()
        reply: queue.Queue[Process | Exception] = queue.Queue()
        self.start_requests.put(reply)
        process = reply.get()
        if isinstance(process, Exception):
            raise process
        return process

    def _keep_starting(self) -> None:
        while True:
            reply = self.start_requests.get()
            try:
                reply.put(Process(self.module, self.arguments, self.quiet))
            except Exception as error:
                reply.put(error)


def serve(prepare: Callable[[], Callable[[Any], Any]]) -> None:
    """In the process: prepare what answers requests, then answer them until the owner ends.

    Standard input is empty for what runs here, and its standard output goes to standard error.
    """
    die_with(int(sys.argv[1]))
    requests = os.fdopen(os.dup(0))
    replies = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    answer = prepare()
    print(json.dumps("ready"), file=replies, flush=True)
    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)
