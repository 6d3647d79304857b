"""The training loop of stages that learn from given answers: SFT, judges, reward models and value models."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from megatron_ext import forward_backward
from megatron_ext.batch import TokenBatch
from megatron_ext.checkpoint import POLICY
from megatron_ext.forward_backward import LossFunction
from recipes.config.stages import RewardModelConfig, SftConfig, ValueModelConfig
from recipes.data.row_order import shuffled
from recipes.data.sources import Row
from recipes.run import records
from recipes.run.run import Run, TrainingState
from recipes.training.flops import training_flops
from recipes.training.policy import Policy


@dataclass(frozen=True)
class Task:
    """The rows of a supervised stage, its loss and its metrics."""

    settings: SftConfig | RewardModelConfig | ValueModelConfig
    rows: Sequence[Row]
    # Number of rows in an update.
    rows_per_step: int
    # Tokenises rows.
    make_batch: Callable[[Sequence[Row]], TokenBatch]
    loss: LossFunction
    # Number of successive responses that stay in one micro-batch.
    together: int
    # Names of the loss function's sums that are recorded.
    metrics: tuple[str, ...]
    # Returns further metrics of a batch.
    batch_metrics: Callable[[TokenBatch], Mapping[str, Any]]
    # Collective: evaluates the present weights on held-out rows.
    held_out: Callable[[], Mapping[str, Any]] | None

    @property
    def steps(self) -> int:
        """The number of steps: ``steps``, or as many as ``epochs`` need.

        The last step may take some of its rows from the next pass over the rows.
        """
        if self.settings.steps is not None:
            return self.settings.steps
        assert self.settings.epochs is not None  # recipes.config.stages: one of the two is given
        return ceil(self.settings.epochs * len(self.rows) / self.rows_per_step)


def fit(task: Task, policy: Policy, run: Run, seed: int) -> None:
    """Train for the task's steps and write a row of metrics.jsonl for each. The trained weights stay in the model.

    Where the run has a checkpoint, the loop resumes from the newest one and ends with the same bits as an uninterrupted
    run.
    """
    total = task.steps
    policy.build_optimizer(task.settings, total)
    checkpoints, newest = run.open_checkpoints()
    first_step = policy.load(newest) if newest else 0
    run.begin(first_step)

    for step in range(first_step, total):
        checkpoints.check()
        with run.phase("data"):
            rows = shuffled(task.rows, step * task.rows_per_step, task.rows_per_step, seed)
            batch = task.make_batch(rows)
            micro_batches = policy.micro_batches(batch, task.together)
        learning_rate = policy.learning_rate
        with run.phase("train"):
            sums = forward_backward.accumulate_gradients(policy.model, micro_batches, task.loss)
            policy.update(sums)
        run.count(tokens=int(batch.lengths.sum()), flops=training_flops(policy.model, batch))
        metrics = {
            "step": step + 1,
            "epoch": (step + 1) * task.rows_per_step / len(task.rows),
            **{name: records.value(sums[name]) for name in ("loss", "grad_norm", *task.metrics)},
            "learning_rate": learning_rate,
            **task.batch_metrics(batch),
        }
        is_last = step + 1 == total
        if task.held_out is not None and (is_last or (step + 1) % task.settings.held_out_every == 0):
            with run.phase("held_out"):
                metrics |= task.held_out()
        run.record({**metrics, "skipped_updates": policy.guard.take_skipped()})
        run.display.progress(step + 1, total, progress_text(sums, task.metrics))
        checkpoints.after_step(step + 1, total, lambda: TrainingState({POLICY: policy.snapshot()}, policy.progress()))
    checkpoints.wait()


def progress_text(sums: Mapping[str, float], names: Sequence[str]) -> str:
    """The loss and the metrics of a step on one line."""
    return "  ".join([f"loss {sums['loss']:.3f}", *(f"{name} {sums[name]:.2f}" for name in names)])
