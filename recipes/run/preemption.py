"""Preemption: SIGUSR1 asks a run to end soon, for example before a job's time limit.

The run then finishes its step, saves a checkpoint and ends. The signal is blocked rather than handled, and the ranks
check once a step whether it is pending. Child processes inherit the signal mask. This is needed because Slurm signals
every process of a job's step: without the mask the signal would kill the engines in the middle of a training step.
"""

import signal

# EX_TEMPFAIL of sysexits.h, "try again". Rank 0 ends with it, the other ranks with 0.
EXIT_CODE = 75
SIGNAL = signal.SIGUSR1


class Preempted(Exception):
    """Raised when the run has saved its last step and ends before it is finished."""


def listen() -> None:
    """Block the signal in this process and those that it starts, so that the signal stays pending.

    Call it while the process has only one thread, since other threads keep their own masks.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])


def preemption_requested() -> bool:
    """Whether the signal has arrived. It stays pending, so the answer remains True."""
    return SIGNAL in signal.sigpending()
