"""Device memory of one rank in bytes: exact for weights, gradients and optimiser states, by formula for activations.

The sizes of weights, gradients and optimiser states come from the built model: from the storages of its parameters and
from Megatron-Core's buffers, padding included. A model built without memory (``simulated_ranks``) has the same sizes.

Activations follow Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models" (arXiv
2205.05198), table 2 and section 5, adapted to grouped-query attention, SwiGLU, no dropout, and flash attention. Flash
attention saves its inputs, its output and one number per head and token instead of the scores. FlexAttention saves the
same, and the block mask.

The argument ``fused_kernels`` of the functions is the capability of the platform. Without fused kernels, more is saved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_ext.images import encoder_is_frozen
from megatron_ext.layout import CORE_ATTENTION, MLP
from megatron_ext.micro_batches import AHEAD
from megatron_ext.model import Model, recomputed_modules
from megatron_ext.packed import BLOCK

FP32 = 4
INT32 = 4
INT64 = 8


@dataclass(frozen=True)
class Shape:
    """The sizes of one micro-batch on a rank.

    Attributes:
        tokens: tokens of this context-parallel rank.
        predicting: number of these tokens that predict a response token.
        sequences: sequences in the pack.
        longest: padded length of the longest sequence.
        patches: patches of images in the pack.
    """

    tokens: int
    predicting: int
    sequences: int
    longest: int
    patches: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, by use. ``memory_plan`` says which of them are on the device in each phase of a step.

    Attributes:
        weights: the policy's parameters.
        gradients: Megatron-Core's gradient buffers.
        optimizer: FP32 master weights and moments.
        activations: tensors saved for the backward pass, at their peak.
        logits: logits of the last pipeline stage, with the tensors that are computed from them.
        micro_batches: inputs of the micro-batches that are on the device at the same time, and the log-probs that are
            kept for a rollout.
        workspace: temporary tensors within one layer.
        buffers: Transformer Engine's permanent buffers (``buffers``).
        kv_cache: the engine's KV cache.
        vllm: the engine's weights and buffers.
        reserve: what the processes of trainer and engine keep beside all this (``memory_plan.reserve``).
        critic: what a critic's weights, gradients and optimiser states add at the peak of training.
        critic_idle: what a critic occupies on the device while the engine generates.
        critic_asleep: what an offloaded critic occupies on the host while the engine generates.
        judges: reward servers on the same device.
        judges_asleep: what the reward servers occupy on the device while they sleep.
        images_on_host: what the trainer keeps of a step's images on the host (``images_on_host``).
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    micro_batches: int
    workspace: int
    buffers: int
    kv_cache: int
    vllm: int
    reserve: int
    critic: int
    critic_idle: int
    critic_asleep: int
    judges: int
    judges_asleep: int
    images_on_host: int

    def gib(self, phases: Mapping[str, Iterable[str]]) -> dict[str, float]:
        """GiB of each field, the sum of the fields of each phase, and the largest of these sums as ``total``."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        sums = {}
        for phase, names in phases.items():
            sums[phase] = sum(sizes[name] for name in names)
        total = max(sums.values())
        in_bytes = {**sizes, **sums, "total": total}
        return {name: round(size / 2**30, 3) for name, size in in_bytes.items()}


def critic_bytes(policy: Model, critic: Model | None, offload: bool) -> tuple[int, int, int]:
    """``critic``, ``critic_idle`` and ``critic_asleep`` of ``Memory``, on the largest rank. Zeros without a critic.

    An offloaded critic replaces the policy's gradients and optimiser states on the device while it is trained. At other
    times it is on the host. Its activations and logits are not larger than the policy's, which are counted already.
    """
    if critic is None:
        return 0, 0, 0
    total = weights(critic) + gradients(critic) + fullest_optimizer(critic)
    if offload:
        added = max(0, total - gradients(policy) - fullest_optimizer(policy))
        return added, 0, total - gradients(critic)
    return total, total - gradients(critic), 0


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages of the tensors."""
    sizes = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
    return sum(sizes.values())


def weights(model: Model) -> int:
    """Bytes of the parameters as stored. With the distributed optimiser, trained ones are in DDP's padded buffers.

    FP8 adds Transformer Engine's two copies of the decoder's matrices, one of them transposed, with one byte per
    element.
    """
    tensors: list[torch.Tensor] = []
    for chunk in model.chunks:
        tensors += [*chunk.module.parameters(), *chunk.module.buffers()]
    stored = storage_bytes(tensors)
    if model.config.fp8:
        for shard in model.shards:
            if "decoder.layers." in shard.name and shard.tensor.dim() == 2:
                stored += 2 * shard.tensor.numel()
    return stored


def gradients(model: Model) -> int:
    """Bytes of Megatron-Core's gradient buffers, which are FP32 and padded."""
    return storage_bytes(buffer.grad_data for chunk in model.chunks for buffer in chunk.buffers)


