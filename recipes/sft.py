"""Supervised fine-tuning: next-token loss on response tokens only."""

from typing import Any

import torch

from megatron_ext import optimizer, steps
from megatron_ext.packing import MicroBatch, PackedSequence
from recipes.algorithms.aggregation import sequence_mean_token_mean
from recipes.data import prompts
from recipes.data.episodes import episode_tokens
from recipes.session import Session


def fit(session: Session) -> list[dict[str, Any]]:
    """Run the stage's steps; returns one {step, loss, grad_norm} per step. The weights stay in the session's model."""
    config = session.config.stage.sft
    assert config is not None
    rows = prompts.load_rows(session.config.data.sft, prompts.SFT_FIELDS)
    optim, schedule = session.build_optimizer(config, config.steps)
    history = []
    for step in range(config.steps):
        batch = prompts.shuffled(rows, step * config.rows_per_step, config.rows_per_step, session.config.seed)
        answers, learnt = zip(*(episode_tokens(session.tokenizer, row) for row in batch), strict=True)
        of_learnt = [iter(weight) for weight in sequence_mean_token_mean([sum(own) for own in learnt])]
        weights = [[next(w) if own else 0.0 for own in each] for w, each in zip(of_learnt, learnt, strict=True)]
        asked = [session.prompts(row) for row in batch]
        sequences = [
            PackedSequence(list(a.prompt.token_ids), answer, {"weight": weight}, a.vision)
            for a, answer, weight in zip(asked, answers, weights, strict=True)
        ]
        metrics = steps.accumulate_gradients(session.model, session.micro_batches(sequences), next_token_loss)
        norm = optimizer.step(optim, schedule)
        history.append({"step": step + 1, "loss": metrics["loss"], "grad_norm": norm})
        session.display.progress(step + 1, config.steps, f"loss {metrics['loss']:.3f}")
    return history


def next_token_loss(log_probs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Weighted negative log-likelihood of the response tokens."""
    return -(log_probs * batch.values["weight"]).sum(), {}
