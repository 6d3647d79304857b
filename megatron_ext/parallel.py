"""Process groups: torch.distributed and Megatron-Core's model-parallel state."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ext import layout as layouts
from megatron_ext import platform
from megatron_ext.layout import ParallelConfig

_control: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Parallel:
    """The sizes of the groups, and this rank's place in them."""

    config: ParallelConfig
    data: int
    tensor_rank: int
    pipeline_rank: int
    context_rank: int
    data_rank: int

    @property
    def tensor(self) -> int:
        return self.config.tensor

    @property
    def context_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's sequences; None where it has them whole."""
        return mpu.get_context_parallel_group() if self.config.context > 1 else None

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.config.pipeline - 1

    @property
    def is_first_replica(self) -> bool:
        """Whether this rank's weights are the ones to write: data and context ranks hold the same."""
        return self.data_rank == 0 and self.context_rank == 0


def initialize(config: ParallelConfig, seed: int, timeout_seconds: float) -> Parallel:
    """Collective: join torch.distributed (torchrun's variables) and build Megatron-Core's groups."""
    if not dist.is_initialized():
        dist.init_process_group(platform.current().backend, timeout=timedelta(seconds=timeout_seconds))
    layouts.check(dist.get_world_size(), config)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        create_gloo_process_groups=False,
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
    """A gloo group of all ranks, for small messages on every platform."""
    global _control
    if _control is None:
        _control = dist.new_group(backend="gloo")
    return _control


def destroy() -> None:
    """Leave all process groups."""
    global _control
    _control = None
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