def optimizer(model: Model, data_rank: int) -> int:
    """Bytes of the FP32 master weights of 16-bit parameters and of Adam's two moments.

    An FP32 parameter is its own master weight. ``data_rank`` is the rank's index among the data- and context-parallel
    ranks that share the states. Each of these ranks owns an equal range of each bucket, which may end within a
    parameter. Padding has no states.
    """
    total = 0
    for chunk in model.chunks:
        for buffer in chunk.buffers:
            element_bytes = FP32 * (2 if buffer.param_dtype is torch.float32 else 3)
            sharded = chunk.ddp_config.use_distributed_optimizer
            ranks = buffer.data_parallel_group.size() if sharded else 1
            for start, end, bucket in buffer.param_index_map.values():
                bucket_start, bucket_end = buffer.bucket_indices[bucket]
                share = (bucket_end - bucket_start) // ranks
                share_start = bucket_start + share * (data_rank if ranks > 1 else 0)
                owned = min(end, share_start + share) - max(start, share_start)
                total += element_bytes * max(0, owned)
    return total


def fullest_optimizer(model: Model) -> int:
    """:func:`optimizer` of the rank that owns the most."""
    group_sizes = [buffer.data_parallel_group.size() for chunk in model.chunks for buffer in chunk.buffers]
    ranks = max(group_sizes, default=1)
    return max(optimizer(model, rank) for rank in range(ranks))


def layer(config: TransformerConfig, shape: Shape, fused_kernels: bool) -> int:
    """Bytes that one decoder layer saves for its backward pass, without those of modules under selective recompute."""
    kept = _norms_and_mlp(config, shape, fused_kernels) + attention(config, shape, fused_kernels)
    if config.qk_layernorm:
        heads = (config.num_attention_heads + config.num_query_groups) // config.tensor_model_parallel_size
        kept += _norm(config, shape.tokens * heads, config.kv_channels, fused_kernels)
    return kept


def layers_of_chunk(config: TransformerConfig, layers: int, shape: Shape, fused_kernels: bool) -> int:
    """Bytes that the ``layers`` of a model chunk save. A layer under full recompute saves only its input."""
    recomputed = 0
    if config.recompute_granularity == "full":
        recomputed = config.recompute_num_layers if config.recompute_method == "block" else layers
    local = _local(config, shape)
    row = local.cut * config.hidden_size * local.size
    return recomputed * row + (layers - recomputed) * layer(config, shape, fused_kernels)


def remade(config: TransformerConfig, shape: Shape, fused_kernels: bool) -> int:
    """Bytes of the tensors that the backward pass of a layer recomputes.

    Under full recompute these are the tensors of the whole layer. If the MLP is recomputed selectively, they are those
    of the MLP. Otherwise there are none.
    """
    if config.recompute_granularity == "full":
        return layer(config, shape, fused_kernels)
    if MLP not in recomputed_modules(config):
        return 0
    norm = _local(config, shape).cut * config.hidden_size * (1 if config.fp8 else config.params_dtype.itemsize)
    return _mlp(config, shape, fused_kernels) + (norm if fused_kernels else 0)


def _norms_and_mlp(config: TransformerConfig, shape: Shape, fused_kernels: bool) -> int:
    """Bytes saved by both norms, as inputs of the QKV projection and of the MLP, and by the MLP itself."""
    local = _local(config, shape)
    linear_input = 1 if config.fp8 else local.size
    row = local.cut * config.hidden_size
    norm = _norm(config, local.cut, config.hidden_size, fused_kernels)
    first_norm_and_input = norm + row * linear_input
    if MLP not in recomputed_modules(config):
        return 2 * first_norm_and_input + _mlp(config, shape, fused_kernels)
    # The MLP is recomputed from its input. With fused kernels, the norm belongs to the MLP, so its tensors are
    # recomputed too. Otherwise the norm is a module before the MLP, and its tensors are saved.
    return first_norm_and_input + row * local.size + (0 if fused_kernels else norm)


