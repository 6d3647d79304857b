"""CUDA: NCCL, Transformer Engine modules, fused kernels. Unproven until run on a GPU, see docs/gpu_checks.md."""

import os
from typing import Any

import torch

name = "cuda"
backend = "nccl"


def activate() -> None:
    """Bind this process to its GPU. Raises RuntimeError when there is none or the local rank has no device."""
    if not torch.cuda.is_available():
        raise RuntimeError("cluster.platform=cuda: no CUDA device is visible; use cluster=local_cpu on this machine")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise RuntimeError(f"local rank {local_rank} but only {visible} visible GPUs: start at most one rank per GPU")
    # A single visible device means that the launcher bound one GPU to each task (srun --gpus-per-task=1).
    torch.cuda.set_device(local_rank if visible > 1 else 0)
    # Megatron-Core overlaps tensor-parallel communication correctly only with a single hardware queue.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def config_options() -> dict[str, Any]:
    """TransformerConfig fields for Transformer Engine kernels."""
    return {
        "use_cpu_initialization": False,
        "apply_rope_fusion": True,
        "bias_activation_fusion": True,
        "bias_dropout_fusion": True,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": True,
        "persist_layer_norm": True,
    }


def layer_specs(config: Any) -> Any:
    """Transformer Engine layers: fused norm + linear, THD flash attention, FP8 when ``config.fp8`` is set."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=TENorm)


def rng_state() -> torch.Tensor:
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state)


def machine() -> str:
    """Name and count of the visible GPUs."""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
