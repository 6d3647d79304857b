"""A terminal keeps its cursor when the run on it is ended by a signal."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import time
from recipes.display import Display
with Display() as display, display.stage("the long stage"):
    time.sleep(60)
"""


def test_sigterm_gives_the_cursor_back_and_still_ends_the_process() -> None:
    """SIGTERM is what torchrun sends to the ranks when it gets Ctrl-C."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=os.environ | {"TERM": "xterm"}, stdout=theirs, stdin=theirs
    )
    os.close(theirs)
    shown = b""
    try:
        while b"the long stage" not in shown:
            shown += os.read(ours, 4096)
        process.terminate()
        process.wait(30)
        while chunk := read(ours):
            shown += chunk
    finally:
        process.kill()
        os.close(ours)
    assert process.returncode == -signal.SIGTERM
    assert shown.count(b"\x1b[?25l") == 1
    assert shown.rstrip().endswith(b"\x1b[?25h")


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux reports EIO when the other side is closed
        return b""
