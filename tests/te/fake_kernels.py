"""Fakes of Transformer Engine's kernels, computed by torch: those that a dense model in BF16 or FP32 calls.

Each has the parameters of the compiled function, in its order. Arithmetic is in FP32 and rounded at the end, as in the
kernels. Quantised inputs are refused: FP8 can't be rehearsed.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex_attention_module

from tests.te import fake_extension, host_waits

Tensor = torch.Tensor


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """(normalised rows, None, 1 / root mean square of each row) of ``input`` [rows, width]."""
    assert quantizer is None and not zero_centered_gamma
    rows = input.float()
    scale = torch.rsqrt(rows.square().mean(-1) + eps)
    return _written(rows * scale[:, None] * weight.float(), ln_out, input.dtype), None, scale


def rmsnorm_bwd(
    gradient: Tensor, input: Tensor, scale: Tensor, weight: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of input and weight."""
    normalised = input.float() * scale[:, None]
    weighted = gradient.float() * weight.float()
    of_input = scale[:, None] * (weighted - normalised * (weighted * normalised).mean(-1, keepdim=True))
    of_weight = (gradient.float() * normalised).sum(0)
    return of_input.to(input.dtype), of_weight.to(weight.dtype)


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normalised rows, mean, 1 / standard deviation of each row)."""
    assert quantizer is None and not zero_centered_gamma
    rows = input.float()
    mean = rows.mean(-1)
    scale = torch.rsqrt(rows.var(-1, unbiased=False) + eps)
    normalised = (rows - mean[:, None]) * scale[:, None]
    return _written(normalised * weight.float() + bias.float(), ln_out, input.dtype), mean, scale


def layernorm_bwd(
    gradient: Tensor,
    input: Tensor,
    mean: Tensor,
    scale: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias."""
    normalised = (input.float() - mean[:, None]) * scale[:, None]
    weighted = gradient.float() * weight.float()
    centred = weighted - weighted.mean(-1, keepdim=True)
    of_input = scale[:, None] * (centred - normalised * (weighted * normalised).mean(-1, keepdim=True))
    of_weight = (gradient.float() * normalised).sum(0)
    return of_input.to(input.dtype), of_weight.to(weight.dtype), gradient.float().sum(0).to(weight.dtype)


def generic_gemm(
    A: Tensor,
    transA: bool,
    B: Tensor,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Any]:
    """(product, gradient of the bias, None, ``extra_output``).

    As cuBLAS, in columns: for tensors in rows the product is op(B) op(A). In the backward pass (``grad``) a bias asks
    for its gradient, the sum of B's rows. With ``comm_overlap`` the product and the communication happen one after the
    other.
    """
    assert quantizer is None and not gelu
    is_gather = comm_overlap is not None and comm_type.name == "AG"
    is_sum = comm_overlap is not None and comm_type.name == "RS"
    if is_gather:
        # Of an operand, which is a view of the buffer; or for a later product, while this one computes.
        comm_overlap.gather()
    assert beta in (None, float(accumulate)), "the output is added whole or not at all"
    a = A.reshape(-1, A.shape[-1]).float()
    b = B.reshape(-1, B.shape[-1]).float()
    product = (b.T if transB else b) @ (a.T if transA else a) * alpha
    bias_gradient = None
    if bias is not None and grad:
        bias_gradient = b.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if not transB:
        product = product.view(*B.shape[:-1], product.shape[-1])
    if is_sum and bulk_overlap:
        # Of what the product before this one left in the buffer.
        comm_overlap.sum_in_place()
    elif is_sum:
        extra_output.copy_(comm_overlap.own_sum(product).view(extra_output.shape))
    if D is not None:
        D.copy_(D.float() + product if accumulate else product)
        return D, bias_gradient, None, extra_output
    if output_dtype is None:
        return product.to(A.dtype), bias_gradient, None, extra_output
    from transformer_engine.pytorch.constants import DType, TE_DType_To_Torch

    return product.to(TE_DType_To_Torch[DType(int(output_dtype))]), bias_gradient, None, extra_output


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """Packed rows [tokens, heads, head_dim], each rotated by the angles of its place in its sequence."""
    return _rotated(input, freqs, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, sign=1)


def fused_rope_backward(
    gradient: Tensor,
    freqs: Tensor,
    start_positions: Tensor | None,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
) -> Tensor:
    """The gradient rotated back."""
    return _rotated(gradient, freqs, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, sign=-1)


