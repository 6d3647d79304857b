"""CPU: gloo, Megatron-Core's own tensor-parallel layers, attention in torch, and the patches that Megatron-Core needs.

Megatron-Core 0.19 has no CPU device. Official switches are used where they exist (``use_cpu_initialization``, the
local layer specs, the fusion flags). ``PATCHES`` lists the rest. If an upgrade moves a patched function,
tests/megatron_ext/test_platform.py fails and names it.

If Transformer Engine is installed, it is hidden. Otherwise Megatron-Core would use Transformer Engine's optimiser and
gradient clipping, which need a GPU.
"""

import os
import sys

# Megatron-Core compiles functions at import. On a CPU that takes longer than it saves.
os.environ["TORCH_COMPILE_DISABLE"] = "1"

import platform as host
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed import ProcessGroupGloo
from torch.overrides import TorchFunctionMode

name = "cpu"
backend = "gloo"

PATCHES = {
    "torch.compile": "Megatron-Core calls it at import: even switched off, that imports torch's inductor, for seconds",
    "torch.cuda.current_device": "Megatron-Core allocates buffers on torch.cuda.current_device()",
    "torch.cuda.synchronize / current_stream": "called around pipeline communication and gradient reduction",
    "torch.distributed.ProcessGroupGloo.__init__": "a transport for each group, whose thread wakes 100 times a second",
    "torch.cuda.get_rng_state / set_rng_state / manual_seed": "the tensor-parallel RNG tracker",
    "megatron.core.tensor_parallel.random._set_cuda_rng_state": "writes the CUDA generator through torch._C",
    "megatron.core.optimizer.clip_grads.l2_norm_impl": "without TE or Apex: FP32 torch.norm, inexact on large tensors",
    "megatron.core.models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb_thd": "TE's kernel for packed RoPE",
}

TRANSFORMER_ENGINE = "transformer_engine"

_gloo_init = ProcessGroupGloo.__init__

_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
}


class _CudaMeansCpu(TorchFunctionMode):
    """Redirect CUDA calls to the CPU.

    Megatron-Core uses ``device="cuda"`` and ``.cuda()``, and compares ``Tensor.type()`` with CUDA names.
    """

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
    """Install the patches and the CPU kernels that Megatron-Core expects from Transformer Engine.

    Raises RuntimeError if Transformer Engine has already been imported, because Megatron-Core then uses its kernels,
    which need a GPU.
    """
    if sys.modules.get(TRANSFORMER_ENGINE) is not None:
        raise RuntimeError(
            "cluster.platform=cpu: Transformer Engine is imported already; activate the platform before anything "
            "imports Megatron-Core"
        )
    # From now on an import of Transformer Engine fails as if it were not installed.
    sys.modules[TRANSFORMER_ENGINE] = None  # type: ignore[assignment]
    torch.compile = _uncompiled
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = _get_rng_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = _set_rng_state
    ProcessGroupGloo.__init__ = _init_gloo  # type: ignore[method-assign]
    _CudaMeansCpu().__enter__()

    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)
    clip_grads.l2_norm_impl = _l2_norm
    rope_utils.fused_apply_rotary_pos_emb_thd = _rotary_packed


def _uncompiled(model: Any = None, **options: Any) -> Any:
    """Replacement for ``torch.compile`` that returns the function itself. Also works as a decorator with options."""
    return model if model is not None else lambda function: function


@cache
def _transport() -> Any:
    return ProcessGroupGloo.create_default_device()


