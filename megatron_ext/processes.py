"""Tie the lifetime of a child process to that of its parent."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(owner_pid: int) -> None:
    """Make the kernel kill this process (SIGKILL) when the parent's thread that started it ends, however it ends.

    Call it in the child, as ``preexec_fn`` or as the first statement of its program. If the parent has already ended,
    between the start of the child and this call, the child exits at once.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != owner_pid:
        print(f"the owner (pid {owner_pid}) is gone", file=sys.stderr, flush=True)
        # Not sys.exit: a fork's caller may swallow its exception.
        os._exit(1)
