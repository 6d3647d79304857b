"""Settings of the stages: what a launch trains, supervised stages, PPO's critic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_ext.optimizer_settings import ScheduleConfig
from megatron_ext.settings import COUNT, FREE, setting
from recipes.data.source_spec import parse_sources

STAGES = ("sft", "reward_model", "value_model", "rl")
# Models with a head in place of the output layer. No other part of a launch could use them.
WITH_HEAD = ("reward_model", "value_model")
EPOCHS = "(0, 1e6]"


@dataclass
class SftConfig(ScheduleConfig):
    """On data.sft: packed, with images; the loss is on the assistant's tokens only."""

    judge: str | None = setting(
        "a judge's template: data.sft holds its questions, answers and labels; null for ordinary SFT"
    )
    epochs: float | None = setting("passes over data.sft, or null and steps", range=EPOCHS)
    steps: int | None = setting("optimiser steps, or null and epochs", range=COUNT)
    rows_per_step: int = setting("rows of a step, all ranks together", range=COUNT, unit="rows")
    aggregation: str = setting(
        "token losses to one; sequence_mean_token_mean counts every answer alike",
        choices=("token_mean", "sequence_mean_token_mean"),
    )
    held_out: str | None = setting("source of rows whose loss is reported; null for none")
    held_out_every: int = setting(
        "steps between two losses of the held-out rows; also at the end", range=COUNT, on_resume=FREE
    )


@dataclass
class RewardModelConfig(ScheduleConfig):
    """A Bradley-Terry reward model on the model's decoder, exported with a scalar head that `vllm serve` serves."""

    pairs: str = setting("source of rows with prompt (or messages), chosen and rejected")
    held_out: str = setting("source of pairs whose accuracy is reported")
    held_out_every: int = setting(
        "steps between two accuracies of the held-out pairs; also at the end", range=COUNT, on_resume=FREE
    )
    epochs: float | None = setting("passes over the pairs, or null and steps", range=EPOCHS)
    steps: int | None = setting("optimiser steps, or null and epochs", range=COUNT)
    pairs_per_step: int = setting("pairs of a step, all ranks together", range=COUNT, unit="pairs")


@dataclass
class ValueModelConfig(ScheduleConfig):
    """A value model: from a prompt and the beginning of a response, the final score of each principle."""

    principles: dict[str, list[str]] = setting(
        "a principle, and the verifiers whose mean score is the response's; an empty list leaves the principle out"
    )
    rollouts: Any = setting("source, or sources, of scored responses: samples of runs whose prompts data.prompts has")
    random_prefixes: int = setting(
        "prefixes of a response at random places, beside those at segment ends", range="[0, 1e6]"
    )
    held_out_share: float = setting("share of the prompts whose responses are only evaluated", range="(0, 1)")
    held_out_rollouts: int = setting(
        "responses that are evaluated at most, drawn from those of the held-out prompts", range=COUNT, unit="responses"
    )
    held_out_every: int = setting(
        "steps between two evaluations of the held-out responses; also at the end", range=COUNT, on_resume=FREE
    )
    epochs: float | None = setting("passes over the other responses, or null and steps", range=EPOCHS)
    steps: int | None = setting("optimiser steps, or null and epochs", range=COUNT)
    rollouts_per_step: int = setting("responses of a step, all ranks together", range=COUNT, unit="responses")


@dataclass
class StageConfig:
    """What one launch does."""

    name: str = setting("the stage's name, and its folder below the recipe's")
    trains: list[str] = setting("what is trained, in this order", choices=STAGES)
    after: str | None = setting("the stage whose exported model this one starts from; null for none")
    evaluates: bool = setting("whether the policy answers data.evaluation before and after")
    ladder: list[str] = setting("stages that are launched one after the other")
    sft: SftConfig = setting("the SFT stage")
    reward_model: RewardModelConfig = setting("the reward model's stage")
    value_model: ValueModelConfig = setting("the value model's stage")


@dataclass
class CriticConfig(ScheduleConfig):
    """PPO's critic: on the policy's ranks and in its layout, where the advantage needs values."""

    path: str | None = setting(
        "Hugging Face folder of a language model or of one with a scalar head; null for the policy's first weights"
    )
    warmup_steps: int = setting("first steps in which the critic alone is trained", range="[0, 1e9]", unit="steps")
    offload: bool = setting(
        "GPU: critic and policy's optimiser take turns, the other one is on the host", on_resume=FREE
    )


def check_supervised(stage: StageConfig, sequence_multiple: int) -> None:
    """Raises ValueError for impossible settings of the stages that learn from data alone.

    ``sequence_multiple``: the number of sequences of a step must be a multiple of this.
    """
    if "sft" in stage.trains:
        _check_length("stage.sft", stage.sft)
        if stage.sft.held_out is not None:
            _check_source("stage.sft.held_out", stage.sft.held_out)
        _check_multiple("stage.sft.rows_per_step", stage.sft.rows_per_step, sequence_multiple)
    if "reward_model" in stage.trains:
        _check_length("stage.reward_model", stage.reward_model)
        _check_source("stage.reward_model.held_out", stage.reward_model.held_out)
        _check_source("stage.reward_model.pairs", stage.reward_model.pairs)
        _check_multiple("stage.reward_model.pairs_per_step", stage.reward_model.pairs_per_step, sequence_multiple)
    if "value_model" in stage.trains:
        path = "stage.value_model"
        _check_length(path, stage.value_model)
        if not learned_principles(stage.value_model.principles):
            raise ValueError(
                f"{path}.principles={stage.value_model.principles}: give at least one principle a verifier, for "
                "example {safety: [safety]}"
            )
        _check_source(f"{path}.rollouts", stage.value_model.rollouts)
        _check_multiple(f"{path}.rollouts_per_step", stage.value_model.rollouts_per_step, sequence_multiple)


def learned_principles(principles: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """``stage.value_model.principles`` without the principles that have no verifier."""
    return {name: list(verifiers) for name, verifiers in principles.items() if verifiers}


def _check_length(path: str, settings: SftConfig | RewardModelConfig | ValueModelConfig) -> None:
    if (settings.steps is None) == (settings.epochs is None):
        raise ValueError(
            f"{path}.steps={settings.steps}, {path}.epochs={settings.epochs}: give one of them, null the other"
        )


def _check_source(path: str, source: Any) -> None:
    try:
        parse_sources(source)
    except ValueError as error:
        raise ValueError(f"{path}={error}") from error


def _check_multiple(path: str, size: int, multiple: int) -> None:
    if size % multiple:
        raise ValueError(f"{path}={size}: use a multiple of {multiple}, the data-parallel ranks")
