"""Memory of one rank: exact for weights, gradients and optimiser, by formula for what a micro-batch leaves behind.

Weights, gradients and optimiser states are read from the built model: its parameters' storages and Megatron-Core's own
buffer layout, padding included. It may be built without memory (``simulation``); the sizes are the same.

Activations follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), table 2 and section 5, adapted to grouped-query attention, SwiGLU, no dropout, and flash attention, which
keeps its inputs, its output and one number for each head and token instead of the scores. The CPU platform keeps more;
its own terms are beside those of CUDA. All sizes are in bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext.model import Model

FP32 = 4
INT64 = 8


@dataclass(frozen=True)
class Shape:
    """What one micro-batch brings to a rank: ``tokens`` of this context-parallel rank, of which ``predicting`` predict
    a response token; the padded length of the ``longest`` of its ``sequences``; ``patches`` of images in the pack."""

    tokens: int
    predicting: int
    sequences: int
    longest: int
    patches: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. ``activations`` are those kept for the backward pass at their peak, ``workspace`` is what
    comes and goes within one layer; ``vllm`` is the engine's weights and buffers. ``critic``: what a critic's weights,
    gradients and optimiser add at the peak of training, ``critic_idle`` what they leave while the engine generates,
    ``critic_asleep`` what an offloaded one then has on the host. ``judges``: of servers on the same device,
    ``judges_asleep`` what they leave there. A phase (``recipes.preflight.memory_plan``) has some of them."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    kv_cache: int
    vllm: int
    reserve: int
    critic: int
    critic_idle: int
    critic_asleep: int
    judges: int
    judges_asleep: int

    def gib(self, phases: Mapping[str, Iterable[str]]) -> dict[str, float]:
        """Each part, the sum of each phase's parts, and the greatest of these as ``total``, in GiB."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        sums = {phase: sum(parts[name] for name in names) for phase, names in phases.items()}
        return {name: round(size / 2**30, 3) for name, size in (parts | sums | {"total": max(sums.values())}).items()}


def critic(policy: Model, beside: Model | None, offload: bool) -> tuple[int, int, int]:
    """A critic's bytes on the fullest rank as ``Memory`` has them: training, idle, and on the host; 0 without one.

    With ``offload`` it takes the place of the policy's gradients and optimiser while it is trained, and of nothing at
    other times. The policy's activations and logits stand for the critic's, which are not more.
    """
    if beside is None:
        return 0, 0, 0
    own = weights(beside) + gradients(beside) + fullest_optimizer(beside)
    if offload:
        return max(0, own - gradients(policy) - fullest_optimizer(policy)), 0, own - gradients(beside)
    return own, own, 0


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind the tensors."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def weights(model: Model) -> int:
    """Parameters as they are stored: trained ones in DDP's padded buffers under the distributed optimiser.

    FP8 adds Transformer Engine's copies of the decoder's matrices, as they are and transposed, a byte each; where the
    parameters themselves are kept in FP8, these two take the place of the 16-bit one.
    """
    stored = storage_bytes(t for chunk in model.chunks for t in (*chunk.module.parameters(), *chunk.module.buffers()))
    if model.config.fp8 and not model.config.fp8_param:
        matrices = (s.tensor for s in model.shards if "decoder.layers." in s.name and s.tensor.dim() == 2)
        stored += 2 * sum(matrix.numel() for matrix in matrices)
    return stored


def gradients(model: Model) -> int:
    """Megatron-Core's gradient buffers: FP32, padded."""
    return storage_bytes(buffer.grad_data for chunk in model.chunks for buffer in chunk.buffers)


def optimizer(model: Model, data_rank: int) -> int:
    """FP32 master weights (of 16-bit parameters; an FP32 parameter is its own) and Adam's two moments.

    ``data_rank``: place among the ranks that share the optimiser's states, data- and context-parallel ones. A rank owns
    an equal range of each bucket; where a range ends within a parameter, it owns a part of it, and no padding.
    """
    total = 0
    for chunk in model.chunks:
        for buffer in chunk.buffers:
            size = FP32 * (2 if buffer.param_dtype is torch.float32 else 3)
            ranks = buffer.data_parallel_group.size() if chunk.ddp_config.use_distributed_optimizer else 1
            for start, end, bucket in buffer.param_index_map.values():
                first, last = buffer.bucket_indices[bucket]
                share = (last - first) // ranks
                low = first + share * (data_rank if ranks > 1 else 0)
                total += size * max(0, min(end, low + share) - max(start, low))
    return total


def fullest_optimizer(model: Model) -> int:
    """``optimizer`` of the rank with most of it."""
    ranks = max((b.data_parallel_group.size() for c in model.chunks for b in c.buffers), default=1)
    return max(optimizer(model, rank) for rank in range(ranks))


