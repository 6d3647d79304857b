"""A whole run with engines to which all of it happens: an infinite gradient, a slow rank, a full disk; and, when it is
resumed, a rank that stands still."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_ext import checkpoint
from recipes.run import records, sample_files
from tests.recipes import tiny
from tests.recipes.kill_check import saved_step

OPTIONS = ("stage.trains=[rl]", "stage.evaluates=false", "algorithm.steps=900")
WATCHDOG = 30  # seconds; on a busy machine a phase may take some
REMAINS = ({}, set())
ROOM = 1 << 20  # bytes, a third of what a checkpoint takes
STOPPED_SECONDS = 2.0  # of rank 1, in one phase


@dataclass(frozen=True)
class Ended:
    """How a launch ended, and the run's folder at that moment."""

    printed: str
    exit_code: int
    remains: tuple[dict[int, str], set[str]]
    checkpoints: list[str]
    metrics: bytes


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small disk where this may mount one, else a folder."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder]).returncode
    yield folder
    if mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="module")
def ends(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Ended]:
    folder = tmp_path_factory.mktemp("faults")
    tiny.make(folder)
    return full(folder, disk), stalled(folder, disk)


def full(folder: Path, disk: Path) -> Ended:
    """The launch to which everything happens until its disk is full."""
    run_dir = disk / "run"
    run = tiny.Run(tiny.overrides(folder, run_dir, *OPTIONS, "algorithm.advantage=tests.recipes.faulty.overflows"))
    try:
        run.wait_for("three steps", lambda: saved_step(run_dir) >= 3)
        slow_down(run, run_dir / "logs" / "rank_0.log")
        fill(run, disk)
        return ended(run, run_dir)
    finally:
        run.kill_all()


def slow_down(run: tiny.Run, log: Path) -> None:
    """Stop rank 1 in a phase in which no rank waits for another, again and again until the log names it: the phase
    takes milliseconds and may be over when the signal comes."""
    rank = run.wait_for("rank 1", lambda: run.rank(1))
    name = Path(f"/proc/{rank}/comm")

    def is_named() -> bool:
        deadline = time.monotonic() + 10
        while name.read_text() != "reward\n":
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)
        os.kill(rank, signal.SIGSTOP)
        time.sleep(STOPPED_SECONDS)
        os.kill(rank, signal.SIGCONT)
        time.sleep(0.5)
        return bool(stopped_ranks(log.read_text()))

    run.wait_for("a message about a slow rank", is_named)


def stopped_ranks(log: str) -> set[int]:
    """The ranks that the log reports as slow by about as long as rank 1 was stopped. On a busy machine any rank can be
    slow for less."""
    messages = re.findall(r"rank (\d+) is slow: (\S+) s for", log)
    return {int(rank) for rank, seconds in messages if float(seconds) > 0.7 * STOPPED_SECONDS}


def fill(run: tiny.Run, disk: Path) -> None:
    """Leave room for lines on the disk, or else for small files, and none for a checkpoint, until the run ends."""
    if not disk.is_mount():
        for pid in (run.rank(0), run.rank(1)):
            hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (ROOM, hard))
        return
    deadline = time.monotonic() + 300
    with (disk / "fill").open("wb", buffering=0) as file:
        while run.process.poll() is None and time.monotonic() < deadline:
            space = os.statvfs(disk)
            with contextlib.suppress(OSError):
                file.write(bytes(max(0, space.f_bavail * space.f_frsize - ROOM)))
            time.sleep(0.01)


def stalled(folder: Path, disk: Path) -> Ended:
    """The launch that goes on when there is room, until its rank 1 stands still."""
    (disk / "fill").unlink(missing_ok=True)
    advantage = "algorithm.advantage=tests.recipes.faulty.stands_still"
    resumed = ("resume=true", "resume_accept=[algorithm.advantage]")
    arguments = (*OPTIONS, advantage, *resumed, f"cluster.watchdog={WATCHDOG}")
    run = tiny.Run(tiny.overrides(folder, disk / "run", *arguments))
    try:
        return ended(run, disk / "run")
    finally:
        run.kill_all()


def ended(run: tiny.Run, run_dir: Path) -> Ended:
    printed = run.output()
    return Ended(
        printed,
        run.process.returncode,
        run.remains(60),
        sorted(path.name for path in (run_dir / "checkpoints").iterdir()),
        (run_dir / "metrics.jsonl").read_bytes(),
    )


def test_an_update_with_an_infinite_gradient_is_skipped_and_counted_and_the_run_goes_on(
    ends: tuple[Ended, Ended], disk: Path
) -> None:
    first, second, third, *_ = records.read_rows(disk / "run" / "metrics.jsonl")
    assert [row["skipped_updates"] for row in (first, second, third)] == [0, 1, 0]
    assert second["grad_norm"] is None and third["grad_norm"] > 0
    skipped = [each for each in records.read_events(disk / "run" / "events.jsonl") if each["kind"] == "skipped update"]
    assert [(each["after_step"], each["model"]) for each in skipped] == [(1, "policy")]
    assert re.search("gradient norm (inf|nan)$", skipped[0]["why"])


def test_a_slow_rank_is_named_and_the_one_that_waits_for_it_is_not(ends: tuple[Ended, Ended], disk: Path) -> None:
    assert stopped_ranks((disk / "run" / "logs" / "rank_0.log").read_text()) == {1}
    assert stopped_ranks(ends[0].printed) == {1}


def test_a_full_disk_ends_the_run_with_its_reason_and_the_former_checkpoints(ends: tuple[Ended, Ended]) -> None:
    end = ends[0]
    assert end.exit_code != 0 and end.remains == REMAINS
    assert re.search(r"error: step_\d+ was not written: .*(No space left on device|File too large)", end.printed)
    assert "; make room in " in end.printed and "go on with resume=true from the checkpoint before it" in end.printed
    assert end.checkpoints and all(name.startswith("step_") for name in end.checkpoints)


def test_with_room_again_it_goes_on_from_the_last_whole_checkpoint(ends: tuple[Ended, Ended], disk: Path) -> None:
    full, resumed = ends
    newest = int(full.checkpoints[-1].removeprefix("step_"))
    assert resumed.metrics.splitlines()[:newest] == full.metrics.splitlines()[:newest]
    rows = list(records.read_rows(disk / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, newest + 2)), "one step until the stall"
    assert checkpoint.latest(disk / "run" / "checkpoints") == disk / "run" / "checkpoints" / f"step_{newest + 1:06d}"
    samples = [row["step"] for row in sample_files.read(disk / "run")]
    assert samples == [step for step in range(1, newest + 2) for _ in range(16)]


def test_a_rank_that_stands_still_ends_the_run_with_every_ranks_stacks(ends: tuple[Ended, Ended], disk: Path) -> None:
    end, logs = ends[1], disk / "run" / "logs"
    assert end.exit_code != 0 and end.remains == REMAINS
    assert f" has made no progress for {WATCHDOG} s in logprobs; the stacks of all ranks are in {logs}" in end.printed
    waits, stands = ((logs / f"rank_{rank}.log").read_text().rpartition("watchdog: rank") for rank in (0, 1))
    assert waits[2].startswith(" 0 in logprobs") and "in exchange" in waits[2]
    assert stands[2].startswith(" 1 in logprobs") and "in stands_still" in stands[2]
