"""A value model: it predicts the final score of each principle from a prompt and a prefix of a response.

Training is prefix regression. The targets of every chosen prefix are the final scores of its response. So the value of
a prefix learns the mean score of the responses that begin with it (Yang and Klein, NAACL 2021, arXiv 2104.05218; Liu et
al. 2024, arXiv 2409.17819). All prefixes of a response go through the model in one pass: with causal attention the
hidden state after a prefix is the one that a server computes when it is asked for the value of that prefix.

Scores are in [0, 1], so a value is the sigmoid of an output. The loss is the binary cross-entropy with the score as its
target. Like the squared error it is minimal where the value is the mean score, but its gradient does not vanish where
the sigmoid is flat. transformers uses this loss for ``problem_type`` "multi_label_classification", with which vLLM's
``classify`` returns the sigmoid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megatron_ext import forward_backward
from megatron_ext.batch import TokenBatch
from megatron_ext.packing import MicroBatch
from recipes.config import sequence_multiple
from recipes.config.stages import learned_principles
from recipes.data.row_order import shuffled
from recipes.data.rows import load_rows
from recipes.data.shared_processing import process
from recipes.data.sources import Row, RowsById
from recipes.data.value_examples import WEIGHT, load_rollouts, prefix_batch, score_column
from recipes.evaluation import value_accuracy
from recipes.run import records
from recipes.run.run import Run
from recipes.training import supervised
from recipes.training.policy import Policy
from recipes.training.setup import Training

# The prefixes that are evaluated, as percentages of the response's tokens; 0 is the prompt alone.
PERCENTAGES = (0, 25, 50, 75, 100)


def fit(training: Training, run: Run) -> None:
    """Collective: train a value model by the settings of ``stage.value_model``.

    At the end writes the accuracy on the responses to held-out prompts, and the values of these responses, to
    ``value_model.json``.
    """
    config = training.config
    policy = training.policy
    settings = config.stage.value_model
    principles = learned_principles(settings.principles)
    processor = training.processor
    prompts = load_rows(config.data.prompts)
    rollouts = load_rollouts(settings.rollouts, prompts, principles, settings.held_out_share, config.seed)
    num_held_out = min(settings.held_out_rollouts, len(rollouts.held_out))
    held_out_rows = shuffled(rollouts.held_out, 0, num_held_out, config.seed)
    # Padded with the first row to a multiple of sequence_multiple, so that the ranks can share the batch.
    filled = [*held_out_rows, *held_out_rows[:1] * (-num_held_out % sequence_multiple(config))]
    by_id = RowsById(prompts)
    report: dict[str, Any] = {}

    def make_batch(rows: Sequence[Row]) -> TokenBatch:
        answered = [by_id[row["prompt_id"]] for row in rows]
        return prefix_batch(
            processor.tokenizer,
            rows,
            process(processor, answered, config.precision.dtype, run.control),
            principles=list(principles),
            thinking_marks=config.rollout.thinking_marks,
            random_prefixes=settings.random_prefixes,
            seed=config.seed,
            max_tokens=config.parallel.micro_batch_tokens,
        )

    def held_out() -> dict[str, Any]:
        report.update(evaluate(policy, make_batch(filled), held_out_rows, list(principles)))
        return held_out_metrics(report)

    task = supervised.Task(
        settings=settings,
        rows=rollouts.trained,
        rows_per_step=settings.rollouts_per_step,
        make_batch=make_batch,
        loss=partial(prefix_loss, principles=list(principles)),
        together=1,
        metrics=("squared_error",),
        batch_metrics=lambda batch: {"trained_prefixes": int((batch.columns[WEIGHT] > 0).sum())},
        held_out=held_out,
    )
    supervised.fit(task, policy, run, config.seed)
    if not report:  # all steps were done before this launch
        held_out()
    if run.rank == 0:
        records.write_json(run.folder / "value_model.json", report)


def prefix_loss(
    outputs: torch.Tensor, batch: MicroBatch, *, principles: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The weighted sums of the cross-entropies and of the squared errors of the micro-batch's prefixes.

    ``outputs`` [R] or [R, principles] are the values before the sigmoid. The weights are those of ``prefix_batch``, so
    the sum over the micro-batches of all ranks is a mean. A principle without a score has no loss.
    """
    scores = torch.stack([batch.values[score_column(principle)] for principle in principles], dim=1)
    cross_entropies, squared_errors = losses(outputs.view(scores.shape), scores)
    weights = batch.values[WEIGHT].unsqueeze(1)
    metrics = {"squared_error": (weights * squared_errors.detach()).sum()}
    return (weights * cross_entropies).sum(), metrics