def layer(config: TransformerConfig, shape: Shape, fused_kernels: bool) -> int:
    """What one decoder layer keeps for its backward pass, ``recompute_granularity`` None."""
    kept = _norms_and_mlp(config, shape, fused_kernels) + attention(config, shape, fused_kernels)
    if config.qk_layernorm:
        heads = (config.num_attention_heads + config.num_query_groups) // config.tensor_model_parallel_size
        kept += _norm(config, shape.tokens * heads, config.kv_channels, fused_kernels)
    return kept


def _norms_and_mlp(config: TransformerConfig, shape: Shape, fused_kernels: bool) -> int:
    """Both norms, the inputs of the joint projection and of the feed-forward layer, and what is inside the latter."""
    local = _local(config, shape)
    linear_input = 1 if config.fp8 else local.size
    norms = 2 * _norm(config, local.cut, config.hidden_size, fused_kernels)
    linear_inputs = 2 * local.cut * config.hidden_size * linear_input
    ffn = config.ffn_hidden_size // config.tensor_model_parallel_size
    if fused_kernels:
        # The fused activation keeps its input, for SwiGLU both halves; its output is kept as the next layer's input.
        mlp = shape.tokens * ffn * ((2 if config.gated_linear_unit else 1) * local.size + linear_input)
    else:
        # SwiGLU as Megatron-Core writes it: gate and up, silu(gate), up + 0, and their product. Else input and output.
        mlp = shape.tokens * ffn * (5 if config.gated_linear_unit else 2) * local.size
    return norms + linear_inputs + mlp


def attention(
    config: TransformerConfig, shape: Shape, fused_kernels: bool, rotates: bool = True, causal: bool = True
) -> int:
    """From the rotated query, key and value to the output projection's input."""
    local = _local(config, shape)
    inputs = shape.tokens * (local.query + 2 * local.group) * local.size
    output = shape.tokens * local.query * local.size
    heads = local.query // config.kv_channels
    if fused_kernels:
        if config.recompute_granularity == "selective":
            # The value is a cut of the joint projection and keeps it all alive.
            return inputs + shape.tokens * (local.query + local.group) * local.size + output
        return inputs + output + heads * shape.tokens * FP32
    # Sines and cosines, of query and key.
    rotary = 4 * shape.tokens * config.kv_channels * local.size if rotates else 0
    if config.recompute_granularity == "selective":
        return rotary + inputs + shape.tokens * (local.query + local.group) * local.size + output
    padded = shape.sequences * shape.longest
    copies = 3 * padded * local.query * local.size  # query, key and value, each in as many heads as the query
    scores = shape.sequences * heads * shape.longest**2 * (FP32 + (local.size if local.size < FP32 else 0))
    mask = shape.longest * (shape.longest if causal else shape.sequences)
    return rotary + copies + scores + mask + output


@dataclass(frozen=True)
class _Local:
    """Per rank: bytes of an element, tokens between the tensor-parallel regions, widths of query and of one of key and
    value."""

    size: int
    cut: int
    query: int
    group: int


def _local(config: TransformerConfig, shape: Shape) -> _Local:
    tensor = config.tensor_model_parallel_size
    return _Local(
        size=config.params_dtype.itemsize,
        cut=shape.tokens // tensor if config.sequence_parallel else shape.tokens,
        query=config.num_attention_heads // tensor * config.kv_channels,
        group=config.num_query_groups // tensor * config.kv_channels,
    )


def _norm(config: TransformerConfig, rows: int, width: int, fused_kernels: bool) -> int:
    """An RMS norm's input and the scale of each row, a layer norm's mean too. torch's own RMS norm, on a CPU, keeps
    FP32 copies of input and output."""
    if config.normalization == "LayerNorm":
        return rows * (width * config.params_dtype.itemsize + 2 * FP32)
    if fused_kernels:
        return rows * (width * config.params_dtype.itemsize + FP32)
    return rows * (2 * width * FP32 + FP32)


def in_flight(model: Model, micro_batches: int) -> int:
    """Forward passes of one model chunk whose backward pass is still to come, at the peak on this pipeline rank.

    One forward, one backward behind a warm-up (``get_pp_rank_microbatches`` of Megatron-Core's schedules).
    """
    layout, stage = model.parallel.config, model.parallel.pipeline_rank
    warmup = layout.pipeline - stage - 1
    if layout.virtual_pipeline > 1:
        warmup = 2 * warmup + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(warmup + 1, micro_batches * layout.virtual_pipeline)


def activations(model: Model, shape: Shape, micro_batches: int, fused_kernels: bool) -> int:
    """Kept for the backward pass at the peak, logits apart (see ``logits``)."""
    config = model.config
    local = _local(config, shape)
    row = local.cut * config.hidden_size * local.size
    per_layer = layer(config, shape, fused_kernels)
    full = config.recompute_granularity == "full"
    decoders = [getattr(chunk.module, "language", chunk.module) for chunk in model.chunks]
    deepest = max(len(decoder.decoder.layers) for decoder in decoders)
    chunk = deepest * (row if full else per_layer)
    if model.parallel.config.pipeline > 1:
        chunk += row  # what goes to the next stage is kept for the call of backward
    tower, remade = vision(model, shape, fused_kernels)
    total = in_flight(model, micro_batches) * chunk + max(per_layer if full else 0, remade)
    if any(decoder.pre_process for decoder in decoders):
        total += in_flight(model, micro_batches) * (shape.tokens * INT64 + tower)
    if any(decoder.post_process for decoder in decoders):
        total += _norm(config, local.cut, config.hidden_size, fused_kernels)
    return total


