"""Build a Megatron-Core model for a Hugging Face configuration, in any layout."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_ext import platform
from megatron_ext.blocks import Shard
from megatron_ext.layout import ParallelConfig
from megatron_ext.models import family
from megatron_ext.packed import RotaryAtPositions
from megatron_ext.parallel import Parallel
from megatron_ext.precision import PrecisionConfig
from megatron_ext.scalar_head import ScalarHead, has_scalar_head, with_scalar_head
from megatron_ext.vision_language import VisionLanguageModel
from megatron_ext.weight_map import ModuleMapping, Sharding, global_layer_index, sharding_of, shards, unfused_name

# parallel.recompute → TransformerConfig fields.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
logger = logging.getLogger(__name__)


@dataclass
class Model:
    """This rank's part of a policy, critic, reward model or value model.

    Attributes:
        chunks: Megatron-Core's DDP modules, one per virtual pipeline stage.
        config: Megatron-Core's configuration of the language model.
        hf_config: transformers' configuration of the complete model.
        sharding: heads and vocabulary of the language model.
        parallel: the parallel sizes and this rank's place.
        shards: the local parameters with their blocks of Hugging Face tensors.
        token_multiple: the tokens of a packed micro-batch on one rank are padded to a multiple of this. Sequence
            parallelism divides them by the tensor-parallel size, and FP8 needs multiples of 16.
        padded_vision_heads: heads of the vision tower after padding, 0 without a tower.
    """

    chunks: list[DistributedDataParallel]
    config: TransformerConfig
    hf_config: Any
    sharding: Sharding
    parallel: Parallel
    shards: list[Shard]
    token_multiple: int
    padded_vision_heads: int

    @property
    def is_scalar(self) -> bool:
        """Whether the model has a scalar head: it computes one number for each token and label instead of logits."""
        return has_scalar_head(self.hf_config)

    @property
    def labels(self) -> int:
        """How many numbers the model computes for each token: one for each label of a scalar head; of a language model
        one, the log-probability."""
        return self.hf_config.num_labels if self.is_scalar else 1


def check(hf_config: Any, sizes: ParallelConfig) -> None:
    """Raises ValueError naming the field if the architecture is not supported or does not fit the parallel sizes."""
    arch = family(hf_config.architectures[0])
    text = arch.text_config(hf_config)
    arch.gpt_options(text)
    arch.transformer_options(text)
    if text.intermediate_size % sizes.tensor:
        raise ValueError(
            f"parallel.tensor={sizes.tensor} does not divide the model's ffn size {text.intermediate_size}"
        )
    # Layers and stages between the outer ones whose number of layers is set.
    inner_layers = text.num_hidden_layers
    inner_stages = sizes.pipeline
    for field, layers in (("first", sizes.first_stage_layers), ("last", sizes.last_stage_layers)):
        if layers is None:
            continue
        if sizes.pipeline == 1 or layers < 1 or layers % sizes.virtual_pipeline:
            raise ValueError(
                f"parallel.{field}_stage_layers={layers}: needs parallel.pipeline > 1 and a positive multiple of "
                f"parallel.virtual_pipeline={sizes.virtual_pipeline}; null shares the layers out evenly"
            )
        inner_layers -= layers
        inner_stages -= 1
    is_uneven = inner_layers % (max(inner_stages, 1) * sizes.virtual_pipeline) != 0
    has_no_stage = inner_stages == 0 and inner_layers != 0
    if inner_layers < 0 or is_uneven or has_no_stage:
        raise ValueError(
            f"parallel.pipeline={sizes.pipeline} does not divide the model's {text.num_hidden_layers} layers: "
            f"{inner_layers} are left for {inner_stages} stages of {sizes.virtual_pipeline} chunks "
            "(parallel.virtual_pipeline, parallel.first_stage_layers, parallel.last_stage_layers)"
        )


def build(hf_config: Any, parallel: Parallel, precision: PrecisionConfig, frozen: Sequence[str] = ()) -> Model:
    """Build this rank's part of the model with zero weights, wrapped in Megatron-Core's DDP.

    ``hf_checkpoint.load`` fills in the weights. Key-value heads that the tensor-parallel size does not divide are
    zero-padded: outputs do not change, and padded weights get zero gradients and stay zero.

    Args:
        hf_config: transformers' configuration of the complete model.
        parallel: the parallel sizes and this rank's place.
        precision: of weights, activations and matrix products.
        frozen: prefixes of the names of Megatron parameters that are not trained. Layers are numbered in the complete
            model; "vision" is the vision tower without its projector.

    Raises:
        ValueError: the architecture does not fit the parallel sizes, or ``frozen`` names no parameter or leaves
            nothing to train.
    """
    sizes = parallel.config
    check(hf_config, sizes)
    arch = family(hf_config.architectures[0])
    text = arch.text_config(hf_config)
    sharding = sharding_of(text, sizes.tensor, parallel.tensor_rank)
    if sharding.padded_groups != sharding.groups:
        logger.warning(
            "parallel.tensor=%d does not divide %d KV heads: attention is zero-padded to %d KV and %d query heads",
            sizes.tensor, sharding.groups, sharding.padded_groups, sharding.padded_heads,
        )  # fmt: skip
    config = language_config(arch, text, sharding, sizes, precision)
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=sizes.distributed_optimizer,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    mappings = arch.param_mappings(hf_config, sizes.tensor, parallel.tensor_rank)
    if has_scalar_head(hf_config):
        mappings = with_scalar_head(mappings)
    check_frozen(frozen, mappings, config.num_layers)
    chunks = []
    for stage in range(sizes.virtual_pipeline):
        module = build_chunk(hf_config, config, parallel, frozen, stage)
        module.to(device=platform.current().device(), dtype=precision.dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        chunks.append(DistributedDataParallel(config=config, ddp_config=ddp, module=module))
    if not any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()):
        raise ValueError(
            f"model.frozen={list(frozen)} leaves nothing to train on pipeline stage {parallel.pipeline_rank}, "
            "which Megatron-Core can't checkpoint: leave a layer of it out, or use a smaller parallel.pipeline"
        )
    return Model(
        chunks=chunks,
        config=config,
        hf_config=hf_config,
        sharding=sharding,
        parallel=parallel,
        shards=shards([chunk.module for chunk in chunks], mappings),
        token_multiple=sizes.tensor * precision.token_multiple,
        padded_vision_heads=sum(module.sharding.padded_heads for module in mappings if module.prefix == "vision."),
    )


def language_config(
    arch: Any, text: Any, sharding: Sharding, sizes: ParallelConfig, precision: PrecisionConfig
) -> TransformerConfig:
    """Megatron-Core's configuration of the language model."""
    dtype = precision.dtype
    return TransformerConfig(
        **arch.transformer_options(text),
        **platform.current().config_options(),
        **RECOMPUTE[sizes.recompute],
        **precision.transformer_options(),
        num_attention_heads=sharding.padded_heads,
        num_query_groups=sharding.padded_groups,
        kv_channels=sharding.head_dim,
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        virtual_pipeline_model_parallel_size=sizes.virtual_pipeline if sizes.virtual_pipeline > 1 else None,
        context_parallel_size=sizes.context,
        num_layers_in_first_pipeline_stage=sizes.first_stage_layers,
        num_layers_in_last_pipeline_stage=sizes.last_stage_layers,
        sequence_parallel=sizes.sequence,
        variable_seq_lengths=sizes.pipeline > 1,
        # With two stages, the interleaved schedule without overlap confuses the two directions between the ranks.
        overlap_p2p_comm=sizes.virtual_pipeline > 1,
        batch_p2p_comm=sizes.virtual_pipeline == 1,
        # Megatron-Core requires this for variable sequence lengths, in dense models too.
        moe_token_dispatcher_type="alltoall",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        # The loss is already divided by the counts of the complete batch, so gradients are summed over micro-batches
        # and data-parallel ranks.
        calculate_per_token_loss=True,
    )