def losses(outputs: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The cross-entropies and the squared errors, both [R, principles]. They are 0 where the score is NaN."""
    is_missing = scores.isnan()
    targets = scores.masked_fill(is_missing, 0.0)
    cross_entropies = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    squared_errors = (outputs.sigmoid() - targets) ** 2
    return cross_entropies.masked_fill(is_missing, 0.0), squared_errors.masked_fill(is_missing, 0.0)


def evaluate(policy: Policy, batch: TokenBatch, rows: Sequence[Row], principles: Sequence[str]) -> dict[str, Any]:
    """Collective: evaluate the present weights on held-out responses.

    Returns the loss, the accuracy of the values for each principle and each prefix of ``PERCENTAGES``, and these values
    and the scores of each response. The first responses of the batch are those of ``rows``; padding may follow.
    """
    micro_batches = policy.micro_batches(batch)
    gathered = forward_backward.all_values(policy.model, micro_batches, len(batch.response_tokens))
    outputs = gathered.view(-1, len(principles))

    end = int(batch.response_offsets[len(rows)])
    scores = np.stack([batch.columns[score_column(principle)] for principle in principles], axis=1)[:end]
    weights = torch.from_numpy(batch.columns[WEIGHT][:end]).double().unsqueeze(1)
    cross_entropies, _ = losses(outputs[:end], torch.from_numpy(scores))
    is_scored = torch.from_numpy(~np.isnan(scores))
    loss = float((weights * cross_entropies).sum() / (weights * is_scored).sum())

    # prefix_batch adds one token to each response: the value before this token is that of the complete response.
    lengths = batch.response_lengths[: len(rows)] - 1
    prefix_lengths = -(-np.outer(lengths, PERCENTAGES) // 100)  # rounded up
    places = batch.response_offsets[: len(rows), None] + prefix_lengths
    values = outputs.double().sigmoid().numpy()[places]  # [rows, percentages, principles]
    return {
        "loss": loss,
        "principles": {
            principle: accuracies(values[:, :, place], rows, principle) for place, principle in enumerate(principles)
        },
        "percentages": PERCENTAGES,
        "responses": [
            {
                "sample": row["sample"],
                "scores": row["scores"],
                "values": {principle: of_row[:, place].tolist() for place, principle in enumerate(principles)},
            }
            for row, of_row in zip(rows, values, strict=True)
        ],
    }


def accuracies(values: np.ndarray, rows: Sequence[Row], principle: str) -> dict[str, Any]:
    """Percentage → the accuracy (``value_accuracy.accuracy``) of the values [rows, percentages].

    Only rows with a score for the principle count. Empty where no row has one.
    """
    scored = [i for i, row in enumerate(rows) if principle in row["scores"]]
    if not scored:
        return {}
    scores = [rows[i]["scores"][principle] for i in scored]
    prompts = [rows[i]["prompt_id"] for i in scored]
    return {
        str(percentage): value_accuracy.accuracy(values[scored, place], scores, prompts)
        for place, percentage in enumerate(PERCENTAGES)
    }


def held_out_metrics(report: dict[str, Any]) -> dict[str, Any]:
    """The loss and the measures of a report as metrics, such as ``held_out_auc/safety/50``."""
    metrics: dict[str, Any] = {"held_out_loss": report["loss"]}
    for principle, by_percentage in report["principles"].items():
        for percentage, accuracy in by_percentage.items():
            for measure in (*value_accuracy.MEASURES, "ranked"):
                estimate = accuracy[measure]
                metrics[f"held_out_{measure}/{principle}/{percentage}"] = None if estimate is None else estimate["mean"]
    return metrics
