"""Fork the ranks of a run on one machine from one process, so that the modules they share are imported only once.

Under srun or torchrun each rank is started separately, and this module is not used.
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
TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def run_in_child(work: Callable[[], object]) -> None:
    """Call ``work`` in a forked process and wait for it.

    A process with threads must not fork. ``work`` may leave threads running, so it must not run in this process. If the
    child fails, this process ends with the child's exit code. ``work`` prints its own errors.
    """
    sys.stdout.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with(parent)
        work()
        sys.exit(0)
    # The child gets Ctrl-C too. This process ignores it and waits until the child has cleaned up.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = _exit_code(os.waitpid(pid, 0)[1])
    signal.signal(signal.SIGINT, interrupt)
    if code:
        sys.exit(code)


def fork_ranks(count: int, nodes: int = 1) -> None:
    """Fork ``count`` ranks. The function returns in each rank. This process waits for them and exits.

    A rank has torchrun's environment variables, in which this machine counts as ``nodes`` nodes.

    When a rank fails, or this process gets a termination signal, all ranks get SIGTERM, and SIGKILL after
    ``GRACE_SECONDS``. The exit code of this process is that of the first rank that failed, or 128 + the number of the
    signal. When this process dies, the kernel kills the ranks. The preemption signal (``recipes.run.preemption``) is
    passed on to the ranks.

    Call this in the main thread, before other threads run and before CUDA is initialised. Both make a fork unsafe.
    """
    # The port is bound before the fork, so that no other program can take it.
    listening = socket.create_server(("127.0.0.1", 0))
    os.environ |= {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count // nodes),
        "GROUP_WORLD_SIZE": str(nodes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        # This process holds the store, as torchrun does.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    terminations = [number for number in TERMINATION_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [*terminations, preemption.SIGNAL, signal.SIGCHLD])
    sys.stdout.flush()
    sys.stderr.flush()
    # Garbage collection in the ranks then skips the imported modules.
    gc.freeze()
    launcher = os.getpid()
    ranks: dict[int, int] = {}
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            die_with(launcher)
            # In a session of its own, the rank does not get the terminal's Ctrl-C. Only the launcher does.
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)
            listening.close()
            node, local_rank = divmod(rank, count // nodes)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "GROUP_RANK": str(node)}
            return
        ranks[pid] = rank

    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    code = _wait_for_ranks(ranks, terminations)
    del store
    sys.exit(code)


def _wait_for_ranks(ranks: dict[int, int], terminations: list[signal.Signals]) -> int:
    """Wait until all ``ranks`` (pid → rank) have ended, and return the exit code for this process."""
    exit_code = 0
    kill_at = float("inf")
    while ranks:
        timeout = min(max(0.0, kill_at - time.monotonic()), 3600.0)
        received = signal.sigtimedwait([*terminations, preemption.SIGNAL, signal.SIGCHLD], timeout)
        if received is not None and received.si_signo == preemption.SIGNAL:
            _signal_all(ranks, preemption.SIGNAL)
            continue
        failure = 0
        if received is not None and received.si_signo != signal.SIGCHLD:
            failure = 128 + received.si_signo
        for pid, code in _reap(ranks):
            rank = ranks.pop(pid)
            # The log's disk may be full. The rank has then reported that error itself.
            with contextlib.suppress(OSError):
                print(f"rank {rank} (pid {pid}) ended with exit code {code}", file=sys.stderr, flush=True)
            # A rank that was killed could not print an error. Ranks that end after the first failure were ended by
            # this process.
            if code > 128 and not (exit_code or failure):
                print(f"error: rank {rank} was ended by {signal.Signals(code - 128).name}", flush=True)
            failure = failure or code
        if failure and not exit_code:
            exit_code = failure
            kill_at = time.monotonic() + GRACE_SECONDS
            _signal_all(ranks, signal.SIGTERM)
        if time.monotonic() > kill_at:
            _signal_all(ranks, signal.SIGKILL)
            kill_at = float("inf")
    return exit_code


def _reap(ranks: dict[int, int]) -> list[tuple[int, int]]:
    """(pid, exit code) of the ranks that have ended since the last call."""
    ended = []
    for pid in ranks:
        reaped, status = os.waitpid(pid, os.WNOHANG)
        if reaped:
            ended.append((pid, _exit_code(status)))
    return ended


def _signal_all(ranks: dict[int, int], number: signal.Signals) -> None:
    # Only _reap releases a pid, so no pid here can belong to another process.
    for pid in ranks:
        os.kill(pid, number)


def _exit_code(status: int) -> int:
    """The exit code from a wait status. For a process ended by a signal it is 128 + its number, as in a shell."""
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code