def build_chunk(
    hf_config: Any, config: TransformerConfig, parallel: Parallel, frozen: Sequence[str], stage: int
) -> MegatronModule:
    """The module of one virtual pipeline stage, not yet wrapped in DDP.

    A GPTModel; a VisionLanguageModel around it if the family has a vision tower. Raises ValueError for frozen
    parameters that full recompute can't handle.
    """
    arch = family(hf_config.architectures[0])
    text = arch.text_config(hf_config)
    sizes = parallel.config
    is_first = parallel.pipeline_rank == 0 and stage == 0
    is_last = parallel.is_last_stage and stage == sizes.virtual_pipeline - 1
    has_vision = hasattr(arch, "vision_tower")
    is_scalar = has_scalar_head(hf_config)
    virtual_stage = stage if sizes.virtual_pipeline > 1 else None
    model: MegatronModule = GPTModel(
        config=config,
        transformer_layer_spec=platform.current().layer_specs(config, virtual_stage),
        vocab_size=sharding_of(text, sizes.tensor, parallel.tensor_rank).padded_vocab,
        max_sequence_length=text.max_position_embeddings,
        pre_process=is_first,
        post_process=is_last,
        share_embeddings_and_output_weights=text.tie_word_embeddings and not is_scalar,
        # VisionLanguageModel scatters the embeddings itself, after inserting the images' rows.
        scatter_embedding_sequence_parallel=not has_vision,
        vp_stage=virtual_stage,
        **arch.gpt_options(text),
    )
    if is_scalar and is_last:
        model.output_layer = ScalarHead(config.hidden_size, hf_config.num_labels, config.params_dtype)
    if model.position_embedding_type == "rope":
        model.rotary_pos_emb = RotaryAtPositions(model.rotary_pos_emb)
    if model.position_embedding_type == "mrope":
        # ``MicroBatch.positions`` are this context-parallel rank's already.
        model.rotary_pos_emb.cp_group = None
    if has_vision:
        recompute = RECOMPUTE[sizes.recompute]
        tower = arch.vision_tower(hf_config, parallel, config.params_dtype, recompute) if is_first else None
        model = VisionLanguageModel(config, model, tower)
    for name, parameter in model.named_parameters():
        if any(frozen_by(prefix, global_name(model, name)) for prefix in frozen):
            parameter.requires_grad = False
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embedding_is_frozen = not all(trained for name, trained in is_trained.items() if "word_embeddings" in name)
    if sizes.recompute == "full" and any(is_trained.values()) and embedding_is_frozen:
        raise ValueError(
            f"model.frozen={list(frozen)} with parallel.recompute='full': layers recomputed after a frozen "
            "embedding get no gradient from Megatron-Core; use parallel.recompute=selective, or train the embedding"
        )
    return model