def _init_gloo(self: ProcessGroupGloo, store: Any, rank: int, size: int, timeout: timedelta) -> None:
    """Initialise like torch, but with one transport for all groups of a process.

    Each transport has a thread, and Megatron-Core creates many groups. Their threads took 3 % of two cores.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [_transport()]
    options._threads = 2
    options._timeout = timeout
    _gloo_init(self, store, rank, size, options)


def _get_rng_state(device: Any = "cpu") -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = "cpu") -> None:
    torch.set_rng_state(new_state)


def device() -> torch.device:
    """Where the tensors of this rank are."""
    return torch.device("cpu")


def config_options() -> dict[str, Any]:
    """TransformerConfig fields. All fusions that need CUDA are off. Packed RoPE is ``_rotary_packed``."""
    return {
        "use_cpu_initialization": True,
        "apply_rope_fusion": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
    }


def layer_specs(config: Any, virtual_stage: int | None = None) -> Any:
    """Megatron-Core's local layers with a norm for sequence parallelism and attention over packed sequences."""
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    layer = _layer(config, AttnMaskType.causal)
    layers = [layer] * get_num_layers_to_build(config, vp_stage=virtual_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def encoder_layer(config: Any) -> Any:
    """A bidirectional layer for vision towers, with RMS or layer norm as ``config.normalization`` says."""
    from megatron.core.transformer.enums import AttnMaskType

    return _layer(config, AttnMaskType.no_mask)


def _layer(config: Any, mask: Any) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer

    submodules = get_gpt_layer_local_submodules(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    if config.normalization == "RMSNorm":
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            submodules.self_attention.submodules.q_layernorm = RMSNorm
            submodules.self_attention.submodules.k_layernorm = RMSNorm
    submodules.self_attention.params = {"attn_mask_type": mask}
    submodules.self_attention.submodules.core_attention = PackedAttention
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def fuse_gradient_accumulation(module: torch.nn.Module) -> None:
    """Does nothing. The preflight builds the model of a GPU run here, and no CPU run may ask for the fusion."""


def overlap_tensor_parallel(config: Any, tokens: int) -> None:
    """Does nothing, for the same reason as ``fuse_gradient_accumulation``."""


def end_overlap() -> None:
    """Does nothing, because there is no overlapped communication on a CPU."""


def rng_state() -> torch.Tensor:
    """The state of the generator that dropout and sampling on this device use."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    """Restore what ``rng_state`` returned."""
    torch.set_rng_state(state)


def empty_on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous tensors of the same shapes and dtypes, with undefined values."""
    return [torch.empty(t.shape, dtype=t.dtype) for t in tensors]


def copy_to_host(tensors: Sequence[torch.Tensor], copies: Sequence[torch.Tensor]) -> None:
    """Copy the tensors into ``copies``, which are from ``empty_on_host``."""
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor)


class Uploads:
    """Returns tensors as they are, because tensors on the host are already on this device."""

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def begun(self) -> Callable[[], None]:
        return lambda: None


def uploads() -> Uploads:
    """See :class:`Uploads`."""
    return Uploads()


def empty_cache() -> None:
    """Does nothing, because on a CPU torch keeps no freed memory."""


def take_memory_peak() -> int | None:
    """None, because a CPU has no memory of its own."""
    return None


def peak_flops() -> float | None:
    """None, because it depends on the processor's clock and instructions."""
    return None


def machine() -> str:
    """Cores and processor model."""
    model = host.processor() or "CPU"
    with open("/proc/cpuinfo") as cpuinfo:
        model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), model)
    return f"{len(os.sched_getaffinity(0))} cores, {model}"


