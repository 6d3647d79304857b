"""Supervised fine-tuning: next-token loss on the assistant's tokens only, packed, with images, on any layout."""

from dataclasses import replace
from math import ceil

import torch

from megatron_ext import checkpoint, forward_backward
from megatron_ext.packing import MicroBatch
from recipes.algorithms.aggregation import AGGREGATIONS
from recipes.config import sequence_multiple
from recipes.data.row_order import shuffled
from recipes.data.sft_examples import Example, load_sft_rows, weighted_sequences
from recipes.run import records
from recipes.training.session import Session
from recipes.training.settings import RewardModelConfig, SftConfig


def fit(session: Session) -> None:
    """The steps of ``stage.sft`` over ``data.sft``; each has its line in metrics.jsonl. The weights stay in the model.

    Where the run has a checkpoint, the loop goes on behind the newest and ends with the bits of a run left alone.
    """
    config, settings, model = session.config, session.config.stage.sft, session.model
    rows = load_sft_rows(config.data.sft, settings.judge)
    held_out = [] if settings.held_out is None else load_sft_rows(settings.held_out, settings.judge)
    total, aggregation = total_steps(settings, settings.rows_per_step, len(rows)), AGGREGATIONS[settings.aggregation]
    optim, schedule = session.build_optimizer(settings, total)
    saver, newest = session.open_checkpoints()
    done = checkpoint.load(newest, model, optim, schedule) if newest else 0
    session.truncate_records(done)

    for step in range(done, total):
        saver.check()
        last = step + 1 == total
        with session.phase("data"):
            batch = shuffled(rows, step * settings.rows_per_step, settings.rows_per_step, config.seed)
            made = [session.example(row) for row in batch]
            micro_batches = session.micro_batches(weighted_sequences(made, aggregation))
        rate = schedule.get_lr({})
        with session.phase("train"):
            found = forward_backward.accumulate_gradients(model, micro_batches, next_token_loss)
            session.update(optim, schedule, found)
        metrics = {
            "step": step + 1,
            "epoch": (step + 1) * settings.rows_per_step / len(rows),
            "loss": records.value(found["loss"]),
            "grad_norm": records.value(found["grad_norm"]),
            "learning_rate": rate,
            "learnt_tokens": sum(sum(e.loss_mask) for e in made),
        }
        if held_out and (last or (step + 1) % settings.held_out_every == 0):
            with session.phase("held_out"):
                metrics["held_out_loss"] = held_out_loss(session, [session.example(row) for row in held_out])
        session.record(metrics)
        session.display.progress(step + 1, total, f"loss {found['loss']:.3f}")
        if session.saves(step + 1, total):
            with session.phase("checkpoint"):  # behind the step's record; its time shows in the next one
                models = {checkpoint.POLICY: checkpoint.snapshot(model, optim, schedule)}
                saver.save(step + 1, models, session.progress())
            session.saved(saver, step + 1)
    saver.wait()


def total_steps(settings: SftConfig | RewardModelConfig, per_step: int, rows: int) -> int:
    """``steps``, or as many as ``epochs`` need; the last one may go on into the next pass over the rows."""
    if settings.steps is not None:
        return settings.steps
    assert settings.epochs is not None
    return ceil(settings.epochs * rows / per_step)


def next_token_loss(log_probs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood of the response tokens."""
    return -(log_probs * batch.values["weight"]).sum(), {}


def held_out_loss(session: Session, held_out: list[Example]) -> float:
    """Collective: the mean over all learnt tokens of rows that are not trained on."""
    sequences = weighted_sequences(held_out, AGGREGATIONS["token_mean"])
    missing = -len(sequences) % sequence_multiple(session.config)
    weightless = replace(sequences[0], values={"weight": [0.0] * len(sequences[0].response)})
    batches = session.micro_batches(sequences + [weightless] * missing)
    found = forward_backward.log_probs(session.model, batches)
    sums = [
        {"loss": next_token_loss(*each)[0]} for each in zip(found, batches, strict=False)
    ]  # none off the last stage
    return forward_backward.reduce_metrics(session.model, sums)["loss"]
