"""A terminal keeps its cursor when the run on it is ended by a signal."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, time
from recipes.run.display import Display
def last_word(number, frame):
    print("the last word", flush=True)
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
signal.signal(signal.SIGTERM, last_word)
with Display() as display, display.stage("the long stage"):
    time.sleep(60)
"""


def test_sigterm_gives_the_cursor_back_and_goes_on_to_the_handler_that_stood() -> None:
    """SIGTERM is what the launcher sends to the ranks when it gets Ctrl-C."""
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
        process.wait(120)
        while chunk := read(ours):
            shown += chunk
    finally:
        process.kill()
        os.close(ours)
    assert process.returncode == -signal.SIGTERM
    assert shown.count(b"\x1b[?25l") == 1
    assert b"the last word" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux reports EIO when the other side is closed
        return b""