def _mlp(config: TransformerConfig, shape: Shape, fused_kernels: bool) -> int:
    """Bytes that the MLP saves of the tensors inside it."""
    local = _local(config, shape)
    linear_input = 1 if config.fp8 else local.size
    ffn = config.ffn_hidden_size // config.tensor_model_parallel_size
    if fused_kernels:
        # The fused activation saves its input, for SwiGLU both halves. Its output is saved as the input of the next
        # linear layer.
        halves = 2 if config.gated_linear_unit else 1
        element_bytes = halves * local.size + linear_input
    else:
        # Megatron-Core's unfused SwiGLU saves gate and up, silu(gate), up + 0, and the product. GELU saves its input
        # and its output.
        copies = 5 if config.gated_linear_unit else 2
        element_bytes = copies * local.size
    return shape.tokens * ffn * element_bytes


def attention(
    config: TransformerConfig, shape: Shape, fused_kernels: bool, rotates: bool = True, causal: bool = True
) -> int:
    """Bytes that attention saves, from the rotated query, key and value to the input of the output projection.

    ``rotates``: whether there are rotary embeddings.
    ``causal``: whether all sequences share one mask.
    """
    local = _local(config, shape)
    inputs = shape.tokens * (local.query + 2 * local.group) * local.size
    output = shape.tokens * local.query * local.size
    heads = local.query // config.kv_channels
    # Selective recompute keeps the value. The value is a view of the QKV projection's output, so the query and key in
    # that output are kept too.
    query_and_key = shape.tokens * (local.query + local.group) * local.size
    selective = CORE_ATTENTION in recomputed_modules(config)
    if fused_kernels:
        return inputs + output + (query_and_key if selective else heads * shape.tokens * FP32)
    # Sines and cosines, for the query and for the key.
    rotary = 4 * shape.tokens * config.kv_channels * local.size if rotates else 0
    if selective:
        return rotary + inputs + query_and_key + output
    # Query, key and value, each with as many heads as the query.
    copies = 3 * shape.sequences * shape.longest * local.query * local.size
    # The scores are saved in FP32, and once more in the dtype of the matrix products if that is smaller.
    score_bytes = FP32 + (local.size if local.size < FP32 else 0)
    scores = shape.sequences * heads * shape.longest**2 * score_bytes
    mask = shape.longest * (shape.longest if causal else shape.sequences)
    return rotary + copies + scores + mask + output


@dataclass(frozen=True)
class _Local:
    """Sizes per rank.

    Attributes:
        size: bytes of an element.
        cut: tokens outside the tensor-parallel regions. Sequence parallelism shards them.
        query: width of the query.
        group: width of the key, and of the value.
    """

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
    """Bytes that a norm saves: its input and the scale of each row, for a layer norm also the mean of each row.

    torch's own RMS norm, on a CPU, saves FP32 copies of its input and output instead of the input.
    """
    if config.normalization == "LayerNorm":
        return rows * (width * config.params_dtype.itemsize + 2 * FP32)
    if fused_kernels:
        return rows * (width * config.params_dtype.itemsize + FP32)
    return rows * (2 * width * FP32 + FP32)


def in_flight(model: Model, micro_batches: int) -> int:
    """Number of forward passes of one model chunk that await their backward pass, at the peak on this pipeline rank.

    The schedule is 1F1B: after a warm-up, one forward and one backward pass in turn (``get_pp_rank_microbatches`` of
    Megatron-Core).
    """
    layout = model.parallel.config
    stage = model.parallel.pipeline_rank
    warmup = layout.pipeline - stage - 1
    if layout.virtual_pipeline > 1:
        warmup = 2 * warmup + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(warmup + 1, micro_batches * layout.virtual_pipeline)


def activations(model: Model, shape: Shape, micro_batches: int, fused_kernels: bool) -> int:
    """Bytes that are saved for the backward pass at the peak, without ``logits``.

    ``micro_batches``: number of micro-batches of one update on this rank.
    """
    config = model.config
    local = _local(config, shape)
    row = local.cut * config.hidden_size * local.size
    decoders = [getattr(chunk.module, "language", chunk.module) for chunk in model.chunks]
    deepest = max(len(decoder.decoder.layers) for decoder in decoders)
    chunk = layers_of_chunk(config, deepest, shape, fused_kernels)
    if model.parallel.config.pipeline > 1:
        # The output that is sent to the next stage is kept until its backward pass.
        chunk += row
    tower, tower_remade = vision(model, shape, fused_kernels)
    total = in_flight(model, micro_batches) * chunk + max(remade(config, shape, fused_kernels), tower_remade)
    if any(decoder.pre_process for decoder in decoders):
        total += in_flight(model, micro_batches) * (shape.tokens * INT64 + tower)
    if any(decoder.post_process for decoder in decoders):
        total += _norm(config, local.cut, config.hidden_size, fused_kernels)
    if fused_kernels and model.parallel.config.shared_prompts:
        total += in_flight(model, micro_batches) * block_mask(shape)
    return total


