"""Checks of answers in processes that can be killed (``rewards.check_process``)."""

import os
import time

from rewards.processes import Pool, Stuck

# Our choice: a check takes milliseconds. There is a second try, for a machine that was busy.
CHECK_SECONDS = 10.0
TRIES = 2
PROCESSES = max(1, min(4, len(os.sched_getaffinity(0)) // 2))
POOL = Pool(PROCESSES, "rewards.check_process", quiet=True)


def run_check(check: str, reference: str, answer: str) -> str:
    """The word that this check (of ``check_process.CHECKS``) returns. Raises Stuck."""
    reason = ""
    for _ in range(TRIES):
        started = time.monotonic()
        try:
            word: str = POOL.call([check, reference, answer], CHECK_SECONDS)
            return word
        except Stuck as error:
            reason = f"{error} ({time.monotonic() - started:.1f} s)"
    raise Stuck(reason)
