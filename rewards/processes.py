"""Children that end with their owner."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(owner_pid: int) -> None:
    """Have the kernel kill this process when the thread of its owner that started it ends, in any way; exit at once
    when the owner is gone already."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != owner_pid:
        print(f"the owner (pid {owner_pid}) is gone", file=sys.stderr, flush=True)
        os._exit(1)  # also where an exception would be swallowed: behind a fork
