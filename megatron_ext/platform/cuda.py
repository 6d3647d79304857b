"""CUDA: NCCL, Transformer Engine modules, fused kernels. Unproven until run on a GPU, see docs/gpu_checks.md."""

import functools
import os
from typing import Any

import torch

from megatron_ext.platform import features

name = "cuda"
backend = "nccl"


def activate() -> None:
    """Bind this process to its GPU. Raises RuntimeError when there is none or the local rank has no device."""
    # Megatron-Core overlaps tensor-parallel communication correctly only with a single hardware queue. CUDA reads the
    # variable when it starts, which the next call may do.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if not torch.cuda.is_available():
        raise RuntimeError("cluster.platform=cuda: no CUDA device is visible; use cluster=local_cpu on this machine")
    local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise RuntimeError(f"local rank {local_rank} but only {visible} visible GPUs: start at most one rank per GPU")
    # A single visible device means that the launcher bound one GPU to each task (srun --gpus-per-task=1).
    torch.cuda.set_device(local_rank if visible > 1 else 0)
    _use_torch_s_cudnn()
    _rotary_per_token()


def _use_torch_s_cudnn() -> None:
    """Have Transformer Engine load the cuDNN that torch brings; it looks into CUDNN_HOME first, then into toolkits."""
    folder = features.cudnn_folder()
    if folder is not None:
        os.environ["CUDNN_HOME"] = folder


def device() -> torch.device:
    """Where the tensors of this rank are."""
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


def layer_specs(config: Any, virtual_stage: int | None = None) -> Any:
    """Transformer Engine layers: fused norm + linear, THD flash attention, FP8 when ``config.fp8`` is set."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layers = [layer] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)


def encoder_layer(config: Any) -> Any:
    """A bidirectional Transformer Engine layer, for vision towers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.enums import AttnMaskType

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    return layer


def _rotary_per_token() -> None:
    """Give Transformer Engine's packed rotary kernel one position per token (``megatron_ext.packed``, mRoPE, towers).

    The kernel counts positions from the start of each sequence. If the pack is passed as one sequence, each token has
    a position of its own.
    """
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    kernel = rope_utils.fused_apply_rotary_pos_emb_thd

    @functools.lru_cache(maxsize=64)
    def one_sequence(tokens: int, on: torch.device) -> torch.Tensor:
        """Kept, since a copy from the host in each layer would make the host wait for the device."""
        return torch.tensor([0, tokens], dtype=torch.int32, device=on)

    def rotary(
        t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, interleaved: bool = False, **context: int
    ) -> torch.Tensor:
        """t [tokens, heads, head_dim] rotated by freqs [tokens, 1, 1, head_dim]."""
        return kernel(t, one_sequence(t.shape[0], t.device), freqs, interleaved=interleaved)

    rope_utils.fused_apply_rotary_pos_emb_thd = rotary


def rng_state() -> torch.Tensor:
    """The state of the generator that dropout and sampling on this device use."""
    return torch.cuda.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore what ``rng_state`` returned."""
    torch.cuda.set_rng_state(state)


def to_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous copies in pinned memory, which torch reuses for the next copies."""
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()
    return copies


def empty_cache() -> None:
    """Give freed memory back to the device, for other processes on it."""
    torch.cuda.empty_cache()


def take_memory_peak() -> int | None:
    """Bytes that torch's allocator held at most since the last call."""
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peak


def peak_flops() -> float | None:
    """Dense BF16 FLOP/s of this rank's GPU, None for one that the table lacks."""
    return features.peak_flops(torch.cuda.get_device_name())


def machine() -> str:
    """Name and count of the visible GPUs."""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
