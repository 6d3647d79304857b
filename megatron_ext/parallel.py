"""Process groups: torch.distributed and Megatron-Core's model-parallel state."""

import math
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ext import layout as layouts
from megatron_ext import platform, worlds
from megatron_ext.layout import ParallelConfig

_control: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Parallel:
    """The parallel sizes in this world, and this rank's place in each group.

    Attributes:
        config: the sizes that the configuration sets.
        data: data-parallel size.
        tensor_rank, pipeline_rank, context_rank, data_rank: this rank's place in each group, from 0.
    """

    config: ParallelConfig
    data: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int

    @property
    def tensor(self) -> int:
        """Tensor-parallel size."""
        return self.config.tensor

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The context-parallel group, whose ranks divide each sequence. None without context parallelism."""
        return mpu.get_context_parallel_group() if self.config.context > 1 else None

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank is on the last pipeline stage."""
        return self.pipeline_rank == self.config.pipeline - 1

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank writes its weights on export. Other data- and context-parallel ranks hold copies."""
        return self.data_rank == 0 and self.context_rank == 0


def initialize(config: ParallelConfig, seed: int, timeout_seconds: float) -> Parallel:
    """Collective: join torch.distributed (from torchrun's variables) and create Megatron-Core's process groups.

    Args:
        config: the parallel sizes.
        seed: seed of Megatron-Core's RNG tracker.
        timeout_seconds: timeout of every collective. Megatron-Core takes whole minutes, so the timeout of its groups is
            rounded up.

    Raises:
        ValueError: the sizes do not fit the number of ranks.
    """
    worlds.begin(timeout_seconds)
    layouts.check(dist.get_world_size(), config)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout_seconds / 60),
    )
    model_parallel_cuda_manual_seed(seed)
    return Parallel(
        config=config,
        data=mpu.get_data_parallel_world_size(),
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        context_rank=mpu.get_context_parallel_rank(),
        data_rank=mpu.get_data_parallel_rank(),
    )


def control_group() -> dist.ProcessGroup:
    """Collective on the first call: return the gloo group of all ranks, for small messages on every platform."""
    global _control
    if _control is None:
        _control = worlds.new_group("gloo")
    return _control


def destroy() -> None:
    """Destroy all process groups and the communication buffers that use them."""
    global _control
    _control = None
    platform.current().end_overlap()
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
