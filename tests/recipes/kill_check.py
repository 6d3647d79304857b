"""Kill a run at random moments, resume it each time, and compare its end with that of a run that is left alone.

``make kill-check``, or ``python -m tests.recipes.kill_check --seed 2 --moments 5``; a seed gives the same moments
always. Responses are carried over from step to step and the multiplier moves, so that all a checkpoint holds counts.
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
from recipes.run import records
from tests.megatron_ext.reference import stored
from tests.recipes import tiny

STEPS = 16
OPTIONS = ("stage.trains=[rl]", "stage.evaluates=false", f"algorithm.steps={STEPS}", "algorithm.learning_rate=1e-4")
OPTIONS += (
    "rollout.oversample=1.5",
    "rollout.partial_rollout_tokens=3",
    "algorithm.importance_sampling=token_truncated",
)
OPTIONS += ("rewards.constraint.verifier=safety", "rewards.constraint.floor=0.9", "rewards.constraint.rate=0.1")
PATIENCE = 1800  # seconds for a run, or a moment of it, on a machine that has other work too
WRITING = "writing"
PHASES = ("generate", "reward", "train", WRITING)
VICTIMS = ("rank 0", "rank 1", "the launcher", "all")


@dataclass(frozen=True)
class Moment:
    """``delay`` seconds into a phase of the loop, when ``steps`` more steps are saved than at the run's start; or while
    a checkpoint's files are written (``WRITING``)."""

    steps: int
    phase: str
    delay: float = 0.0


def drawn(seed: int, count: int) -> list[tuple[Moment, str]]:
    """The moments of a seed, with whom to kill; every phase comes equally often."""
    draw = random.Random(seed)
    phases = [PHASES[i % len(PHASES)] for i in range(count)]
    draw.shuffle(phases)
    delays = [0.0 if phase == WRITING else draw.uniform(0, 0.05) for phase in phases]
    return [
        (Moment(draw.randrange(2), phase, delay), draw.choice(VICTIMS))
        for phase, delay in zip(phases, delays, strict=True)
    ]


def strike(run: tiny.Run, run_dir: Path, moment: Moment, victim: str) -> None:
    """Wait until the moment has come and kill; fails when the run ends before."""
    begun, started = saved_step(run_dir), time.time()
    run.wait_for(f"{moment.steps} more steps", lambda: saved_step(run_dir) >= begun + moment.steps, PATIENCE)
    ranks = [run.wait_for("the ranks", lambda rank=rank: run.rank(rank), PATIENCE) for rank in (0, 1)]
    name, folder = Path(f"/proc/{ranks[0]}/comm"), run_dir / "checkpoints"

    def come() -> bool:
        if moment.phase != WRITING:
            return name.read_text().strip() == moment.phase
        new = [f for f in folder.glob("step_*") if f.stat().st_ctime > started]  # not what a kill before has left
        return any(any(f.iterdir()) and not (f / checkpoint.COMPLETE).exists() for f in new)

    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(OSError):  # a process ends, an old folder goes
            if come():
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
    """Steps of the newest complete checkpoint, 0 without one."""
    latest = checkpoint.latest(run_dir / "checkpoints")
    return int(latest.name.removeprefix("step_")) if latest else 0


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without what a clock or the memory's use gave."""
    measured = ("time/", "throughput/", "memory/", records.TOKENS_PER_SECOND)
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in rows]


def differences(alone: Path, killed: Path, steps: int) -> list[str]:
    """What of the two runs' ends is not the same."""
    found = []
    rows = [timeless(list(records.read_rows(run_dir / "metrics.jsonl"))) for run_dir in (alone, killed)]
    found += [f"metrics of step {a['step']}" for a, b in zip(*rows, strict=False) if a != b]
    if len(rows[0]) != len(rows[1]):
        found.append(f"{len(rows[1])} rows of metrics, {len(rows[0])} without kills")
    for file in ("samples.jsonl", "hf/model.safetensors"):
        if (alone / file).read_bytes() != (killed / file).read_bytes():
            found.append(file)
    whole, its = (stored(run_dir / "checkpoints" / f"step_{steps:06d}") for run_dir in (alone, killed))
    found += [name for name in whole.keys() | its.keys() if name not in whole or name not in its]
    found += [name for name, tensor in whole.items() if name in its and not torch.equal(tensor, its[name])]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--moments", type=int, default=20)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        twin, alone, killed = Path(place), Path(place) / "alone", Path(place) / "killed"
        tiny.make(twin)
        print("a run that is left alone", flush=True)
        tiny.complete(tiny.overrides(twin, alone, *OPTIONS), PATIENCE)
        for number, (moment, victim) in enumerate(drawn(asked.seed, asked.moments), start=1):
            if saved_step(killed) >= STEPS - 2:
                sys.exit(f"error: the run is over before moment {number}: raise STEPS")
            run = tiny.Run(tiny.overrides(twin, killed, *OPTIONS, f"resume={number > 1}"))
            try:
                strike(run, killed, moment, victim)
                run.output(120)
                remains = run.remains(60)
            finally:
                run.kill_all()
            print(f"{number:3d}  {victim} killed in {moment.phase}, {saved_step(killed)} steps saved", flush=True)
            if remains != ({}, set()):
                sys.exit(f"error: left behind: {remains}")
        tiny.complete(tiny.overrides(twin, killed, *OPTIONS, "resume=true"), PATIENCE)
        if found := differences(alone, killed, STEPS):
            sys.exit(f"error: not as the run left alone: {', '.join(found)}")
        print(f"seed {asked.seed}: after {asked.moments} kills the same metrics, samples and weights, bit for bit")


if __name__ == "__main__":
    main()
