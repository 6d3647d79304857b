"""A rank that hangs ends every process of the run, with all stacks in the logs; a slow rank is named."""

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.run.watchdog import NOTICE, slow_ranks

ROOT = Path(__file__).resolve().parents[2]
# Rank 0 waits for rank 1, which hangs: in Python, or in C with the GIL held.
PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
from recipes.run import watchdog
folder, rank, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watchdog.GRACE = 1.0
dog = watchdog.Watchdog(folder, rank, 3.0 if rank else 60.0)
def waits_for_the_other():
    threading.Event().wait(60)
def hangs():
    time.sleep(60) if how == "python" else ctypes.PyDLL(None).sleep(60)
def helps():
    time.sleep(60)
threading.Thread(target=helps, daemon=True).start()
dog.beat("train")
hangs() if rank else waits_for_the_other()
"""


@pytest.mark.parametrize("how", ["python", "gil"])
def test_a_rank_that_hangs_ends_the_run_with_every_ranks_stacks(tmp_path: Path, how: str) -> None:
    ranks = [0] if how == "gil" else [0, 1]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    alone = "1" if how == "gil" else None  # faulthandler writes no notice for others
    processes = []
    for rank in ranks:
        log = (tmp_path / f"rank_{rank}.log").open("w")
        processes.append(
            subprocess.Popen([*command, alone or str(rank), how], cwd=ROOT, stdout=subprocess.PIPE, stderr=log)
        )
    try:
        printed = [process.communicate(timeout=50)[0].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [1] * len(ranks)
    logs = [(tmp_path / f"rank_{rank}.log").read_text() for rank in ranks]
    assert "in hangs" in logs[-1] and "in helps" in logs[-1], "every thread's stack"
    if how == "python":
        assert "in waits_for_the_other" in logs[0] and "in helps" in logs[0]
        for text in printed:  # rank 0's is the terminal
            assert text.startswith("error: rank 1 has made no progress for 3 s in train; ")
            assert "raise cluster.watchdog" in text
        assert (tmp_path / NOTICE).read_text() == "rank 1 has made no progress for 3 s in train"


def test_slow_ranks_are_named_with_their_time_and_the_medians() -> None:
    def messages(*ranks: list[float]) -> list[str]:
        return slow_ranks([list(zip(("data", "train"), seconds, strict=True)) for seconds in ranks], 3, 1.0)

    usual = [0.5, 10.0]
    assert messages(usual, usual, usual, usual) == []
    assert messages(usual, [1.6, 30.5]) == [
        "rank 1 is slow: 1.6 s for data, the median is 0.5 s",
        "rank 1 is slow: 30.5 s for train, the median is 10 s",
    ]
    assert messages(usual, [1.4, 29.0]) == []
    assert messages([0.1, 1.0], [0.9, 1.0], [0.1, 1.0]) == [], "a fraction of a second is noise"
    assert slow_ranks([[("probe", 0.001)], [("probe", 0.004)]], 3, 0.0) == [
        "rank 1 is slow: 0.004 s for probe, the median is 0.001 s"
    ]


def test_a_rank_that_waits_for_a_slow_one_is_not_named() -> None:
    """Rank 1 is 9 s late for the gradients' exchange, in which rank 0 waits for it; then rank 0 itself is slow."""
    phases = ("reward", "train", "sync", "reward", "checkpoint")
    waits, late = (1.0, 9.5, 0.5, 8.0, 0.5), (10.0, 0.5, 0.5, 1.0, 7.5)
    laps = [list(zip(phases, seconds, strict=True)) for seconds in (waits, late)]
    assert slow_ranks(laps, 3, 1.0) == [
        "rank 1 is slow: 10 s for reward, the median is 1 s",
        "rank 0 is slow: 8 s for reward, the median is 1 s",
    ]
