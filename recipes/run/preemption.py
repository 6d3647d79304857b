"""Preemption: SIGUSR1 asks a run to end soon (a job's time limit, say). It finishes its step, saves and ends.

The signal is blocked rather than handled, and the ranks look once a step whether it is pending. Child processes inherit
the mask. Slurm signals every process of a job's step, so without the mask it would end the engines in the middle of a
training step.
"""

import signal

# EX_TEMPFAIL of sysexits.h, "try again". Rank 0 ends with it, the other ranks with 0.
EXIT_CODE = 75
SIGNAL = signal.SIGUSR1


class Preempted(Exception):
    """The run has saved its last step and ends before it is finished."""


def listen() -> None:
    """Block the signal, so that it stays pending, in this process and those that it starts.

    Call it while the process has one thread: other threads keep their own masks.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])


def preemption_requested() -> bool:
    """Whether the signal has arrived. It stays pending, so the answer remains True."""
    return SIGNAL in signal.sigpending()