def shares_prompts(sizes: ParallelConfig) -> bool:
    """Whether responses share their prompt's passes: as ``parallel.shared_prompts`` says, or where it can be."""
    if sizes.shared_prompts is not None:
        return sizes.shared_prompts
    possible = platform.capabilities(platform.current().name)
    return possible.has_shared_prompts and sizes.context == 1


def check_frozen(frozen: Sequence[str], mappings: Sequence[ModuleMapping], layers: int) -> None:
    """Raises ValueError naming an entry of ``model.frozen`` that matches no parameter.

    Args:
        frozen: the entries of ``model.frozen``.
        mappings: the mappings of the family, which have every parameter of the complete model.
        layers: number of decoder layers.
    """
    names = [module.prefix + param.megatron_name for module in mappings for param in module.params]
    for prefix in frozen:
        # The mappings have {} in place of a layer's number.
        pattern = re.sub(r"\.\d+(?=\.|$)", ".{}", prefix)
        if not any(frozen_by(pattern, name) for name in names):
            raise ValueError(
                f"model.frozen: {prefix!r} begins no parameter's name; those are like {names[0]}, {names[-1]} "
                "({}: the number of a layer in the complete model)"
            )
        match = re.search(r"\bdecoder\.layers\.(\d+)", prefix)
        if match is not None and int(match[1]) >= layers:
            raise ValueError(f"model.frozen: {prefix!r}: the decoder's layers are 0 to {layers - 1}")


def global_name(model: MegatronModule, name: str) -> str:
    """A parameter's name with the layer's number in the complete model instead of that on this pipeline stage, alike on
    all platforms."""
    match = re.match(r"(.*?\blayers)\.\d+", name)
    if match is None:
        return name
    layer = global_layer_index(model, match.group())
    return unfused_name(f"{match[1]}.{layer}{name[match.end() :]}")


def frozen_by(prefix: str, name: str) -> bool:
    """Whether the entry ``prefix`` of ``model.frozen`` covers the parameter ``name``.

    "vision" does not cover the projector, which has an entry of its own.
    """
    return name.startswith(f"{prefix}.") and (prefix != "vision" or not name.startswith("vision.projector."))
