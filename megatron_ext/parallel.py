"""Process groups: torch.distributed and Megatron-Core's model-parallel state."""

from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_ext import platform

_control: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class Parallel:
    """The trainer's layout: group sizes and this rank's place. ``data`` is what is left of the world."""

    tensor: int
    pipeline: int
    sequence: bool
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1


def check(world: int, tensor: int, pipeline: int, sequence: bool) -> None:
    """Raises ValueError naming the field when the sizes do not fit the number of ranks."""
    for field, size in (("parallel.tensor", tensor), ("parallel.pipeline", pipeline)):
        if size < 1:
            raise ValueError(f"{field}={size}: use 1 or more")
    if world % (tensor * pipeline):
        raise ValueError(
            f"parallel.tensor={tensor} x parallel.pipeline={pipeline} does not divide the {world} ranks: "
            f"start a multiple of {tensor * pipeline} ranks (cluster.ranks) or change the layout"
        )
    if sequence and tensor == 1:
        raise ValueError("parallel.sequence=true needs parallel.tensor > 1: set parallel.sequence=false")


def initialize(tensor: int, pipeline: int, sequence: bool, seed: int, timeout_seconds: float) -> Parallel:
    """Collective: join torch.distributed (torchrun's variables) and build Megatron-Core's groups."""
    if not dist.is_initialized():
        dist.init_process_group(platform.current().backend, timeout=timedelta(seconds=timeout_seconds))
    check(dist.get_world_size(), tensor, pipeline, sequence)
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(seed)
    return Parallel(
        tensor=tensor,
        pipeline=pipeline,
        sequence=sequence,
        data=mpu.get_data_parallel_world_size(),
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        data_rank=mpu.get_data_parallel_rank(),
    )


def control_group() -> dist.ProcessGroup:
    """A gloo group of all ranks, for small messages on every platform."""
    global _control
    if _control is None:
        _control = dist.new_group(backend="gloo")
    return _control


def destroy() -> None:
    """Leave the process groups, so that gloo and NCCL threads end before the interpreter does."""
    global _control
    _control = None
    mpu.destroy_model_parallel()
    dist.destroy_process_group()
