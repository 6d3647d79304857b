"""Processes that check answers and can be killed (``rewards.check_process``), for checks that can take any time and
memory on some texts. One that takes too long is killed with what it was doing, and a new one takes its place."""

import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

# Our choice: a check takes milliseconds. A busy machine may make it wait, so there is a second try.
SECONDS = 10.0
START_SECONDS = 120.0  # for the process to import sympy
TRIES = 2
PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
ROOT = Path(__file__).resolve().parents[1]


class Stuck(Exception):
    """The process died or took too long; it is gone."""


class Checker:
    """A process of ``rewards.check_process``: one question at a time, a line each way."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rewards.check_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
        )
        self._line(START_SECONDS)

    def ask(self, check: str, wanted: str, answer: str, seconds: float) -> str:
        """The word of that one of ``check_process.CHECKS``. Raises Stuck."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([check, wanted, answer]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self._stuck("it died")
        return json.loads(self._line(seconds))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _line(self, seconds: float) -> bytes:
        """The process writes short whole lines, so that readable means a line or its end."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        line = self.process.stdout.readline() if ready else b""
        if not line:
            self._stuck("it died" if ready else f"it took more than {seconds:g} s")
        return line

    def _stuck(self, why: str) -> None:
        self.close()
        raise Stuck(why)


class Checkers:
    """At most ``count`` processes, started by need, shared by all threads. They die with the thread that started them
    last: a thread of this object's own, which does nothing else."""

    def __init__(self, count: int) -> None:
        self.free: queue.Queue[Checker | None] = queue.Queue()
        for _ in range(count):
            self.free.put(None)
        self.starts: queue.Queue[queue.Queue[Checker | Exception]] = queue.Queue()
        self.starter: threading.Thread | None = None
        self.lock = threading.Lock()

    def ask(self, check: str, wanted: str, answer: str) -> str:
        """As :meth:`Checker.ask`, tried again; a stuck process is replaced at the next question."""
        why = ""
        for _ in range(TRIES):
            started = time.monotonic()
            checker = self.free.get()
            try:
                checker = checker or self._start()
                return checker.ask(check, wanted, answer, SECONDS)
            except Stuck as error:
                checker = None
                why = f"{error} ({time.monotonic() - started:.1f} s)"
            finally:
                self.free.put(checker)
        raise Stuck(why)

    def _start(self) -> Checker:
        with self.lock:
            if self.starter is None:
                self.starter = threading.Thread(target=self._keep_starting, name="checkers", daemon=True)
                self.starter.start()
        answer: queue.Queue[Checker | Exception] = queue.Queue()
        self.starts.put(answer)
        made = answer.get()
        if isinstance(made, Exception):
            raise made
        return made

    def _keep_starting(self) -> None:
        while True:
            answer = self.starts.get()
            try:
                answer.put(Checker())
            except Exception as error:
                answer.put(error)


CHECKERS = Checkers(PROCESSES)