def block_mask(shape: Shape) -> int:
    """Bytes of the block mask that all layers share for a pack with shared prompts on a GPU (``megatron_ext.flex``).

    The mask has one number for each key. For each block of queries it has the needed blocks of keys and their count,
    and the reverse for each block of keys. There is one such table for whole blocks and one for partly masked blocks.
    """
    blocks = -(-shape.tokens // BLOCK)
    return (shape.tokens + 4 * (blocks + blocks**2)) * INT32


def vision(model: Model, shape: Shape, fused_kernels: bool) -> tuple[int, int]:
    """Bytes that the vision tower saves for ``shape.patches`` of one image, and bytes that full recompute recomputes at
    a time.

    A frozen encoder runs before the passes and saves nothing. The projector saves, for each token, the input and output
    of the norm, the first layer's output and the second layer's input.
    """
    tower = model.tower
    if tower is None or not shape.patches:
        return 0, 0
    config = tower.config
    size = model.config.params_dtype.itemsize
    inner, width = _first_matrix(tower.projector)
    # Both families merge 2 x 2 patches into one token.
    tokens = shape.patches // 4
    norm = tokens * width * size
    if any(isinstance(module, torch.nn.RMSNorm) for module in tower.projector.children()):
        norm = _norm(config, shape.patches, config.hidden_size, fused_kernels)
    kept = norm + tokens * (width + 2 * inner) * size
    if encoder_is_frozen(tower):
        return kept, 0
    kept += _pixels(tower, shape)
    if fused_kernels:
        # The angles that the fused kernel reads. Without it, attention saves their sines and cosines, see below.
        kept += tower.layout_bytes(shape.patches)
    layer_inputs = 0
    layers = []
    for count, length in tower.sequences_per_layer(shape.patches):
        pack = Shape(count * length, 0, count, length)
        layer_inputs += pack.tokens * config.hidden_size * size
        layers.append(
            _norms_and_mlp(config, pack, fused_kernels)
            + attention(config, pack, fused_kernels, rotates=tower.rotates, causal=False)
            + tower.extra_saved_bytes(pack.tokens)
        )
    if config.recompute_granularity == "full":
        return kept + layer_inputs, max(layers)
    return kept + sum(layers), 0


def _first_matrix(projector: Any) -> tuple[int, int]:
    """The output and the input size of the projector's first linear layer on this rank."""
    outputs, inputs = next(weight.shape for weight in projector.parameters() if weight.dim() == 2)
    return outputs, inputs


def _pixels(tower: Any, shape: Shape) -> int:
    """Bytes of the pixels. A patch has as many numbers as a filter of the embedding's convolution."""
    convolution = next(weight for weight in tower.parameters() if weight.dim() > 3)
    return int(shape.patches * convolution[0].numel() * tower.dtype.itemsize)


def micro_batch(model: Model, shape: Shape, columns: int) -> int:
    """Bytes of one micro-batch on the device.

    It has the tokens with their positions on three axes, four indices and ``columns`` FP32 numbers for each predicted
    token, and on the ranks with the vision tower the images (``images``). With ``parallel.shared_prompts``, each token
    also has the number of its segment.
    """
    per_token = (5 if model.parallel.config.shared_prompts else 4) * INT64
    per_predicted_token = 4 * INT64 + columns * FP32
    return shape.tokens * per_token + shape.predicting * per_predicted_token + images(model, shape)


def images(model: Model, shape: Shape) -> int:
    """Bytes of the images that the passes read on this rank. 0 on ranks without the vision tower.

    Each tensor-parallel rank has a part of the pixels, and the tower's layout. With a frozen encoder, it has a part of
    the encoder's output instead of both. Each token of an image has two indices.
    """
    tower = model.tower
    if tower is None:
        return 0
    rows = shape.patches // 4 if encoder_is_frozen(tower) else tower.pixel_rows(shape.patches)
    ranks = model.parallel.tensor
    part = -(-rows // ranks) * whole_images(model, shape) // max(rows, 1)
    order = rows * INT64 if ranks > 1 else 0
    layout = 0 if encoder_is_frozen(tower) else tower.layout_bytes(shape.patches)
    indices = 2 * INT64 * shape.patches // 4
    return int(part + order + layout + indices)


def whole_images(model: Model, shape: Shape) -> int:
    """Bytes of the images over all tensor-parallel ranks: the pixels, or the output of a frozen encoder."""
    if encoder_is_frozen(model.tower):
        _, width = _first_matrix(model.tower.projector)
        return shape.patches // 4 * width * model.tower.dtype.itemsize
    return _pixels(model.tower, shape)


def images_on_host(model: Model, tokens: int, processed_tokens: int, ranks: int) -> int:
    """Upper bound of the bytes of images that a rank of the first stage keeps on the host. 0 on other stages.

    The rank keeps its share, as one of ``ranks``, of all processed pixels, which belong to ``processed_tokens`` tokens.
    It also keeps its tensor-parallel part of the pixels that its replica trains on in a step, and of the output of a
    frozen encoder. Each replica counts as if it trained on every image of the step, which has ``tokens`` tokens.
    """
    if model.tower is None:
        return 0
    processed = _pixels(model.tower, Shape(0, 0, 0, 0, patches=4 * processed_tokens))
    trained = Shape(0, 0, 0, 0, patches=4 * tokens)
    pixels = _pixels(model.tower, trained)
    encoded = whole_images(model, trained) if encoder_is_frozen(model.tower) else 0
    return processed // ranks + (pixels + encoded) // model.parallel.tensor


def micro_batches(model: Model, shape: Shape, columns: int) -> int:
    """Bytes of the micro-batches that are on the device at the same time.

    ``AHEAD`` micro-batches wait, and one is read. With virtual stages, as many are read as there are pipeline stages,
    and they are held until the last virtual stage has read them.

    Tensor-parallel ranks all-gather their parts of the images in the pass. The pixels that the pass saves for the
    backward pass of a trained tower are counted in ``vision``. Without tensor parallelism, these are the pixels of the
    micro-batch itself, so they are subtracted here.
    """
    layout = model.parallel.config
    being_read = layout.pipeline if layout.virtual_pipeline > 1 else 1
    total = (AHEAD + being_read) * micro_batch(model, shape, columns)
    if model.tower is None:
        return total
    if model.parallel.tensor > 1:
        total += whole_images(model, shape)
    elif not encoder_is_frozen(model.tower):
        total -= being_read * images(model, shape)
    return total


def logits(model: Model, shape: Shape) -> int:
    """Bytes of the logits and the tensors around them on the last pipeline stage. 0 on the other stages.

    These are the selected hidden states, the FP32 logits, a 16-bit copy of the logits in the forward pass and in the
    backward pass, and indices. The FP32 logits become the softmax and then the gradient in place. A scalar head has
    only the selected hidden states, an FP32 copy of them, and indices.
    """
    if not model.parallel.is_last_stage:
        return 0
    config = model.config
    size = config.params_dtype.itemsize
    is_16_bit = size < FP32
    selected_states = config.hidden_size * size
    if model.is_scalar:
        fp32_states = config.hidden_size * FP32 if is_16_bit else 0
        return shape.predicting * (selected_states + fp32_states + INT64)
    columns = model.sharding.padded_vocab // config.tensor_model_parallel_size
    row_of_logits = columns * (FP32 + (size if is_16_bit else 0))
    return shape.predicting * (selected_states + row_of_logits + 3 * INT64)


def workspace(model: Model, shape: Shape) -> int:
    """Bytes of the temporary tensors of one layer's backward pass, by our upper estimate.

    These are the all-gathered input of the MLP and its gradient, the gradients of gate, up and their product, and the
    gradient of the largest weight before it is added to the gradient buffer.
    """
    config = model.config
    size = config.params_dtype.itemsize
    ffn = config.ffn_hidden_size // config.tensor_model_parallel_size
    parameters = [parameter for chunk in model.chunks for parameter in chunk.module.parameters()]
    largest = max((parameter.numel() for parameter in parameters if parameter.requires_grad), default=0)
    per_token = 2 * config.hidden_size + 3 * ffn
    return (shape.tokens * per_token + largest) * size


# Numbers of Transformer Engine's buffers for overlapped communication (the defaults of ``initialize_ub``). The first
# kind is for inputs or gradients that are all-gathered, in FP8 if the matrix multiplies in FP8. The second kind is for
# outputs that are summed over the ranks.
GATHERING_BUFFERS = 8
SUMMING_BUFFERS = 4


def buffers(model: Model) -> int:
    """Bytes that Transformer Engine keeps from the first micro-batch on.

    For overlapped communication, it keeps a buffer of a pack's hidden states for each kind of matrix product. With
    gradient accumulation fusion, the gradients are already in Megatron-Core's buffers. Autograd receives a dummy tensor
    in their place, and Transformer Engine keeps one for each shape of matrix.
    """
    sizes = model.parallel.config
    config = model.config
    size = config.params_dtype.itemsize
    kept = 0
    if sizes.gradient_accumulation_fusion:
        matrices = [s.tensor.shape for s in model.shards if "decoder.layers." in s.name and s.tensor.dim() == 2]
        kept += sum(shape.numel() for shape in set(matrices)) * size
    if sizes.tp_comm_overlap:
        assert model.pack_tokens is not None
        elements = model.pack_tokens // sizes.context * config.hidden_size
        in_16_bits = (GATHERING_BUFFERS + SUMMING_BUFFERS) * size
        in_fp8 = GATHERING_BUFFERS + SUMMING_BUFFERS * size
        element_bytes = in_16_bits
        if config.fp8:
            element_bytes = in_fp8 + (in_16_bits if config.first_last_layers_bf16 else 0)
        kept += elements * element_bytes
    return kept


def kv_bytes_per_token(text: Any, tensor: int, size: int = 2) -> int:
    """Bytes of the keys and values of one token on one of ``tensor`` engine ranks, with ``size`` bytes per element.

    vLLM replicates the KV heads if there are fewer of them than ranks.
    """
    _, groups, head_dim = _attention_sizes(text)
    local_groups = max(1, groups // tensor)
    return 2 * text.num_hidden_layers * local_groups * head_dim * size


def _attention_sizes(text: Any) -> tuple[int, int, int]:
    """The numbers of query heads and of KV heads, and the elements of a head."""
    heads = text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads, groups, head_dim


def engine(
    text: Any,
    parameters: int,
    tensor: int,
    batched_tokens: int,
    sequences: int,
    step_tokens: int = 1,
    size: int = 2,
    fp8: bool = False,
) -> int:
    """Bytes of a vLLM rank's weights, and of its buffers by our estimate.

    The buffers are those of one layer for ``batched_tokens``, and FP32 logits and probabilities for ``sequences``. If a
    step verifies draft tokens, there are five FP32 tensors with all tokens of the step: the logits, the logits of the
    drafts, all logits in order, the logits of the accepted tokens, and their log-probs (vLLM's ``RejectionSampler``).

    Args:
        text: the language model's configuration.
        parameters: of the complete model.
        tensor: tensor-parallel size of the engine.
        batched_tokens: tokens of one step of the engine.
        sequences: sequences of one step.
        step_tokens: tokens of a sequence in one decoding step: its draft tokens and one more.
        size: bytes of a weight.
        fp8: whether the decoder's matrices have one byte per element. They then need additional room for the matrices
            of one layer, before and after quantisation (``rollout/weight_sync/quantised.py``).
    """
    per_token = 4 * text.hidden_size + 3 * text.intermediate_size // tensor
    layer_buffers = batched_tokens * per_token * size
    weights = parameters * size
    if fp8:
        layer = decoder_matrices(text)
        saved = text.num_hidden_layers * layer * (size - 1)
        quantisation = layer * (size + 1)
        weights += quantisation - saved
    weights_of_rank = -(-weights // tensor)
    copies = 2 if step_tokens == 1 else 5
    logits_and_probabilities = sequences * step_tokens * text.vocab_size * copies * FP32
    return weights_of_rank + layer_buffers + logits_and_probabilities


def decoder_matrices(text: Any) -> int:
    """Number of elements of one decoder layer's matrices: query, key, value, output, gate, up and down."""
    heads, groups, head_dim = _attention_sizes(text)
    query_and_output = 2 * heads * head_dim
    key_and_value = 2 * groups * head_dim
    return text.hidden_size * (query_and_output + key_and_value + 3 * text.intermediate_size)
