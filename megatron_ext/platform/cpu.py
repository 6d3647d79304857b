"""CPU: gloo, Megatron-Core's own tensor-parallel layers, torch SDPA, and the few patches Megatron-Core needs to run.

Megatron-Core 0.19 has no CPU device. Official switches are used where they exist (``use_cpu_initialization``, the
local layer specs, the fusion flags); ``PATCHES`` lists what has none. tests/megatron_ext/test_platform.py fails with
the name of the spot when an upgrade moves one.
"""

import os

os.environ["TORCH_COMPILE_DISABLE"] = "1"  # Megatron-Core compiles at import; on a CPU that costs more than it gives

import platform as host
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

name = "cpu"
backend = "gloo"

PATCHES = {
    "torch.cuda.current_device": "Megatron-Core allocates buffers on torch.cuda.current_device()",
    "torch.cuda.synchronize / current_stream": "called around pipeline communication and gradient reduction",
    "torch.cuda.get_rng_state / set_rng_state / manual_seed": "the tensor-parallel RNG tracker",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "writes the CUDA generator through torch._C",
    "megatron.core.optimizer.clip_grads.l2_norm_impl": "without TE or Apex: FP32 torch.norm, inexact on large tensors",
    "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb_thd": "TE's kernel for packed RoPE",
}

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaMeansCpu(TorchFunctionMode):
    """Megatron-Core writes ``device="cuda"``, ``.cuda()`` and compares ``Tensor.type()`` with CUDA names."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return _CUDA_TYPE_NAMES.get(args[0].dtype) or func(*args)
        if "device" in kwargs and "cuda" in str(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        elif func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str) and args[1].startswith("cuda"):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def activate() -> None:
    """Install the patches and the CPU kernels that Megatron-Core expects from Transformer Engine."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = _set_rng_state
    _CudaMeansCpu().__enter__()

    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    clip_grads.l2_norm_impl = _l2_norm
    rope_utils.fused_apply_rotary_pos_emb_thd = _rotary_packed


def _get_rng_state(device: Any = "cpu") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cpu") -> None:
    torch.set_rng_state(new_state)


def device() -> torch.device:
    return torch.device("cpu")


def config_options() -> dict[str, Any]:
    """TransformerConfig fields: every CUDA-only fusion off, packed RoPE by the function below."""
    return {
        "use_cpu_initialization": True,
        "apply_rope_fusion": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def layer_specs(config: Any) -> Any:
    """Megatron-Core's local layers with a norm that knows sequence parallelism and a core attention on torch SDPA."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import TransformerLayer

    submodules = get_gpt_layer_local_submodules(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    submodules.input_layernorm = RMSNorm
    submodules.pre_mlp_layernorm = RMSNorm
    submodules.self_attention.submodules.core_attention = PackedAttention
    layer = ModuleSpec(module=TransformerLayer, submodules=submodules)
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def rng_state() -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    torch.set_rng_state(state)


def machine() -> str:
    """Cores and processor model."""
    model = host.processor() or "CPU"
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), model)
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


class RMSNorm(torch.nn.Module):
    """RMS norm whose weight gradient is summed over the tensor-parallel group under sequence parallelism.

    Megatron-Core's torch wrapper refuses sequence parallelism; the attribute below is all that
    ``finalize_model_grads`` needs.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class PackedAttention(torch.nn.Module):
    """Causal attention over packed (THD) sequences: unpack to a padded batch, attend, pack again.

    Query [tokens, heads, head_dim], key and value [tokens, groups, head_dim], all of this rank, give
    [tokens, heads, head_dim]. Padding lies to the right of every sequence, so the causal mask alone keeps it out. Plain
    matrix products with an FP32 softmax: at a few hundred tokens four times as fast as torch's BF16 SDPA on a CPU.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        if config.context_parallel_size != 1:
            raise ValueError("context parallelism needs Transformer Engine's attention: use cluster.platform=cuda")
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        attn_mask_type: Any = None,
        attention_bias: Any = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        rows, batch, longest = _padded_rows(packed_seq_params)
        q, k, v = (
            _Unpack.apply(t, rows, batch * longest).view(batch, longest, *t.shape[1:]).transpose(1, 2)
            for t in (query, key, value)
        )
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        future = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype)
        return _Pack.apply((weights @ v).transpose(1, 2).reshape(batch * longest, *query.shape[1:]), rows)


class _Unpack(torch.autograd.Function):
    """Packed rows to their places among ``size`` zero rows. Places are distinct, so the backward is a plain gather:
    autograd's own backward of an index accumulates, which takes 50 times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, packed: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(rows)
        return packed.new_zeros(size, *packed.shape[1:]).index_copy_(0, rows, packed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return gradient.index_select(0, rows), None, None


class _Pack(torch.autograd.Function):
    """Inverse of ``_Unpack``."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.size = padded.shape[0]
        return padded.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.size, *gradient.shape[1:]).index_copy_(0, rows, gradient), None


def _padded_rows(packed: Any) -> tuple[torch.Tensor, int, int]:
    """(row of every packed token in the padded batch, sequences, longest); computed once per micro-batch."""
    found = getattr(packed, "padded_rows", None)
    if found is None:
        starts, longest = packed.cu_seqlens_q.long(), packed.max_seqlen_q
        sequence = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        rows = sequence * longest + torch.arange(int(starts[-1])) - starts[sequence]
        found = packed.padded_rows = (rows, len(starts) - 1, longest)
    return found


def _rotary_packed(
    t: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    cp_size: int = 1,
    cp_rank: int = 0,
    interleaved: bool = False,
) -> torch.Tensor:
    """Rotary embedding for packed sequences, t [tokens, heads, head_dim], freqs [max_len, 1, 1, head_dim].

    Same function as Transformer Engine's kernel of this name, in one gather instead of a loop over sequences.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    starts = cu_seqlens.long()
    position = torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1], starts.diff())
    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs[position], rotary_interleaved=interleaved).squeeze(1)


def _l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool) -> tuple[torch.Tensor, None]:
    """L2 norm over all tensors, accumulated in FP64 so that it does not depend on how gradients are sharded."""
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64) ** 2 for tensors in tensor_lists for t in tensors]
    total = torch.stack(squares).sum().sqrt()
    return total.to(torch.float32).reshape(1), None
