"""Checks of answers in processes that can be killed (``rewards.check_process``)."""

import os
import time

from rewards.processes import Pool, Stuck

# Our choice. A check normally takes milliseconds. The second try is for the case that the machine was busy.
CHECK_SECONDS = 10.0
TRIES = 2
PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
POOL = Pool(PROCESSES, "rewards.check_process", quiet=True)


def run_check(check: str, reference: str, answer: str) -> str:
    """Run a check of ``check_process.CHECKS`` in another process and return its one-word result.

    Raises Stuck if the process died or took too long in every try.
    """
    reason = ""
    for _ in range(TRIES):
        started = time.monotonic()
        try:
            word: str = POOL.call([check, reference, answer], CHECK_SECONDS)
            return word
        except Stuck as error:
            reason = f"{error} ({time.monotonic() - started:.1f} s)"
    raise Stuck(reason)
