"""What transformers' Trainer makes of the same batches: losses, gradient norms and weights, in FP32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments


@dataclass(frozen=True)
class Trained:
    loss: list[float]
    grad_norm: list[float]
    learning_rate: list[float]
    weights: dict[str, torch.Tensor]


class InOrder(Trainer):
    """Takes the examples as they come, and keeps each step's loss as it is computed, not rounded for a log."""

    losses: list[float]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.losses.append(loss.item())
        return loss


class Norms(TrainerCallback):
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "grad_norm" in logs:
            self.rows.append(logs)


def train(
    model: Any, examples: list[dict[str, torch.Tensor]], rows_per_step: int, folder: Path, **options: Any
) -> Trained:
    """``examples``: all steps' rows one after the other, each as the model takes it (a batch of one). A step's loss
    is the mean over its rows' tokens (gradient accumulation with ``num_items_in_batch``), or, of a model that refuses
    that (``accepts_loss_kwargs``; Qwen2.5-VL's does), the mean over its rows of each one's token mean."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=rows_per_step,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        optim="adamw_torch",
        **options,
    )
    norms = Norms()
    trainer = InOrder(
        model, arguments, train_dataset=examples, data_collator=lambda rows: rows[0], callbacks=[norms]
    )  # fmt: skip
    trainer.losses = []
    trainer.train()
    parts = 1 if trainer.model_accepts_loss_kwargs else rows_per_step
    losses = [sum(trainer.losses[i : i + rows_per_step]) / parts for i in range(0, len(examples), rows_per_step)]
    return Trained(
        losses,
        [row["grad_norm"] for row in norms.rows],
        [row["learning_rate"] for row in norms.rows],
        {name: p.detach().clone() for name, p in model.named_parameters()},
    )