def _rotated(
    rows: Tensor,
    freqs: Tensor,
    qkv_format: Any,
    interleaved: bool,
    cu_seqlens: Tensor,
    cp_size: int,
    cp_rank: int,
    sign: int,
) -> Tensor:
    from megatron_ext.packing import context_slices

    assert qkv_format.name == "NVTE_THD" and not interleaved
    starts = cu_seqlens.long()
    places = torch.arange(int(starts[-1])) - torch.repeat_interleave(starts[:-1], starts.diff())
    if cp_size > 1:
        places = places[torch.tensor(context_slices(starts.tolist(), cp_size, cp_rank))]
    angles = freqs.view(freqs.shape[0], -1)[places].float()
    width = angles.shape[-1]
    turned = rows[..., :width].float()
    first, second = turned.chunk(2, -1)
    orthogonal = torch.cat((-second, first), -1)
    rotated = turned * angles.cos()[:, None] + orthogonal * (sign * angles.sin())[:, None]
    return torch.cat((rotated.to(rows.dtype), rows[..., width:]), -1)


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Norm over all tensors, [1]; summed in FP64 as on the CPU platform, so that it does not depend on the sharding."""
    squares = [tensor.double().square().sum() for tensor in tensor_lists[0]]
    total = torch.stack(squares).sum().sqrt().float().view(1)
    return total, torch.stack(squares).sqrt().float() if per_tensor else torch.empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], scale: Tensor
) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW (``mode`` 1) in place on lists of gradients, parameters, first and second moments.

    pybind11 takes no float for ``step`` and the other integers.
    """
    assert all(isinstance(n, int) for n in (chunk_size, step, mode, bias_correction)), "pybind11 needs integers"
    assert mode == 1 and step >= 1
    first_correction = 1 - beta1**step if bias_correction else 1.0
    second_correction = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second in zip(*tensor_lists, strict=True):
        g = gradient.float()
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (first / first_correction) / ((second / second_correction).sqrt() + epsilon)
        parameter.copy_(parameter.float() - lr * (update + weight_decay * parameter.float()))


def flex_attention(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """torch's, by the blocks: one that the mask does not list is not computed, one that it lists as full has no mask.

    Query [1, heads, tokens, head_dim], key and value [1, groups, tokens, head_dim] → as the query.
    """
    assert enable_gqa
    tokens = query.shape[2]
    within = flex_attention_module.create_mask(block_mask.mask_mod, 1, 1, tokens, tokens, query.device)[0, 0]
    partial = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.BLOCK_SIZE[0], tokens)
    full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, block_mask.BLOCK_SIZE[0], tokens)
    k, v = (rows.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1) for rows in (key, value))
    scores = (query.float() @ k.transpose(-1, -2) * scale).masked_fill(~(full | partial & within), float("-inf"))
    return (scores.softmax(-1) @ v).to(query.dtype)


def _listed(counts: Tensor, numbers: Tensor, size: int, tokens: int) -> Tensor:
    """[tokens, tokens]: whether the block with these scores is among those that its row of blocks lists first."""
    blocks = torch.zeros(numbers.shape[-2:], dtype=torch.bool)
    for row, (count, of_row) in enumerate(zip(counts[0, 0].tolist(), numbers[0, 0], strict=True)):
        blocks[row, of_row[:count].long()] = True
    return blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[:tokens, :tokens]


def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
    """cuDNN's attention for 16 bits. Its conditions on sizes are cuDNN's to say."""
    extension: Any = sys.modules[fake_extension.NAME]
    return extension.NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def convert_thd_to_bshd(packed: Tensor, cu_seqlens: Tensor, batch_size: int, longest: int) -> Tensor:
    """Packed rows [tokens, heads, head_dim] → [batch, longest, heads, head_dim], zero behind each sequence."""
    padded = packed.new_zeros(batch_size, longest, *packed.shape[1:])
    for row, sequence in zip(padded, packed.split(cu_seqlens.diff().tolist()), strict=True):
        row[: len(sequence)] = sequence
    return padded


