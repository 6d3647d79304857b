"""CUDA: NCCL, Transformer Engine modules, fused kernels. Unproven until run on a GPU, see docs/gpu_checks.md."""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_ext.platform import features

name = "cuda"
backend = "nccl"
# (tokens, hidden size) of the buffers for overlapped communication. None if there are none.
_overlap_shape: tuple[int, int] | None = None

ALLOCATOR_OPTIONS = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}  # the second is torch's former name
# Pinned tensors above this limit take exactly their own size, which the preflight counts, and go back to the host when
# they are freed. torch rounds smaller ones up to a power of two and keeps them for later requests. It must round every
# block that it keeps, because torch 2.13 gives a kept block to any request with the same next power of two, even to a
# larger one (pytorch #192722).
ALLOCATOR_SETTING = "pinned_max_cached_size_mb:64"


def activate() -> None:
    """Bind this process to its GPU. Raises RuntimeError if no GPU is visible or the local rank has no device."""
    if not ALLOCATOR_OPTIONS & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = ALLOCATOR_SETTING
    # Megatron-Core overlaps tensor-parallel communication correctly only with a single hardware queue. CUDA reads the
    # variable when it is initialised, and the next call may initialise it.
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
    """Make Transformer Engine load the cuDNN that is installed with torch.

    Transformer Engine looks into CUDNN_HOME first, then into toolkits.
    """
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
    """Transformer Engine layers: fused norm + linear, THD flash attention, FP8 when ``config.fp8`` is set.

    For packs with shared prompts the attention is torch's FlexAttention instead (``megatron_ext.flex``).
    """
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    from megatron_ext.platform.cuda_attention import DecoderAttention

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.submodules.core_attention = DecoderAttention
    layers = [layer] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TENorm)


def encoder_layer(config: Any) -> Any:
    """A bidirectional Transformer Engine layer, for vision towers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.enums import AttnMaskType

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.no_mask}
    return layer


def fuse_gradient_accumulation(module: torch.nn.Module) -> None:
    """Make Transformer Engine's matrix products add weight gradients directly to Megatron-Core's FP32 buffers.

    The configuration's ``gradient_accumulation_fusion`` would do the same, but Megatron-Core's output layer would then
    need an extension of Apex.
    """
    for layer in module.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            layer.fuse_wgrad_accumulation = True  # type: ignore[assignment]


def overlap_tensor_parallel(config: Any, tokens: int) -> None:
    """Collective over all ranks: create Transformer Engine's communication buffers.

    The buffers are for micro-batches of ``tokens`` tokens on a context-parallel rank. They are created once per
    process, and all models share them. Megatron-LM does the same in ``_initialize_tp_communicators``.

    Raises ValueError if an earlier model had another hidden size, and RuntimeError where the GPUs of a node have no
    NVLink multicast.
    """
    global _overlap_shape
    from transformer_engine.pytorch.module.base import UserBufferQuantizationMode, initialize_ub

    shape = (tokens, config.hidden_size)
    if _overlap_shape is not None:
        if _overlap_shape != shape:
            raise ValueError(
                f"parallel.tp_comm_overlap=true: its buffers have (tokens, hidden size) {_overlap_shape}, this model "
                f"needs {shape}: use a critic of the policy's hidden size, or parallel.tp_comm_overlap=false"
            )
        return
    modes = [UserBufferQuantizationMode.FP8 if config.fp8 else UserBufferQuantizationMode.NONE]
    if config.fp8 and config.first_last_layers_bf16:
        modes.append(UserBufferQuantizationMode.NONE)
    initialize_ub(
        shape=list(shape),
        tp_size=config.tensor_model_parallel_size,
        quantization_modes=modes,
        dtype=config.params_dtype,
        # NCCL would keep GPU memory allocated for the few messages at the start.
        bootstrap_backend="gloo",
    )
    _overlap_shape = shape


def end_overlap() -> None:
    """Destroy the communication buffers. Called when the process groups end."""
    global _overlap_shape
    if _overlap_shape is None:
        return
    from transformer_engine.pytorch.module.base import destroy_ub

    destroy_ub()
    _overlap_shape = None


def _rotary_per_token() -> None:
    """Give Transformer Engine's packed rotary kernel one position per token (``megatron_ext.packed``, mRoPE, towers).

    The kernel counts positions from the start of each sequence. If the pack is passed as one sequence, each token has
    a position of its own.
    """
    import megatron.core.models.common.embeddings.rope_utils as rope_utils

    kernel = rope_utils.fused_apply_rotary_pos_emb_thd

    @functools.lru_cache(maxsize=64)
    def one_sequence(tokens: int, on: torch.device) -> torch.Tensor:
        """[0, tokens], created on the device, because a copy of a list would make the host wait."""
        return torch.arange(0, tokens + 1, tokens, dtype=torch.int32, device=on)

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


def empty_on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors of the same shapes and dtypes, with undefined values, in pinned memory."""
    return [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]


def copy_to_host(tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    """Copy the tensors into ``copies``, which are from ``empty_on_host``. The copies are complete on return."""
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    torch.cuda.synchronize()


class Uploads:
    """Copies tensors from the host to the GPU. May be called from another thread than the one that computes.

    The target is the GPU and the current stream of the thread that creates this object (the computing thread). The
    copies are from pinned memory, on a stream of their own, and overlap with computation.
    """

    def __init__(self) -> None:
        self.device = device()
        self.computing = torch.cuda.current_stream()
        self.copying = torch.cuda.Stream()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Begin to copy a host tensor. The copy must not be used before the function from :meth:`begun` is called."""
        torch.cuda.set_device(self.device)  # a new thread begins with the first GPU
        # torch's allocator reuses the pinned memory only after the copy has read it.
        pinned = tensor.pin_memory()
        with torch.cuda.stream(self.computing):
            copy = torch.empty_like(pinned, device=self.device)
        # The copy's memory may be that of a freed tensor, which a kernel on the computing stream may still read.
        self.copying.wait_stream(self.computing)
        with torch.cuda.stream(self.copying):
            copy.copy_(pinned, non_blocking=True)
        copy.record_stream(self.copying)
        return copy

    def begun(self) -> Callable[[], None]:
        """Return the function that the computing thread must call before it uses the copies that have begun.

        The function makes the thread's stream wait for the copies. The thread itself does not wait.
        """
        copied = self.copying.record_event()
        return lambda: self.computing.wait_event(copied)


def uploads() -> Uploads:
    """See :class:`Uploads`."""
    return Uploads()


def empty_cache() -> None:
    """Give freed memory back to the device, for other processes on it."""
    torch.cuda.empty_cache()


def take_memory_peak() -> int | None:
    """The peak of the bytes that torch's allocator reserved since the last call."""
    peak = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return peak


def peak_flops() -> float | None:
    """Dense BF16 FLOP/s of this rank's GPU. None if the GPU is not in the table."""
    return features.peak_flops(torch.cuda.get_device_name())


def machine() -> str:
    """Name and count of the visible GPUs."""
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
