"""Python processes that answer one request at a time and can be killed, for work without a bound on time and memory.

Threads don't do for this: a thread can't be killed, and while one matches a regular expression, no other can run. A
process that takes too long is killed together with the processes that it started, and replaced by a new one.
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

START_SECONDS = 120.0  # time for the process to import its modules


class Stuck(Exception):
    """The process died, or took too long and was killed."""


class TooSlow(Stuck):
    """The process took too long and was killed."""


class Process:
    """A child process ``python -m MODULE OWNER_PID ARGUMENTS…``, whose module calls :func:`serve`.

    Requests and replies are lines of JSON.
    """

    def __init__(self, module: str, arguments: Sequence[str], quiet: bool) -> None:
        # The child can import whatever this process can.
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
        """The reply to a request.

        Raises Stuck if the process died or gave no reply within ``seconds``, and TypeError for a request that can't be
        written as JSON.
        """
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
        """Kill the process and its process group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # closing flushes what is not written yet
                pipe.close()

    def _read(self, seconds: float) -> Any:
        # The process writes a line in one go. So a readable pipe soon has a complete line, or is at its end.
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if not line.endswith(b"\n"):
            self.close()
            raise Stuck("it died") if ready else TooSlow(f"it took more than {seconds:g} s")
        return json.loads(line)


class Pool:
    """A pool of at most ``count`` processes, which are started on demand and shared by all threads.

    The kernel ends a process together with the thread that started it (``die_with``). The calling threads may end, so
    the pool has a thread of its own that starts all processes.
    """

    def __init__(self, count: int, module: str, arguments: Sequence[str] = (), quiet: bool = False) -> None:
        self.module = module
        self.arguments = arguments
        self.quiet = quiet
        # Last in, first out: the most recently used process is used next. None is a process that is not started yet.
        self.free: queue.LifoQueue[Process | None] = queue.LifoQueue()
        for _ in range(count):
            self.free.put(None)
        # Each entry is the queue into which to put the new process, or the exception of its start.
        self.start_requests: queue.Queue[queue.Queue[Process | Exception]] = queue.Queue()
        self.starter: threading.Thread | None = None
        self.lock = threading.Lock()

    def call(self, request: Any, seconds: float) -> Any:
        """As :meth:`Process.call`, in a free process. Waits until one is free."""
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
        """Start a new process. Raises Stuck if it dies, or takes too long, before it is ready."""
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
    """The main loop of a child process: answer requests until the owner ends.

    ``prepare`` returns the function that answers a request. For this function standard input is empty, and its standard
    output goes to standard error.
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
