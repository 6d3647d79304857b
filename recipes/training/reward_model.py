"""A Bradley-Terry reward model: a language model with a scalar head that learns to score the better answer higher.

The probability that an answer is preferred is σ(r_chosen − r_rejected) (Bradley and Terry, Biometrika 39, 1952); the
loss is its negative logarithm, the mean over pairs (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext import checkpoint, forward_backward
from megatron_ext.packing import MicroBatch, PackedSequence
from recipes.algorithms.sequences import Sequences
from recipes.config import sequence_multiple
from recipes.data import preference_pairs
from recipes.data.row_order import shuffled
from recipes.data.rows import PAIR_FIELDS, Row, load_rows, messages
from recipes.evaluation.statistics import mean_interval
from recipes.run import records
from recipes.training.session import Session
from recipes.training.sft import total_steps


def fit(session: Session) -> None:
    """The steps of ``stage.reward_model``; each has its line in metrics.jsonl. The weights stay in the model.

    Where the run has a checkpoint, the loop goes on behind the newest. At the end ``reward_model.json`` has the
    accuracy on the held-out pairs and every score of theirs.
    """
    config, settings, model = session.config, session.config.stage.reward_model, session.model
    rows = load_rows(settings.pairs, PAIR_FIELDS)
    held_out = load_rows(settings.held_out, PAIR_FIELDS)
    count, total = settings.pairs_per_step, total_steps(settings, settings.pairs_per_step, len(rows))
    loss = partial(bradley_terry, pairs=count, context_group=session.parallel.context_group)
    optim, schedule = session.build_optimizer(settings, total)
    saver, newest = session.open_checkpoints()
    done = checkpoint.load(newest, model, optim, schedule) if newest else 0
    session.truncate_records(done)
    report = judge(session, held_out) if done == total else {}

    for step in range(done, total):
        saver.check()
        last = step + 1 == total
        with session.phase("data"):
            batch = shuffled(rows, step * count, count, config.seed)
            micro_batches = session.micro_batches(both(session, batch), together=2)
        rate = schedule.get_lr({})
        with session.phase("train"):
            found = forward_backward.accumulate_gradients(model, micro_batches, loss)
            session.update(optim, schedule, found)
        metrics = {"step": step + 1, "epoch": (step + 1) * count / len(rows), "learning_rate": rate}
        metrics |= {name: records.value(found[name]) for name in ("loss", "grad_norm", "accuracy", "margin")}
        if last or (step + 1) % settings.held_out_every == 0:
            with session.phase("held_out"):
                report = judge(session, held_out)
            metrics |= {f"held_out_{name}": report[name] for name in ("loss", "margin")}
            metrics["held_out_accuracy"] = report["accuracy"]["mean"]
        session.record(metrics)
        session.display.progress(step + 1, total, f"loss {found['loss']:.3f}  accuracy {found['accuracy']:.2f}")
        if session.saves(step + 1, total):
            with session.phase("checkpoint"):  # behind the step's record; its time shows in the next one
                models = {checkpoint.POLICY: checkpoint.snapshot(model, optim, schedule)}
                saver.save(step + 1, models, session.progress())
            session.saved(saver, step + 1)
    saver.wait()
    if session.rank == 0:
        records.write_json(session.run_dir / "reward_model.json", report)


def both(session: Session, rows: Sequence[Row]) -> list[PackedSequence]:
    """Chosen and rejected of each row, one behind the other."""
    longest = session.config.parallel.micro_batch_tokens
    return [
        sequence for row in rows for sequence in preference_pairs.chosen_and_rejected(session.prompts, row, longest)
    ]


def bradley_terry(
    values: torch.Tensor, batch: MicroBatch, *, pairs: int, context_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """−log σ(r_chosen − r_rejected), summed over the micro-batch's pairs and divided by the update's.

    ``values`` [R]: the scores whose tokens are on this context-parallel rank. The margin is made of whole sequences,
    without gradient; each score takes the loss's derivative by it, −σ(−margin), with its sign.
    """
    sequences = Sequences(batch.lengths, context_group)
    scores = sequences.sum(values)
    margins = scores[0::2] - scores[1::2]
    slopes = -torch.sigmoid(-margins) / pairs
    surrogate = (sequences.spread(torch.stack([slopes, -slopes], dim=1).flatten(), values) * values).sum()
    parts = pairs * (1 if context_group is None else dist.get_world_size(context_group))  # which all count the same
    loss = F.softplus(-margins).sum() / parts
    metrics = {"accuracy": (margins > 0).double().sum() / parts, "margin": margins.sum() / parts}
    return surrogate - surrogate.detach() + loss.to(surrogate.dtype), metrics


def judge(session: Session, rows: Sequence[Row]) -> dict[str, Any]:
    """Collective: loss, mean margin, the share of pairs ranked right (ties count half) with its interval, scores."""
    missing = -len(rows) % sequence_multiple(session.config)
    sequences = both(session, [*rows, *[rows[0]] * missing])
    batches = session.micro_batches(sequences, together=2)
    found = forward_backward.values(session.model, batches)
    scores = (
        forward_backward.gather_tokens(session.model, batches, found, len(sequences)).double().view(-1, 2)[: len(rows)]
    )
    margins = scores[:, 0] - scores[:, 1]
    right = (0.5 + 0.5 * margins.sign()).tolist()
    return {
        "accuracy": mean_interval(right, [str(messages(row)) for row in rows]),
        "loss": float(F.softplus(-margins).mean()),
        "margin": float(margins.mean()),
        "scores": [
            {"id": row["id"], "chosen": chosen, "rejected": rejected}
            for row, (chosen, rejected) in zip(rows, scores.tolist(), strict=True)
        ],
    }
