"""The trainer's settings, from the configuration. Pure: a run is checked by them before it has any rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_ext.layout import Layout
from megatron_ext.precision import Precision

if TYPE_CHECKING:
    from recipes.config import Config


def layout(config: Config) -> Layout:
    c = config.parallel
    return Layout(
        tensor=c.tensor,
        pipeline=c.pipeline,
        virtual=c.virtual_pipeline,
        context=c.context,
        sequence=c.sequence,
        first_stage_layers=c.first_stage_layers,
        last_stage_layers=c.last_stage_layers,
    )


def precision(config: Config) -> Precision:
    c = config.precision
    return Precision(
        name=c.name,
        recipe=c.recipe,
        format=c.format,
        bf16_layers=c.bf16_layers,
        parameter_gather=c.parameter_gather,
    )


def has_critic(config: Config) -> bool:
    """Whether the algorithm trains one."""
    return config.algorithm.advantage in ("gae", "gae_whitened")


def data_parallel(config: Config) -> int:
    """Replicas of the trainer's model."""
    return config.cluster.ranks // layout(config).model_parallel


def sequence_multiple(config: Config) -> int:
    """A batch's sequences are a multiple of this: as many for each data-parallel rank, and as many micro-batches as the
    interleaved pipeline schedule wants can be made of them."""
    return data_parallel(config) * layout(config).micro_batch_multiple
