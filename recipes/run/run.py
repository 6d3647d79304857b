"""The run on this rank: its records, checkpoints, clock and display, and whether it has been asked to end soon."""

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

# A rank counts as slow only if it takes more than the median by this many seconds: PHASE_FLOOR in a phase of the step,
# PROBE_FLOOR in the probe, which takes about a millisecond.
PHASE_FLOOR = 1.0
PROBE_FLOOR = 0.001


@dataclass
class Run:
    """A run, or a part of a run that another part follows (:meth:`part`), on this rank."""

    # The run's own folder, for events. A part has the same root but another folder.
    root: Path
    # The folder for records and checkpoints.
    folder: Path
    # A resumed run keeps the id that it began with.
    run_id: str
    rank: int
    # A gloo group of all ranks.
    control: dist.ProcessGroup
    # Number of processes of the job, those of the engines' nodes included.
    processes: int
    device: torch.device
    display: Display
    clock: PhaseClock
    # Empty except on rank 0.
    loggers: list[Logger]
    checkpoint_every: int
    checkpoints_kept: int
    slow_factor: float
    # Writes this launch's settings as those of the run. Called on rank 0.
    write_settings: Callable[[], None]
    # The savers of the run and its parts, so that the run can wait for their checkpoints when it ends.
    savers: list[Saver] = field(default_factory=list)
    tokens: int = 0  # of the present step (utilisation.throughput)
    flops: float = 0.0
    steps_made: int = 0  # in this launch
    ending: bool = False  # a rank was asked to end soon (recipes.run.preemption)

    def part(self, name: str) -> "Run":
        """A part of the run that another part follows, with records and checkpoints in a folder of that name."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return replace(self, folder=folder)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Count the wall time of the block as this phase of the step."""
        return self.clock.phase(name)

    def count(self, tokens: int = 0, flops: float = 0.0) -> None:
        """Add to the tokens of the present step and to the model FLOPs of its training phase, of all ranks together."""
        self.tokens += tokens
        self.flops += flops

    def log(self, text: str) -> None:
        """Show a line and write it to the log, on rank 0."""
        self.display.message(text)
        if self.rank == 0:
            logging.getLogger(__name__).warning(text)

    def event(self, kind: str, **details: Any) -> None:
        """Add an event to events.jsonl, on rank 0."""
        if self.rank == 0:
            records.event(self.root, kind, **details)

    def record(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Collective: record the metrics of a step, restart the clock and return the row.

        The row also has the seconds of the step's phases, its throughput and its memory. Rank 0 writes the row and logs
        the ranks that were slow. If any rank has been asked to end soon, all ranks learn it here.
        """
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
        """Prepare the records for training that goes on after ``step`` steps, from their checkpoint if above 0.

        Writes this launch's settings and drops the records of later steps, which the run repeats.
        """
        if self.rank != 0:
            return
        self.write_settings()
        records.truncate_after(self.folder / "metrics.jsonl", step)
        sample_files.drop_after(self.folder, step)

    def open_checkpoints(self) -> tuple["Checkpoints", Path | None]:
        """Collective: return the object that saves this part's checkpoints, and the newest intact one, if any."""
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
        """Raises CheckpointError where the last save has already failed."""
        self.saver.check()

    def after_step(self, step: int, total: int, state: Callable[[], "TrainingState"]) -> None:
        """Collective: begin to save ``state()`` after step ``step`` of ``total``, where a checkpoint is due.

        If the run has been asked to end soon, waits until the checkpoint is complete and raises Preempted.
        """
        due = step == total or step % self.run.checkpoint_every == 0 or self.run.ending
        if not due:
            return
        # The phase follows the record of this step, so its time is in the record of the next step.
        with self.run.phase("checkpoint"):
            # state() overwrites the host buffers that the last save writes from.
            self.saver.wait()
            saved = state()
            progress = {"run": self.run.run_id, **saved.progress}
            blobs = {} if saved.responses is None else {RESPONSES: saved.responses.to_bytes()}
            self.saver.save(step, saved.models, progress, blobs)
        self.run.event("checkpoint", step=step)
        if self.run.ending:
            self.saver.wait()
            raise preemption.Preempted(f"asked to end by {preemption.SIGNAL.name}: step {step} is saved")

    def wait(self) -> None:
        """Wait until the last save is complete. Raises CheckpointError where it failed."""
        self.saver.wait()


RESPONSES = "partial_rollouts.safetensors"  # a file in a checkpoint


@dataclass(frozen=True)
class TrainingState:
    """The content of a checkpoint."""

    # The models, by name.
    models: Mapping[str, Snapshot]
    # Plain JSON.
    progress: Mapping[str, Any]
    # The responses in flight.
    responses: TokenBatch | None = None


def read_responses(folder: Path) -> TokenBatch:
    """The responses that were in flight when a checkpoint was saved."""
    return TokenBatch.from_bytes((folder / RESPONSES).read_bytes())