class RMSNorm(torch.nn.Module):
    """RMS norm over the last dimension, with support for sequence parallelism.

    Megatron-Core's torch wrapper refuses sequence parallelism. Under sequence parallelism the weight's gradient is
    summed over the ranks by ``finalize_model_grads``, which needs only the attribute ``sequence_parallel`` of the
    weight.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


# The most attention scores of a pack, including padding, that are held at once: 1 GiB in FP32. A pack with more scores
# is attended in blocks of at most ``_BLOCK_SCORES`` scores.
_MOST_SCORES = 2**28
_BLOCK_SCORES = 2**18


class PackedAttention(torch.nn.Module):
    """Attention over packed (THD) sequences, causal or bidirectional: unpack to a padded batch, attend, pack again.

    Query [tokens, heads, head_dim], key and value [tokens, groups, head_dim] → [tokens, heads, head_dim]. The tokens
    and heads are those of this rank. Sequences are padded on the right. Matrix products with an FP32 softmax take a
    quarter of the time of torch's BF16 SDPA on a CPU at a few hundred tokens.

    Under context parallelism keys and values are all-gathered, and a rank attends with its local queries. A pack with
    more than ``_MOST_SCORES`` scores is attended a block at a time, unless it has shared prompts.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.context = config.context_parallel_size
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
        """See the class. Megatron-Core also passes masks and biases as tensors, which are not used."""
        from megatron.core.transformer.enums import AttnMaskType

        places = _places(packed_seq_params, self.context)
        batch = places.lengths.numel()
        longest = int(places.lengths.max())
        if self.context > 1:
            key = _gather_context(key)
            value = _gather_context(value)

        is_causal = attn_mask_type is AttnMaskType.causal
        if places.hidden is None and batch * query.shape[1] * longest**2 > _MOST_SCORES:
            starts = packed_seq_params.cu_seqlens_q.tolist()
            blocks = _blocks(starts, places.own, query.shape[1], is_causal)
            key, value = (_Unpack.apply(rows, places.gathered, starts[-1]) for rows in (key, value))
            return _AttendInBlocks.apply(query, key, value, blocks, self.scale, is_causal)

        def padded(packed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            """[tokens, heads, head_dim] → [batch, heads, longest, head_dim]."""
            unpacked = _Unpack.apply(packed, rows, batch * longest)
            return unpacked.view(batch, longest, *packed.shape[1:]).transpose(1, 2)

        q = padded(query, places.queries)
        heads_per_group = query.shape[1] // key.shape[1]
        k = padded(key, places.keys).repeat_interleave(heads_per_group, dim=1)
        v = padded(value, places.keys).repeat_interleave(heads_per_group, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() * self.scale
        if places.hidden is not None:
            hidden = places.hidden
        elif is_causal:
            hidden = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        else:
            is_padding = torch.arange(longest) >= places.lengths.unsqueeze(1)
            hidden = is_padding[:, None, None, :]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype)
        output = (weights @ v).transpose(1, 2).reshape(batch * longest, *query.shape[1:])
        return _Pack.apply(output, places.queries)


@dataclass(frozen=True)
class _Places:
    """Where the tokens of a pack are in the padded batch.

    Attributes:
        lengths: lengths of the sequences [sequences].
        queries: row of each of this rank's tokens in the padded batch.
        keys: row of each token of all context-parallel ranks in the padded batch, one rank after another.
        gathered: place in the pack of each token of all context-parallel ranks, one rank after another.
        own: for each sequence, the places in the pack of this rank's tokens.
        hidden: for a pack with shared prompts, the keys that a query does not see [sequences, 1, longest, longest].
            None for other packs.
    """

    lengths: torch.Tensor
    queries: torch.Tensor
    keys: torch.Tensor
    gathered: torch.Tensor
    own: list[list[range]]
    hidden: torch.Tensor | None


def _places(packed: Any, context: int) -> _Places:
    """The places of a pack. They are computed once per micro-batch and cached in ``packed``."""
    from megatron_ext.packed import PROMPT, sees
    from megatron_ext.packing import context_ranges

    cached: _Places | None = getattr(packed, "places", None)
    if cached is not None:
        return cached
    starts = packed.cu_seqlens_q.long()
    lengths = starts.diff()
    # For each token of the pack, the row in the padded batch.
    padded_starts = torch.arange(len(lengths)) * int(lengths.max())
    moved_by = torch.repeat_interleave(padded_starts - starts[:-1], lengths)
    row_of = torch.arange(int(starts[-1])) + moved_by
    tokens_of_ranks = [_context_slices(starts, context, rank) for rank in range(context)]
    context_rank = _context_rank() if context > 1 else 0
    local_tokens = tokens_of_ranks[context_rank]
    gathered = torch.cat(tokens_of_ranks)
    keys = row_of[gathered]
    own = context_ranges(starts.tolist(), context, context_rank)
    hidden = None
    segments = getattr(packed, "segments", None)  # a vision tower's pack has none
    if segments is not None:
        longest = int(lengths.max())
        # Padding counts as tokens of the prompt. No token sees it, because it follows the sequence.
        padded = torch.full((len(lengths) * longest,), PROMPT).index_copy_(0, keys, segments)
        padded = padded.view(len(lengths), longest)
        is_later = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        hidden = (is_later | ~sees(padded.unsqueeze(2), padded.unsqueeze(1))).unsqueeze(1)
    packed.places = _Places(lengths, row_of[local_tokens], keys, gathered, own, hidden)
    return packed.places


class _AttendInBlocks(torch.autograd.Function):
    """Compute ``PackedAttention``'s output for this rank's queries and the keys of all ranks, block by block.

    The backward pass recomputes the attention weights of each block. So memory grows linearly with the number of
    tokens, not with its square. The formulas are those of FlashAttention (arXiv 2205.14135, appendix B.2).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: list[tuple[slice, slice]],
        scale: float,
        is_causal: bool,
    ) -> torch.Tensor:
        """Query [tokens, heads, head_dim], key and value [tokens of the pack, groups, head_dim] → shape of the query.

        ``blocks`` has a pair for each block: the queries, and the keys that they see.
        """
        groups = key.shape[1]
        k, v = key.transpose(0, 1), value.transpose(0, 1)
        output = torch.empty_like(query)
        for own, seen in blocks:
            q = _by_group(query[own], groups)
            weights = _weights(q, k[:, seen], own.stop - own.start, scale, is_causal).to(q.dtype)
            output[own] = _by_head(weights @ v[:, seen], query[own].shape)
        ctx.save_for_backward(query, key, value, output)
        ctx.options = blocks, scale, is_causal
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        query, key, value, output = ctx.saved_tensors
        blocks, scale, is_causal = ctx.options
        groups = key.shape[1]
        k, v = key.transpose(0, 1), value.transpose(0, 1)
        of_query = torch.empty_like(query)
        of_key, of_value = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for own, seen in blocks:
            q = _by_group(query[own], groups)
            of_output = _by_group(gradient[own], groups)
            weights = _weights(q, k[:, seen], own.stop - own.start, scale, is_causal)
            of_value[:, seen] += weights.transpose(1, 2).to(q.dtype) @ of_output
            of_weights = (of_output @ v[:, seen].transpose(1, 2)).float()
            weighted = (of_output.float() * _by_group(output[own], groups).float()).sum(-1, keepdim=True)
            of_scores = of_weights.sub_(weighted).mul_(weights).to(q.dtype)
            of_query[own] = _by_head(of_scores @ k[:, seen] * scale, query[own].shape)
            of_key[:, seen] += of_scores.transpose(1, 2) @ q * scale
        of_key, of_value = (g.transpose(0, 1).to(key.dtype) for g in (of_key, of_value))
        return of_query, of_key, of_value, None, None, None


def _by_group(queries: torch.Tensor, groups: int) -> torch.Tensor:
    """[queries, heads, head_dim] → [groups, heads of a group x queries, head_dim]."""
    return queries.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_head(rows: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Inverse of ``_by_group``. ``shape`` is [queries, heads, head_dim]."""
    return rows.unflatten(1, (-1, shape[0])).permute(2, 0, 1, 3).reshape(shape)


def _weights(q: torch.Tensor, k: torch.Tensor, queries: int, scale: float, is_causal: bool) -> torch.Tensor:
    """The FP32 softmax of the scores of ``queries`` queries and keys ``k`` [groups, keys, head_dim].

    ``q`` has the layout that ``_by_group`` returns. With a causal mask, the last query is at the place of the last key.
    """
    scores = (q @ k.transpose(1, 2)).float().mul_(scale)
    if is_causal:
        is_later = torch.ones(queries, queries, dtype=torch.bool).triu(1)
        last_keys = scores.unflatten(1, (-1, queries))[..., -queries:]
        last_keys.masked_fill_(is_later, float("-inf"))
    return scores.softmax(-1)


def _blocks(starts: list[int], own: list[list[range]], heads: int, is_causal: bool) -> list[tuple[slice, slice]]:
    """Divide this rank's queries into blocks of at most ``_BLOCK_SCORES`` scores.

    Returns a pair for each block: its queries among this rank's queries, and the keys in the pack that they see.
    ``starts`` has the start of each sequence of the pack and the end of the last one.
    """
    blocks = []
    done = 0
    for (start, end), ranges in zip(pairwise(starts), own, strict=True):
        most = max(1, _BLOCK_SCORES // (heads * (end - start)))
        for places in ranges:
            for first in range(places.start, places.stop, most):
                stop = min(first + most, places.stop)
                blocks.append((slice(done, done + stop - first), slice(start, stop if is_causal else end)))
                done += stop - first
    return blocks


def _context_slices(starts: torch.Tensor, context: int, rank: int) -> torch.Tensor:
    from megatron_ext.packing import context_slices

    return torch.tensor(context_slices(starts.tolist(), context, rank))


def _context_rank() -> int:
    from megatron.core.parallel_state import get_context_parallel_rank

    return get_context_parallel_rank()


def _gather_context(local: torch.Tensor) -> torch.Tensor:
    """All-gather the rows of all context-parallel ranks. The backward pass is a reduce-scatter of the gradients."""
    from megatron.core.parallel_state import get_context_parallel_group
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    return gather_from_sequence_parallel_region(
        local, tensor_parallel_output_grad=True, group=get_context_parallel_group()
    )


class _Unpack(torch.autograd.Function):
    """Packed rows → ``size`` rows. Rows without a packed row are zero.

    The target rows are distinct, so the backward pass is a gather. autograd's backward pass of indexing accumulates,
    which takes 50 times as long on a CPU.
    """

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


def _rotary_packed(
    t: torch.Tensor, cu_seqlens: torch.Tensor, freqs: torch.Tensor, *, interleaved: bool = False, **context: int
) -> torch.Tensor:
    """Rotary embedding for packed sequences: t [tokens, heads, head_dim], freqs [tokens, 1, 1, head_dim].

    ``freqs`` has the angles of each token, so the boundaries of sequences and of context-parallel slices do not matter.
    """
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    return _apply_rotary_pos_emb_bshd(t.unsqueeze(1), freqs, rotary_interleaved=interleaved).squeeze(1)


def _l2_norm(chunk_size: int, noop_flag: Any, tensor_lists: Any, per_tensor: bool) -> tuple[torch.Tensor, None]:
    """L2 norm over all tensors, accumulated in FP64 so that it does not depend on the sharding of gradients."""
    squares = []
    for tensors in tensor_lists:
        for tensor in tensors:
            squares.append(torch.linalg.vector_norm(tensor, dtype=torch.float64) ** 2)
    norm = torch.stack(squares).sum().sqrt()
    return norm.to(torch.float32).reshape(1), None
