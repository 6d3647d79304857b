"""The run on this rank: its records, checkpoints, clock, display, and whether it has to end soon."""

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext import checkpoint, platform
from megatron_ext.batch import TokenBatch
from megatron_ext.checkpoint import Saver, Snapshot
from megatron_ext.collectives import all_gather_json
from recipes.run import preemption, records, sample_files, utilisation
from recipes.run.clock import BETWEEN, PhaseClock
from recipes.run.display import Display
from recipes.run.loggers import Logger
from recipes.run.watchdog import probe, slow_ranks

# A rank is slow where it takes so many seconds more than the median: in a phase of the step, and in the probe, which
# takes about a millisecond.
PHASE_FLOOR = 1.0
PROBE_FLOOR = 0.001


@dataclass
class Run:
    """``folder`` is where records and checkpoints go; ``root`` is the run's own folder, for events. They differ in a
    part of the run that another part follows (:meth:`part`).

    ``control`` is a gloo group of all ranks. The job has ``processes``, those of the engines' nodes included.
    ``loggers`` are rank 0's. ``run_id`` of a resumed run is the one that it began with. ``write_settings`` makes this
    launch's settings those of the run, on rank 0. ``savers`` collects what writes checkpoints, so that the way out can
    wait for them.
    """

    root: Path
    folder: Path
    run_id: str
    rank: int
    control: dist.ProcessGroup
    processes: int
    device: torch.device
    display: Display
    clock: PhaseClock
    loggers: list[Logger]
    checkpoint_every: int
    checkpoints_kept: int
    slow_factor: float
    write_settings: Callable[[], None]
    savers: list[Saver] = field(default_factory=list)
    tokens: int = 0  # of the present step (utilisation.throughput)
    flops: float = 0.0
    steps_made: int = 0  # in this launch
    ending: bool = False  # a rank was asked to end soon (recipes.run.preemption)

    def part(self, name: str) -> "Run":
        """A part of the run that another one follows, with records and checkpoints in a folder of that name."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return replace(self, folder=folder)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the block's wall time as this phase of the step."""
        return self.clock.phase(name)

    def count(self, tokens: int = 0, flops: float = 0.0) -> None:
        """Add to the present step's tokens, and to the model FLOPs of its training phase; of all ranks together."""
        self.tokens += tokens
        self.flops += flops

    def log(self, text: str) -> None:
        """Rank 0 shows a line and writes it to its log."""
        self.display.message(text)
        if self.rank == 0:
            logging.getLogger(__name__).warning(text)

    def event(self, kind: str, **details: Any) -> None:
        """Rank 0 adds a line to events.jsonl."""
        if self.rank == 0:
            records.event(self.root, kind, **details)

    def record(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Collective: rank 0 writes a step's metrics with the seconds of its phases and how well it used the machines,
        and names the ranks that were slow; the clock starts anew. Returns the line. Here all ranks learn that one of
        them was asked to end soon."""
        self.clock.lap(BETWEEN)
        probe_laps = [("probe", probe(self.device))]
        of_this_rank = [self.clock.laps, probe_laps, preemption.preemption_requested(), utilisation.rank_memory()]
        of_ranks = all_gather_json(of_this_rank, self.control)
        self.ending = any(asked_to_end for _, _, asked_to_end, _ in of_ranks)
        slow_in_phases = slow_ranks([laps for laps, _, _, _ in of_ranks], self.slow_factor, PHASE_FLOOR)
        slow_alone = slow_ranks([probes for _, probes, _, _ in of_ranks], self.slow_factor, PROBE_FLOOR)
        for line in slow_in_phases + slow_alone:
            self.log(line)
        seconds = self.clock.seconds
        times = {f"time/{name}": taken for name, taken in seconds.items()}
        peak_flops = platform.current().peak_flops()
        row = {
            **metrics,
            **utilisation.throughput(
                self.tokens,
                self.flops,
                seconds,
                ranks=len(of_ranks),
                processes=self.processes,
                peak_flops=peak_flops,
            ),
            **utilisation.memory([memory for _, _, _, memory in of_ranks]),
            "time/step": sum(seconds.values()),
            **times,
        }
        self.tokens = 0
        self.flops = 0.0
        self.clock.restart()
        self.steps_made += 1
        if self.rank == 0:
            records.append_rows(self.folder / "metrics.jsonl", [row])
            prefix = "" if self.folder == self.root else f"{self.folder.name}/"
            for log in self.loggers:
                log(row, prefix)
        return row

    def begin(self, step: int) -> None:
        """Training goes on after ``step`` steps, whose checkpoint is loaded: write down this launch's settings, and
        drop the records of later steps, which it makes again."""
        if self.rank != 0:
            return
        self.write_settings()
        records.truncate_after(self.folder / "metrics.jsonl", step)
        sample_files.drop_after(self.folder, step)

    def open_checkpoints(self) -> tuple["Checkpoints", Path | None]:
        """Collective: what saves this part's checkpoints, and the newest complete one that is there."""
        folder = self.folder / "checkpoints"
        newest = checkpoint.newest_intact(folder, self.log)
        saver = Saver(folder, self.checkpoints_kept)
        self.savers.append(saver)
        return Checkpoints(self, saver), newest


@dataclass
class Checkpoints:
    """Saves the checkpoints of a part of the run."""

    run: Run
    saver: Saver

    def check(self) -> None:
        """Raises CheckpointError where the last save has failed by now."""
        self.saver.check()

    def after_step(self, step: int, total: int, state: Callable[[], "TrainingState"]) -> None:
        """Collective: begin to save ``state()`` after this many of ``total`` steps, where one is due.

        Raises Preempted when the run was asked to end soon and the checkpoint is complete.
        """
        due = step == total or step % self.run.checkpoint_every == 0 or self.run.ending
        if not due:
            return
        with self.run.phase("checkpoint"):  # follows the step's record, so its time shows in the next one
            self.saver.wait()  # the copies of the former state are overwritten
            saved = state()
            progress = {"run": self.run.run_id, **saved.progress}
            blobs = {} if saved.responses is None else {RESPONSES: saved.responses.to_bytes()}
            self.saver.save(step, saved.models, progress, blobs)
        self.run.event("checkpoint", step=step)
        if self.run.ending:
            self.saver.wait()
            raise preemption.Preempted(f"asked to end by {preemption.SIGNAL.name}: step {step} is saved")

    def wait(self) -> None:
        """Until the last save is complete. Raises CheckpointError where it failed."""
        self.saver.wait()


RESPONSES = "partial_rollouts.safetensors"  # in a checkpoint


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds: ``models`` by name, ``progress`` as plain JSON, and the responses that are in flight."""

    models: Mapping[str, Snapshot]
    progress: Mapping[str, Any]
    responses: TokenBatch | None = None


def read_responses(folder: Path) -> TokenBatch:
    """The responses that were in flight when a checkpoint was saved."""
    return TokenBatch.from_bytes((folder / RESPONSES).read_bytes())
