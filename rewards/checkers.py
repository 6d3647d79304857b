"""Checks in processes that can be killed (``rewards.check_process``), for checks without a bound on time and memory.

A process that takes too long is killed, and a new one takes its place.
"""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

# Our choice: a check takes milliseconds. There is a second try, for a machine that was busy.
CHECK_SECONDS = 10.0
TRIES = 2
START_SECONDS = 120.0  # for the process to import sympy
PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
ROOT = Path(__file__).resolve().parents[1]


class Stuck(Exception):
    """The process died, or took too long and was killed."""


class Checker:
    """A process of ``rewards.check_process``. It runs one check at a time; requests and replies are lines of JSON."""

    def __init__(self) -> None:
        python_path = [str(ROOT)]
        if os.environ.get("PYTHONPATH"):
            python_path.append(os.environ["PYTHONPATH"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rewards.check_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(python_path)},
        )
        self._read_line(START_SECONDS)

    def run(self, check: str, reference: str, answer: str, seconds: float) -> str:
        """The word that this check (of ``check_process.CHECKS``) returns. Raises Stuck after ``seconds``."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([check, reference, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._fail("it died")
        return json.loads(self._read_line(seconds))

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _read_line(self, seconds: float) -> bytes:
        # The process writes short lines in one piece: a readable pipe has a complete line, or is at its end.
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self._fail("it died" if ready else f"it took more than {seconds:g} s")
        return line

    def _fail(self, reason: str) -> NoReturn:
        self.close()
        raise Stuck(reason)


class Checkers:
    """At most ``count`` processes, started on demand and shared by all threads.

    The kernel ends a process with the thread that started it (``die_with``). A thread of this object's own starts them
    all, because the threads that run checks may end.
    """

    def __init__(self, count: int) -> None:
        self.free: queue.Queue[Checker | None] = queue.Queue()
        for _ in range(count):
            self.free.put(None)
        # Each entry is the queue for the new process, or for the error of its start.
        self.start_requests: queue.Queue[queue.Queue[Checker | Exception]] = queue.Queue()
        self.starter: threading.Thread | None = None
        self.lock = threading.Lock()

    def run(self, check: str, reference: str, answer: str) -> str:
        """As :meth:`Checker.run`, with a second try in a new process. Raises Stuck."""
        reason = ""
        for _ in range(TRIES):
            started = time.monotonic()
            checker = self.free.get()
            try:
                checker = checker or self._start()
                return checker.run(check, reference, answer, CHECK_SECONDS)
            except Stuck as error:
                checker = None
                reason = f"{error} ({time.monotonic() - started:.1f} s)"
            finally:
                self.free.put(checker)
        raise Stuck(reason)

    def _start(self) -> Checker:
        with self.lock:
            if self.starter is None:
                self.starter = threading.Thread(target=self._keep_starting, name="checkers", daemon=True)
                self.starter.start()
        reply: queue.Queue[Checker | Exception] = queue.Queue()
        self.start_requests.put(reply)
        checker = reply.get()
        if isinstance(checker, Exception):
            raise checker
        return checker

    def _keep_starting(self) -> None:
        while True:
            reply = self.start_requests.get()
            try:
                reply.put(Checker())
            except Exception as error:
                reply.put(error)


CHECKERS = Checkers(PROCESSES)
