"""Kill a run at random moments, resume it each time, and compare its end with that of a run that is left alone.

``make kill-check``, or ``python -m tests.recipes.kill_check --seed 2 --moments 5``. A seed always gives the same
moments. Steps carry partial rollouts over and move the constraint's multiplier, so that everything that a checkpoint
holds has an effect on the end.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext import checkpoint
from recipes.run import records, sample_files
from tests.megatron_ext.reference import stored
from tests.recipes import tiny

STEPS = 16
OPTIONS = (
    "stage.trains=[rl]",
    "stage.evaluates=false",
    f"algorithm.steps={STEPS}",
    "algorithm.learning_rate=1e-4",
    "algorithm.importance_sampling=token_truncated",
    "rollout.oversample=1.5",
    "rollout.partial_rollout_tokens=3",
    "rewards.constraint.verifier=safety",
    "rewards.constraint.floor=0.9",
    "rewards.constraint.rate=0.1",
)
PATIENCE = 1800  # seconds for a run, or until a moment comes, on a machine that has other work too
WRITING = "writing"  # while a checkpoint's files are written; the other phases are those of the loop
PHASES = ("generate", "reward", "train", WRITING)
VICTIMS = ("rank 0", "rank 1", "the launcher", "all")


@dataclass(frozen=True)
class Moment:
    """A moment of a run, after it has saved ``steps`` steps more than there were at its start.

    It is ``delay`` seconds after the beginning of a phase of the loop, or of the writing of a checkpoint (``WRITING``).
    """

    steps: int
    phase: str
    delay: float = 0.0


def random_moments(seed: int, count: int) -> list[tuple[Moment, str]]:
    """The moments of a seed, each with the process to kill. Every phase comes equally often."""
    chance = random.Random(seed)
    phases = [PHASES[i % len(PHASES)] for i in range(count)]
    chance.shuffle(phases)
    delays = [0.0 if phase == WRITING else chance.uniform(0, 0.05) for phase in phases]
    moments = []
    for phase, delay in zip(phases, delays, strict=True):
        moment = Moment(chance.randrange(2), phase, delay)
        moments.append((moment, chance.choice(VICTIMS)))
    return moments


def is_being_written(folder: Path, since: float) -> bool:
    """Whether a checkpoint's folder has files but is not complete, and was changed after ``since`` (Unix time).

    An older one is what a former kill has left.
    """
    if folder.stat().st_ctime <= since:
        return False
    return any(folder.iterdir()) and not (folder / checkpoint.COMPLETE).exists()


def kill_at(run: tiny.Run, run_dir: Path, moment: Moment, victim: str) -> None:
    """Wait until the moment has come, and kill; the victim "Ctrl-C" interrupts all. Fails when the run ends before."""
    started = time.time()
    target_step = saved_step(run_dir) + moment.steps
    run.wait_for(f"{moment.steps} more steps", lambda: saved_step(run_dir) >= target_step, PATIENCE)
    ranks = [run.wait_for("the ranks", lambda rank=rank: run.rank(rank), PATIENCE) for rank in (0, 1)]
    # The watchdog names a rank's process after the phase of the loop.
    phase_of_rank_0 = Path(f"/proc/{ranks[0]}/comm")

    def has_come() -> bool:
        if moment.phase != WRITING:
            return phase_of_rank_0.read_text().strip() == moment.phase
        return any(is_being_written(folder, started) for folder in (run_dir / "checkpoints").glob("step_*"))

    deadline = time.monotonic() + PATIENCE
    while True:
        # A process may end, and an old folder may be removed, while they are read.
        with contextlib.suppress(OSError):
            if has_come():
                break
        assert run.process.poll() is None, f"the run ended before {moment}:\n{run.output()}"
        assert time.monotonic() < deadline, f"{moment} has not come within {PATIENCE} s"
        time.sleep(0.0002)  # some phases take milliseconds
    time.sleep(moment.delay)
    if victim == "Ctrl-C":
        os.killpg(run.process.pid, signal.SIGINT)
        return
    pids = {"rank 0": ranks[:1], "rank 1": ranks[1:], "the launcher": [run.process.pid]}
    for pid in pids.get(victim) or run.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def saved_step(run_dir: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one."""
    latest = checkpoint.latest(run_dir / "checkpoints")
    return int(latest.name.removeprefix("step_")) if latest else 0


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without metrics of time and of memory."""
    measured = ("time/", "throughput/", "memory/", records.TOKENS_PER_SECOND)
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def differences(alone: Path, killed: Path, steps: int) -> list[str]:
    """The names of what differs at the ends of two runs: rows of metrics, files, tensors of the last checkpoint."""
    problems = []
    expected_rows = timeless(list(records.read_rows(alone / "metrics.jsonl")))
    rows = timeless(list(records.read_rows(killed / "metrics.jsonl")))
    if len(rows) != len(expected_rows):
        problems.append(f"{len(rows)} rows of metrics, {len(expected_rows)} without kills")
    for expected_row, row in zip(expected_rows, rows, strict=False):
        if row != expected_row:
            problems.append(f"metrics of step {expected_row['step']}")
    if list(sample_files.read(alone)) != list(sample_files.read(killed)):
        problems.append("samples")
    weights = "hf/model.safetensors"
    if (alone / weights).read_bytes() != (killed / weights).read_bytes():
        problems.append(weights)
    expected_tensors = stored(alone / "checkpoints" / f"step_{steps:06d}")
    tensors = stored(killed / "checkpoints" / f"step_{steps:06d}")
    problems += sorted(tensors.keys() ^ expected_tensors.keys())
    for name in sorted(tensors.keys() & expected_tensors.keys()):
        if not torch.equal(tensors[name], expected_tensors[name]):
            problems.append(name)
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moments", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder)
        alone = twin / "alone"
        killed = twin / "killed"
        tiny.make(twin)
        print("a run that is left alone", flush=True)
        tiny.complete(tiny.overrides(twin, alone, *OPTIONS), PATIENCE)
        for number, (moment, victim) in enumerate(random_moments(options.seed, options.moments), start=1):
            if saved_step(killed) >= STEPS - 2:
                sys.exit(f"error: the run is over before moment {number}: raise STEPS")
            run = tiny.Run(tiny.overrides(twin, killed, *OPTIONS, f"resume={number > 1}"))
            try:
                kill_at(run, killed, moment, victim)
                run.output(120)
                remains = run.remains(60)
            finally:
                run.kill_all()
            print(f"{number:3d}  {victim} killed in {moment.phase}, {saved_step(killed)} steps saved", flush=True)
            if remains != ({}, set()):
                sys.exit(f"error: left behind: {remains}")
        tiny.complete(tiny.overrides(twin, killed, *OPTIONS, "resume=true"), PATIENCE)
        if problems := differences(alone, killed, STEPS):
            sys.exit(f"error: not as the run left alone: {', '.join(problems)}")
        print(f"seed {options.seed}: after {options.moments} kills the same metrics, samples and weights, bit for bit")


if __name__ == "__main__":
    main()