def vision(model: Model, shape: Shape, fused_kernels: bool) -> tuple[int, int]:
    """What the vision tower keeps for ``patches`` of one image, and what full recompute makes again at a time.

    A frozen one keeps nothing, as pixels have no gradient. The projector, for each token: the norm's input and output,
    the first layer's output and the second's input.
    """
    tower: Any = getattr(model.chunks[0].module, "vision", None)
    if tower is None or not shape.patches:
        return 0, 0
    config, size = tower.config, model.config.params_dtype.itemsize
    inner, width = next(p.shape for p in tower.projector.parameters() if p.dim() == 2)
    tokens = shape.patches // 4  # both families merge two by two patches into one token
    norm = tokens * width * size
    if any(isinstance(module, torch.nn.RMSNorm) for module in tower.projector.children()):
        norm = _norm(config, shape.patches, config.hidden_size, fused_kernels)
    kept = norm + tokens * (width + 2 * inner) * size
    if not any(p.requires_grad for n, p in tower.named_parameters() if not n.startswith("projector.")):
        return kept, 0
    kept += shape.patches * next(p[0].numel() for p in tower.parameters() if p.dim() > 3) * size  # pixels
    packs = [Shape(count * longest, 0, count, longest) for count, longest in tower.sequences_per_layer(shape.patches)]
    layers = [
        _norms_and_mlp(config, pack, fused_kernels)
        + attention(config, pack, fused_kernels, rotates=tower.rotates, causal=False)
        + tower.extra_saved_bytes(pack.tokens)
        for pack in packs
    ]
    if config.recompute_granularity == "full":
        return kept + sum(pack.tokens for pack in packs) * config.hidden_size * size, max(layers)
    return kept + sum(layers), 0


def logits(model: Model, shape: Shape) -> int:
    """Of the last stage: the selected hidden states; FP32 logits, which become the softmax and then the gradient in
    place, and their 16-bit copy on the way in and on the way back; indices. A scalar head has no logits: the selected
    states, and their FP32 copy."""
    if not model.parallel.is_last_stage:
        return 0
    config, size = model.config, model.config.params_dtype.itemsize
    rows = shape.predicting
    if model.is_scalar:
        return rows * (config.hidden_size * (size + (FP32 if size < FP32 else 0)) + INT64)
    columns = model.sharding.padded_vocab // config.tensor_model_parallel_size
    return rows * (config.hidden_size * size + columns * (FP32 + (size if size < FP32 else 0)) + 3 * INT64)


def workspace(model: Model, shape: Shape) -> int:
    """What comes and goes in one layer's backward pass; our upper estimate: the feed-forward layer's gathered input and
    its gradient, the gradients of gate, up and their product, and the largest weight's gradient before it is added."""
    config = model.config
    size = config.params_dtype.itemsize
    ffn = config.ffn_hidden_size // config.tensor_model_parallel_size
    trained = (p for chunk in model.chunks for p in chunk.module.parameters() if p.requires_grad)
    largest = max((p.numel() for p in trained), default=0)
    return (shape.tokens * (2 * config.hidden_size + 3 * ffn) + largest) * size


def kv_bytes_per_token(text: Any, tensor: int, size: int = 2) -> int:
    """Key and value of one token on one of ``tensor`` engine ranks; vLLM repeats heads where there are too few."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * max(1, groups // tensor) * head_dim * size


def engine(
    text: Any, parameters: int, tensor: int, batched_tokens: int, sequences: int, size: int = 2, fp8: bool = False
) -> int:
    """A vLLM rank's weights, and our estimate of its buffers: one layer's for ``batched_tokens``, and FP32 logits and
    their probabilities for ``sequences``. ``fp8``: the decoder's matrices have one byte an element there, and room for
    one layer of them before and after they are quantised (``rollout/weight_sync/quantised.py``)."""
    layer_buffers = batched_tokens * (4 * text.hidden_size + 3 * text.intermediate_size // tensor) * size
    weights = parameters * size
    if fp8:
        matrices = decoder_matrices(text)
        weights += matrices * (size + 1) - text.num_hidden_layers * matrices * (size - 1)
    return -(-weights // tensor) + layer_buffers + sequences * text.vocab_size * 2 * FP32


def decoder_matrices(text: Any) -> int:
    """Elements of one decoder layer's matrices: query, key, value and output, gate, up and down."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return text.hidden_size * (2 * (heads + groups) * head_dim + 3 * text.intermediate_size)
