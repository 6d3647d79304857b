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
from megatron_ext.layout import MLP, ParallelConfig, stage_layers
from megatron_ext.models import family
from megatron_ext.packed import RotaryAtPositions
from megatron_ext.parallel import Parallel
from megatron_ext.precision import PrecisionConfig
from megatron_ext.scalar_head import ScalarHead, has_scalar_head, with_scalar_head
from megatron_ext.vision_language import VisionLanguageModel
from megatron_ext.weight_map import (
    ModuleMapping,
    Sharding,
    global_layer_index,
    round_up,
    sharding_of,
    shards,
    unfused_name,
)

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
        pack_tokens: the tokens of every packed micro-batch on all context-parallel ranks together; None where they
            differ (``parallel.constant_length``).
        padded_vision_heads: heads of the vision tower after padding, 0 without a tower.
    """

    chunks: list[DistributedDataParallel]
    config: TransformerConfig
    hf_config: Any
    sharding: Sharding
    parallel: Parallel
    shards: list[Shard]
    token_multiple: int
    pack_tokens: int | None
    padded_vision_heads: int

    @property
    def is_scalar(self) -> bool:
        """Whether the model has a scalar head, which computes one number for each token and label instead of logits."""
        return has_scalar_head(self.hf_config)

    @property
    def tower(self) -> Any:
        """The vision tower on ranks of the first pipeline stage. None on other ranks and for a text model."""
        return getattr(self.chunks[0].module, "vision", None)

    @property
    def labels(self) -> int:
        """The number of outputs for each token.

        A scalar head has one output for each label. A language model has one output, the log-prob.
        """
        return self.hf_config.num_labels if self.is_scalar else 1


def check(hf_config: Any, sizes: ParallelConfig) -> None:
    """Check that the architecture is supported and fits the parallel sizes. Raises ValueError naming the field."""
    arch = family(hf_config.architectures[0])
    text = arch.text_config(hf_config)
    arch.gpt_options(text)
    arch.transformer_options(text)
    if text.intermediate_size % sizes.tensor:
        raise ValueError(
            f"parallel.tensor={sizes.tensor} does not divide the model's ffn size {text.intermediate_size}"
        )
    # The layers and stages that are left without a first or last stage whose number of layers is set.
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
    for stage, recomputed in enumerate(sizes.recompute_layers or []):
        of_chunk = stage_layers(sizes, text.num_hidden_layers, stage) // sizes.virtual_pipeline
        if recomputed > of_chunk:
            raise ValueError(
                f"parallel.recompute_layers={list(sizes.recompute_layers or [])}: a model chunk of stage {stage} has "
                f"{of_chunk} layers; use at most that, or null for all"
            )
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
    zero-padded. This does not change outputs. Padded weights get zero gradients and stay zero.

    Args:
        hf_config: transformers' configuration of the complete model.
        parallel: the parallel sizes and this rank's place.
        precision: the precision of weights, activations and matrix products.
        frozen: name prefixes of the Megatron parameters that are not trained. Layers are numbered in the complete
            model. "vision" is the vision tower without its projector.

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
    config = language_config(arch, text, sharding, sizes, precision, parallel.pipeline_rank)
    token_multiple = sizes.tensor * precision.token_multiple
    length = pack_tokens(sizes, token_multiple)
    if sizes.tp_comm_overlap:
        assert length is not None, "megatron_ext.layout.check refuses packs of other lengths"
        platform.current().overlap_tensor_parallel(config, length // sizes.context)
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
        if sizes.gradient_accumulation_fusion:
            platform.current().fuse_gradient_accumulation(module)
        chunks.append(DistributedDataParallel(config=config, ddp_config=ddp_config(sizes), module=module))
    if sizes.overlap_grad_reduce:
        # Gradients must not be reduced before the last micro-batch has been added.
        of_chunks = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = of_chunks if len(of_chunks) > 1 else of_chunks[0]
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
        token_multiple=token_multiple,
        pack_tokens=length,
        padded_vision_heads=sum(module.sharding.padded_heads for module in mappings if module.prefix == "vision."),
    )


def ddp_config(sizes: ParallelConfig) -> DistributedDataParallelConfig:
    """Megatron-Core's configuration of gradients and of their reduction.

    The all-gather of the weights is not overlapped with the next forward pass. It runs in the optimiser's step, because
    what follows an update (above all the weight sync to the engines) reads all weights.
    """
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=sizes.distributed_optimizer,
        overlap_grad_reduce=sizes.overlap_grad_reduce,
        overlap_param_gather=False,
    )


def recompute_options(sizes: ParallelConfig, stage: int) -> dict[str, Any]:
    """The TransformerConfig fields for recomputation on a pipeline stage.

    Stages may differ, because each rank has a configuration of its own and no stage depends on what another one keeps.
    """
    if sizes.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(sizes.recompute_modules)}
    if sizes.recompute != "full":
        return {}
    if sizes.recompute_layers is None:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    layers = sizes.recompute_layers[stage]
    if not layers:
        return {}
    # Recompute the first layers of each chunk, one layer at a time.
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": layers}


def tower_recompute_options(sizes: ParallelConfig) -> dict[str, Any]:
    """The TransformerConfig fields for recomputation in a vision tower.

    They are those of the first stage, except that feed-forward layers are not recomputed on their own. The tower's
    feed-forward layers have biases. Megatron-Core's activation checkpoint of such a layer returns the bias in addition
    to the output, and a parameter that a checkpoint returns is no longer a leaf of autograd's graph.
    """
    if sizes.recompute != "selective":
        return recompute_options(sizes, stage=0)
    modules = [module for module in sizes.recompute_modules if module != MLP]
    return {"recompute_granularity": "selective", "recompute_modules": modules} if modules else {}


def language_config(
    arch: Any, text: Any, sharding: Sharding, sizes: ParallelConfig, precision: PrecisionConfig, stage: int
) -> TransformerConfig:
    """Megatron-Core's configuration of the language model on a pipeline stage."""
    dtype = precision.dtype
    return TransformerConfig(
        **arch.transformer_options(text),
        **platform.current().config_options(),
        **recompute_options(sizes, stage),
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
        tp_comm_overlap=sizes.tp_comm_overlap,
        # Stages then send each other the shape of every tensor before the tensor.
        variable_seq_lengths=sizes.pipeline > 1 and not sizes.constant_length,
        # With two stages, the interleaved schedule without overlap confuses the two directions of communication between
        # the ranks.
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
    """Build the module of one virtual pipeline stage, not yet wrapped in DDP.

    The module is a GPTModel, or a VisionLanguageModel around it if the family has a vision tower. Raises ValueError for
    frozen parameters that do not work with the recomputation or with ``parallel.tp_comm_overlap``.
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
        # ``MicroBatch.positions`` already has only the positions of this context-parallel rank.
        model.rotary_pos_emb.cp_group = None
    if has_vision:
        recompute = tower_recompute_options(sizes)
        tower = arch.vision_tower(hf_config, parallel, config.params_dtype, recompute) if is_first else None
        model = VisionLanguageModel(config, model, tower, every_parameter=sizes.overlap_grad_reduce)
    for name, parameter in model.named_parameters():
        if any(frozen_by(prefix, global_name(model, name)) for prefix in frozen):
            parameter.requires_grad = False
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    embedding_is_frozen = not all(trained for name, trained in is_trained.items() if "word_embeddings" in name)
    if config.recompute_granularity == "full" and any(is_trained.values()) and embedding_is_frozen:
        raise ValueError(
            f"model.frozen={list(frozen)} with parallel.recompute='full': layers recomputed after a frozen "
            "embedding get no gradient from Megatron-Core; use parallel.recompute=selective, or train the embedding"
        )
    gathered = (".linear_qkv.weight", ".linear_fc1.weight")
    of_decoder = {name: trained for name, trained in is_trained.items() if "decoder.layers." in name}
    gathering = [trained for name, trained in of_decoder.items() if name.endswith(gathered)]
    if sizes.tp_comm_overlap and any(is_trained.values()) and not all(gathering):
        raise ValueError(
            f"model.frozen={list(frozen)} with parallel.tp_comm_overlap=true: Transformer Engine sums the gradient of "
            "a matrix's input over the ranks while it computes the matrix's own, which a frozen one does not have; use "
            "parallel.tp_comm_overlap=false, or train all layers"
        )
    if MLP in recomputed_modules(config) and is_first:
        check_recomputed_mlp(getattr(model, "language", model).decoder, embedding_is_frozen, frozen)
    return model


def recomputed_modules(config: TransformerConfig) -> list[str]:
    """The modules of a layer that are recomputed without the rest of the layer."""
    return config.recompute_modules if config.recompute_granularity == "selective" else []


def check_recomputed_mlp(decoder: Any, embedding_is_frozen: bool, frozen: Sequence[str]) -> None:
    """Check that every trained feed-forward layer that is recomputed gets a gradient. Raises ValueError otherwise.

    Megatron-Core computes a gradient for a recomputed layer only if the layer's input needs one, so only if something
    before it is trained.
    """
    reached = not embedding_is_frozen
    for layer in decoder.layers:
        trained = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
        of_mlp = [name for name in trained if name.startswith("mlp.")]
        reached = reached or len(of_mlp) < len(trained)
        if of_mlp and not reached:
            raise ValueError(
                f"model.frozen={list(frozen)} with parallel.recompute_modules=[mlp]: a feed-forward layer recomputed "
                "after frozen layers gets no gradient from Megatron-Core; use parallel.recompute=none, or train the "
                "attention before it"
            )
        reached = reached or bool(of_mlp)


def pack_tokens(sizes: ParallelConfig, token_multiple: int) -> int | None:
    """The value of ``Model.pack_tokens``. ``token_multiple`` is ``Model.token_multiple``."""
    if not sizes.constant_length:
        return None
    return round_up(sizes.micro_batch_tokens, token_multiple * sizes.token_multiple)


def shares_prompts(sizes: ParallelConfig) -> bool:
    """Whether the responses to a prompt share the prompt's passes.

    ``parallel.shared_prompts`` decides. If it is null, prompts are shared where the platform does so by default and
    there is no context parallelism.
    """
    if sizes.shared_prompts is not None:
        return sizes.shared_prompts
    usual = platform.capabilities(platform.current().name)
    return usual.shares_prompts and sizes.context == 1


def check_frozen(frozen: Sequence[str], mappings: Sequence[ModuleMapping], layers: int) -> None:
    """Check that every entry of ``model.frozen`` matches a parameter. Raises ValueError naming one that does not.

    Args:
        frozen: the entries of ``model.frozen``.
        mappings: the mappings of the family, which have every parameter of the complete model.
        layers: the number of decoder layers.
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
    """A parameter's name with the number of its layer in the complete model instead of on this pipeline stage.

    The name is the same on all platforms.
    """
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
