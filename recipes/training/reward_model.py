"""A Bradley-Terry reward model: a language model with a scalar head that learns to score the better answer higher.

The probability that an answer is preferred is σ(r_chosen − r_rejected) (Bradley and Terry, Biometrika 39, 1952); the
loss is its negative logarithm, the mean over pairs (Ouyang et al. 2022, arXiv 2203.02155, eq. 1).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext import batch as batches
from megatron_ext import forward_backward
from megatron_ext.batch import TokenBatch
from megatron_ext.packing import MicroBatch
from recipes.algorithms.sequences import sequences_of
from recipes.config import sequence_multiple
from recipes.data.preference_pairs import chosen_and_rejected
from recipes.data.processor import ProcessedPrompt
from recipes.data.rows import PAIR_FIELDS, load_rows, media_files, messages
from recipes.data.shared_processing import process
from recipes.data.sources import Row
from recipes.evaluation.statistics import mean_interval
from recipes.run import records
from recipes.run.run import Run
from recipes.training import supervised
from recipes.training.policy import Policy
from recipes.training.setup import Training


def fit(training: Training, run: Run) -> None:
    """Collective: train a reward model by the settings of ``stage.reward_model``.

    At the end writes the accuracy on the held-out pairs and all their scores to ``reward_model.json``.
    """
    config = training.config
    policy = training.policy
    processor = training.processor
    settings = config.stage.reward_model
    held_out_rows = load_rows(settings.held_out, PAIR_FIELDS)
    context_group = policy.parallel.context_group
    report: dict[str, Any] = {}

    def make_batch(rows: Sequence[Row]) -> TokenBatch:
        with_media = [row for row in rows if media_files(row)]
        prompts = process(processor, with_media, config.precision.dtype, run.control)
        by_id = {row["id"]: processed for row, processed in zip(with_media, prompts, strict=True)}
        return pairs_batch(processor.tokenizer, rows, by_id, config.parallel.micro_batch_tokens)

    def held_out() -> dict[str, float]:
        report.update(evaluate(policy, make_batch, held_out_rows, sequence_multiple(config)))
        return {
            "held_out_loss": report["loss"],
            "held_out_margin": report["margin"],
            "held_out_accuracy": report["accuracy"]["mean"],
        }

    task = supervised.Task(
        settings=settings,
        rows=load_rows(settings.pairs, PAIR_FIELDS),
        rows_per_step=settings.pairs_per_step,
        make_batch=make_batch,
        loss=partial(bradley_terry, pairs=settings.pairs_per_step, context_group=context_group),
        together=2,
        metrics=("accuracy", "margin"),
        batch_metrics=lambda batch: {},
        held_out=held_out,
    )
    supervised.fit(task, policy, run, config.seed)
    if not report:  # all steps were done before this launch
        held_out()
    if run.rank == 0:
        records.write_json(run.folder / "reward_model.json", report)


def pairs_batch(
    tokenizer: Any, rows: Sequence[Row], prompts: Mapping[str, ProcessedPrompt], max_tokens: int
) -> TokenBatch:
    """A batch with the chosen and then the rejected answer of each row.

    ``prompts`` has the processed prompts of the rows with images or clips, by id. Raises ConfigError naming a row that
    is too long.
    """
    return batches.concatenate(
        [chosen_and_rejected(tokenizer, row, prompts.get(row["id"]), max_tokens) for row in rows]
    )


def bradley_terry(
    values: torch.Tensor, batch: MicroBatch, *, pairs: int, context_group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """−log σ(r_chosen − r_rejected), summed over the micro-batch's pairs and divided by the update's number of pairs.

    ``values`` [R] are the scores whose tokens are on this context-parallel rank. The margin r_chosen − r_rejected is
    computed from complete sequences, without gradient. The gradient of each score is the derivative of the loss by the
    margin, −σ(−margin), with the sign of that score in the margin.
    """
    sequences = sequences_of(batch, context_group)
    scores = sequences.sum(values)
    margins = scores[0::2] - scores[1::2]
    slopes = -torch.sigmoid(-margins) / pairs
    slopes_of_scores = torch.stack([slopes, -slopes], dim=1).flatten()
    surrogate = (sequences.broadcast(slopes_of_scores, values) * values).sum()
    # Every context-parallel rank counts the same pairs.
    counted = pairs * (1 if context_group is None else dist.get_world_size(context_group))
    loss = F.softplus(-margins).sum() / counted
    metrics = {"accuracy": (margins > 0).double().sum() / counted, "margin": margins.sum() / counted}
    return surrogate - surrogate.detach() + loss.to(surrogate.dtype), metrics


def evaluate(
    policy: Policy, make_batch: Callable[[Sequence[Row]], TokenBatch], rows: Sequence[Row], multiple: int
) -> dict[str, Any]:
    """Collective: evaluate the present weights on held-out pairs.

    Returns the loss, the mean margin, the accuracy with its interval, and the scores. The accuracy is the share of
    pairs that are ranked right, where a tie counts half. The rows are padded to a multiple of ``multiple``.
    """
    missing = -len(rows) % multiple
    batch = make_batch([*rows, *[rows[0]] * missing])
    micro_batches = policy.micro_batches(batch, together=2)
    scores = forward_backward.all_values(policy.model, micro_batches, len(batch.response_tokens))
    scores = scores.double().view(-1, 2)[: len(rows)]
    margins = scores[:, 0] - scores[:, 1]
    ranked_right = (0.5 + 0.5 * margins.sign()).tolist()
    return {
        "accuracy": mean_interval(ranked_right, [str(messages(row)) for row in rows]),
        "loss": float(F.softplus(-margins).mean()),
        "margin": float(margins.mean()),
        "scores": [
            {"id": row["id"], "chosen": chosen, "rejected": rejected}
            for row, (chosen, rejected) in zip(rows, scores.tolist(), strict=True)
        ],
    }