def convert_bshd_to_thd(padded: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """The reverse."""
    lengths = cu_seqlens.diff().tolist()
    return torch.cat([row[:length] for row, length in zip(padded, lengths, strict=True)])


def _written(values: Tensor, out: Tensor | None, dtype: torch.dtype) -> Tensor:
    if out is None:
        return values.to(dtype)
    out.copy_(values)
    return out


class CommOverlapHelper:
    """The ranks of the world, and those of the tensor-parallel group."""

    def __init__(self, world: Any, group: Any) -> None:
        self.group = group


class CommOverlap:
    """A communication buffer [tokens, hidden] of Transformer Engine, as ``comm_gemm_overlap.cpp`` checks its uses.

    What nobody has written is NaN.
    """

    def __init__(
        self, shape: list[int], dtype: torch.dtype, helper: CommOverlapHelper, tp_size: int, comm_type: Any, **rest: Any
    ) -> None:
        self.buffer = torch.full(shape, float("nan"), dtype=dtype, device="cuda")
        self.group = helper.group
        assert torch.distributed.get_world_size(self.group) == tp_size

    def is_fp8_ubuf(self) -> bool:
        return False

    def with_cublasmp(self) -> bool:
        return False

    def _of_ranks(self, whole: Tensor) -> tuple[Tensor, ...]:
        return whole.chunk(torch.distributed.get_world_size(self.group))

    def _own(self, whole: Tensor) -> Tensor:
        return self._of_ranks(whole)[torch.distributed.get_rank(self.group)]

    def get_buffer(self, local_chunk: bool = False, shape: list[int] | None = None) -> Tensor:
        buffer = self._own(self.buffer) if local_chunk else self.buffer
        return buffer.view(buffer.shape if shape is None else shape)

    def copy_into_buffer(self, tensor: Tensor, local_chunk: bool = False) -> None:
        buffer = self.get_buffer(local_chunk)
        assert tensor.numel() == buffer.numel(), "Tried to copy an invalid tensor into a Userbuffers buffer"
        buffer.copy_(tensor.reshape(buffer.shape))

    def gather(self) -> None:
        """Every rank's own part of the buffer."""
        parts = [torch.empty_like(part) for part in self._of_ranks(self.buffer)]
        torch.distributed.all_gather(parts, self._own(self.buffer).contiguous(), group=self.group)
        self.buffer.copy_(torch.cat(parts))

    def own_sum(self, whole: Tensor) -> Tensor:
        """This rank's part of the ranks' sum of [tokens, …]."""
        total = whole.reshape(self.buffer.shape[0], -1).clone()
        torch.distributed.all_reduce(total, group=self.group)
        return self._own(total)

    def sum_in_place(self) -> None:
        self._own(self.buffer).copy_(self.own_sum(self.buffer))


class CommOverlapP2P(CommOverlap):
    """The same here; on GPUs its ranks send to each other in a ring."""


def ubuf_built_with_mpi() -> bool:
    return False


def device_supports_multicast() -> bool:
    return True


def get_stream_priority_range() -> tuple[int, int]:
    return 0, -1


KERNELS: list[Callable[..., Any]] = [
    rmsnorm_fwd,
    rmsnorm_bwd,
    layernorm_fwd,
    layernorm_bwd,
    generic_gemm,
    fused_rope_forward,
    fused_rope_backward,
    multi_tensor_l2norm,
    multi_tensor_scale,
    multi_tensor_scale_tensor,
    multi_tensor_adam,
    get_fused_attn_backend,
    convert_thd_to_bshd,
    convert_bshd_to_thd,
    CommOverlapHelper,
    CommOverlap,
    CommOverlapP2P,
    ubuf_built_with_mpi,
    device_supports_multicast,
    get_stream_priority_range,
]


def install(extension: types.ModuleType) -> None:
    """Put the fakes into the fake extension, before Transformer Engine imports it."""
    for kernel in KERNELS:
        assert hasattr(extension, kernel.__name__), f"the extension binds no {kernel.__name__}"
        setattr(extension, kernel.__name__, host_waits.as_a_kernel(kernel))
    extension.get_num_cublas_streams = lambda: 4  # type: ignore[attr-defined]


def install_attention() -> None:
    """Put attention in the place of Transformer Engine's module for cuDNN's, after it is imported, and of torch's
    FlexAttention, which has no backward pass on a CPU."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    select = utils.get_attention_backend

    @functools.wraps(select)
    def select_for_twins(asked: Any) -> Any:
        """FP32 has no attention under context parallelism. Twins get cuDNN's, so that they can be compared exactly."""
        return select(replace(asked, qkv_dtype=torch.bfloat16) if asked.context_parallel else asked)

    utils.get_attention_backend = select_for_twins
    forward = inspect.signature(backends.FusedAttention.forward)

    @host_waits.as_a_kernel
    def attend(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = forward.bind(self, *args, **kwargs)
        given.apply_defaults()
        return _attention(self.softmax_scale, types.SimpleNamespace(**given.arguments))

    backends.FusedAttention.forward = attend
    flex_attention_module.flex_attention = host_waits.as_a_kernel(flex_attention)


def _attention(scale: float, given: Any) -> Tensor:
    """The CPU platform's attention for what Transformer Engine hands to cuDNN's; rows [tokens, heads x head_dim]."""
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_ext.platform.cpu import PackedAttention

    assert given.qkv_layout == "thd_thd_thd" and not given.fp8
    assert given.window_size in (None, (-1, -1), (-1, 0))
    masks = {"padding_causal": AttnMaskType.causal, "padding": AttnMaskType.no_mask}
    context = 1 if given.cp_group is None else torch.distributed.get_world_size(given.cp_group)
    config = types.SimpleNamespace(context_parallel_size=context, kv_channels=given.query_layer.shape[-1])
    packed = types.SimpleNamespace(cu_seqlens_q=given.cu_seqlens_q)
    rows = PackedAttention(config, scale)(
        given.query_layer,
        given.key_layer,
        given.value_layer,
        None,
        attn_mask_type=masks[given.attn_mask_type],
        packed_seq_params=packed,
    )
    return rows.reshape(rows.shape[0], -1)
