"""The ranks of a run on one machine: forked from one process, so that what they all need is imported once.

Elsewhere, srun or torchrun starts each rank as a process of its own.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from megatron_ext.processes import die_with
from recipes.run import preemption

GRACE_SECONDS = 30.0  # from SIGTERM to SIGKILL
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def in_a_child(work: Callable[[], object]) -> None:
    """Do ``work`` in a forked process: the threads that it leaves would be in the way of ``fork_ranks``.

    Where it fails, which it tells itself, this process ends with its exit code.
    """
    sys.stdout.flush()
    owner = os.getpid()
    if (pid := os.fork()) == 0:
        die_with(owner)
        work()
        sys.exit(0)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child gets Ctrl-C too, and cleans up
    code = _exit_code(os.waitpid(pid, 0)[1])
    signal.signal(signal.SIGINT, interrupt)
    if code:
        sys.exit(code)


def fork_ranks(count: int) -> None:
    """Return in ``count`` new processes, each a rank with torchrun's variables; this process ends when they have ended.

    When a rank fails, or this process is told to end, all ranks get SIGTERM, and later SIGKILL; this process's exit
    code is that of the first that failed, or 128 + the signal's number. When it dies, the kernel ends them. The signal
    of ``recipes.run.preemption`` is passed on to them.

    Call it in the main thread, while no other thread computes and before CUDA is touched: neither bears a fork.
    """
    # Bound before there are ranks, so that none waits for a port that another program has taken meanwhile.
    listening = socket.create_server(("127.0.0.1", 0))
    os.environ |= {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, as under torchrun
    }
    ending = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [*ending, preemption.SIGNAL, signal.SIGCHLD])
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # no rank's garbage collection goes through what was imported
    launcher, ranks = os.getpid(), dict[int, int]()
    for rank in range(count):
        if (pid := os.fork()) == 0:
            die_with(launcher)
            os.setsid()  # the terminal's Ctrl-C is for the launcher alone
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            listening.close()
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            return
        ranks[pid] = rank

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    code = _attend(ranks, ending)
    del store
    sys.exit(code)


def _attend(ranks: dict[int, int], ending: list[signal.Signals]) -> int:
    """Wait for the end of all ``ranks``, pid → rank; returns the exit code."""
    code, deadline = 0, float("inf")
    while ranks:
        left = min(max(0.0, deadline - time.monotonic()), 3600.0)
        news = signal.sigtimedwait([*ending, preemption.SIGNAL, signal.SIGCHLD], left)
        if news is not None and news.si_signo == preemption.SIGNAL:
            _tell(ranks, preemption.SIGNAL)
            continue
        first = 128 + news.si_signo if news is not None and news.si_signo != signal.SIGCHLD else 0
        for pid in list(ranks):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                rank, its = ranks.pop(pid), _exit_code(status)
                with contextlib.suppress(OSError):  # the disk with the log may be full, which a rank has told
                    print(f"rank {rank} (pid {pid}) ended with exit code {its}", file=sys.stderr, flush=True)
                if its > 128 and not (code or first):
                    print(f"error: rank {rank} was ended by {signal.Signals(its - 128).name}", flush=True)
                first = first or its
        if first and not code:
            code, deadline = first, time.monotonic() + GRACE_SECONDS
            _tell(ranks, signal.SIGTERM)
        if time.monotonic() > deadline:
            _tell(ranks, signal.SIGKILL)
            deadline = float("inf")
    return code


def _tell(ranks: dict[int, int], number: signal.Signals) -> None:
    for pid in ranks:  # none is reaped meanwhile, so each pid is still its rank's
        os.kill(pid, number)


def _exit_code(status: int) -> int:
    """Of a process: 128 + the number of the signal that ended it, as shells have it."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
