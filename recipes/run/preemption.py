"""A run that has to end soon (a job's time limit, preemption) is told so by SIGUSR1: it saves behind the running step.

The signal is never handled but blocked, and looked for once a step. Children inherit that: Slurm signals all processes
of a job's step, and the engines are to live until the training step is done.
"""

import signal

EXIT_CODE = 75  # sysexits.h's EX_TEMPFAIL: try again; of rank 0, the others end with 0
SIGNAL = signal.SIGUSR1


class Preempted(Exception):
    """The run has saved what it did and ends before it is finished."""


def listen() -> None:
    """Keep the signal for :func:`told`, in this process and what it starts; call it before there are threads."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [SIGNAL])


def told() -> bool:
    """Whether the signal has come. True from then on."""
    return SIGNAL in signal.sigpending()
