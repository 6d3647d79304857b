"""Supervised fine-tuning: next-token loss on the assistant's tokens only, packed, with images, in any layout."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_ext import batch as batches
from megatron_ext import forward_backward
from megatron_ext.batch import TokenBatch
from megatron_ext.packing import MicroBatch
from recipes.algorithms.aggregation import AGGREGATIONS, Aggregation, token_weights
from recipes.config import Config, sequence_multiple
from recipes.data.processor import ProcessedPrompt
from recipes.data.sft_examples import load_sft_rows, prompt_row, tokenize_example
from recipes.data.shared_processing import process
from recipes.data.sources import Row
from recipes.run.run import Run
from recipes.training import supervised
from recipes.training.policy import Policy
from recipes.training.setup import Training


def fit(training: Training, run: Run) -> None:
    """Collective: fine-tune the policy on ``data.sft`` by the settings of ``stage.sft``."""
    config = training.config
    policy = training.policy
    settings = config.stage.sft
    held_out_rows = [] if settings.held_out is None else load_sft_rows(settings.held_out, settings.judge)

    def make_batch(rows: Sequence[Row], aggregation: Aggregation = AGGREGATIONS[settings.aggregation]) -> TokenBatch:
        prompts = process(training.processor, [prompt_row(row) for row in rows], config.precision.dtype, run.control)
        return sft_batch(config, training.processor.tokenizer, rows, prompts, aggregation)

    def held_out() -> dict[str, float]:
        batch = make_batch(held_out_rows, AGGREGATIONS["token_mean"])
        return {"held_out_loss": held_out_loss(policy, batch, sequence_multiple(config))}

    task = supervised.Task(
        settings=settings,
        rows=load_sft_rows(config.data.sft, settings.judge),
        rows_per_step=settings.rows_per_step,
        make_batch=make_batch,
        loss=next_token_loss,
        together=1,
        metrics=(),
        batch_metrics=lambda batch: {"trained_tokens": int(batch.loss_mask.sum())},
        held_out=held_out if held_out_rows else None,
    )
    supervised.fit(task, policy, run, config.seed)


def sft_batch(
    config: Config, tokenizer: Any, rows: Sequence[Row], prompts: Sequence[ProcessedPrompt], aggregation: Aggregation
) -> TokenBatch:
    """A batch of the rows' processed prompts and answers, with the aggregation weights as the column ``weights``.

    Raises ConfigError naming a row that can't be used.
    """
    think_begin = config.rollout.thinking_marks[0]
    max_tokens = config.parallel.micro_batch_tokens
    examples = [
        tokenize_example(tokenizer, row, processed, think_begin, max_tokens)
        for row, processed in zip(rows, prompts, strict=True)
    ]
    batch = batches.build(
        [example.prompt for example in examples],
        [example.response for example in examples],
        loss_mask=[example.loss_mask for example in examples],
        vision=[example.vision for example in examples],
    )
    return batch.with_response_columns(weights=token_weights(aggregation, batch))


def next_token_loss(log_probs: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted negative log-likelihood of the response tokens."""
    return -(log_probs * batch.values["weights"]).sum(), {}


def held_out_loss(policy: Policy, batch: TokenBatch, multiple: int) -> float:
    """Collective: the weighted negative log-likelihood of rows that are not trained on.

    The batch is padded to a multiple of ``multiple`` sequences. The added sequences have the weight 0.
    """
    missing = -len(batch) % multiple
    if missing:
        filler = batch.select([0] * missing)
        filler = filler.with_response_columns(weights=np.zeros(len(filler)))
        batch = batches.concatenate([batch, filler])
    micro_batches = policy.micro_batches(batch)
    return forward_backward.loss_sums(policy.model, micro_batches, next_token_loss)["loss"]
