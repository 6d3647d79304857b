"""Debian's packages, for tests that need real programs which no Python package brings."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

LOCK = Path(tempfile.gettempdir()) / "tests-apt-get.lock"  # two test processes may want packages at once


def install(packages: Sequence[str], seconds: int) -> str | None:
    """Returns why the packages can't be had here, None when they are installed. ``seconds``: what that may take."""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "not installed, and only root can install it, with apt-get"
    command = f"apt-get install -y --no-install-recommends {' '.join(packages)}"
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            ["timeout", str(seconds), "bash", "-c", f"{command} || {{ apt-get update && {command}; }}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        )  # the second attempt is for a fresh image, which has no lists
    if done.returncode:
        return f"not installed, and apt-get can't within {seconds} s: {done.stdout.strip()[-200:]}"
    return None
