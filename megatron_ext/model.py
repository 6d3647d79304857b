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
from megatron_ext.parallel import Parallel
from megatron_ext.precision import PrecisionConfig
from megatron_ext.scalar_head import ScalarHead, has_scalar_head, with_scalar_head
from megatron_ext.vision_language import VisionLanguageModel
from megatron_ext.weight_map import ModuleMapping, Sharding, global_layer_index, sharding_of, shards

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
logger = logging.getLogger(__name__)


@dataclass
class Model:
    """A policy, critic or reward model on this rank: ``chunks`` (Megatron-Core DDP, one per virtual stage), the HF
    weights of its ``shards``.

    ``hf_config`` is the whole model's configuration; ``config`` and ``sharding`` are the language model's. Tokens of a
    packed micro-batch on one rank come padded to ``token_multiple``: sequence parallelism cuts them, FP8 wants 16.
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
        """Whether it gives each token a number (``scalar_head``) and not a distribution."""
        return has_scalar_head(self.hf_config)


def check(hf_config: Any, sizes: ParallelConfig) -> None:
    """Raises ValueError naming the field when the architecture does not fit the layout."""
    arch = family(hf_config.architectures[0])
    text = arch.text_config(hf_config)
    arch.gpt_options(text)
    arch.transformer_options(text)
    if text.intermediate_size % sizes.tensor:
        raise ValueError(
            f"parallel.tensor={sizes.tensor} does not divide the model's ffn size {text.intermediate_size}"
        )
    inner, stages = text.num_hidden_layers, sizes.pipeline
    for field, layers in (("first", sizes.first_stage_layers), ("last", sizes.last_stage_layers)):
        if layers is None:
            continue
        if sizes.pipeline == 1 or layers < 1 or layers % sizes.virtual_pipeline:
            raise ValueError(
                f"parallel.{field}_stage_layers={layers}: needs parallel.pipeline > 1 and a positive multiple of "
                f"parallel.virtual_pipeline={sizes.virtual_pipeline}; null shares the layers out evenly"
            )
        inner, stages = inner - layers, stages - 1
    if inner < 0 or inner % (max(stages, 1) * sizes.virtual_pipeline) or (stages == 0 and inner):
        raise ValueError(
            f"parallel.pipeline={sizes.pipeline} does not divide the model's {text.num_hidden_layers} layers: {inner} "
            f"are left for {stages} stages of {sizes.virtual_pipeline} chunks (parallel.virtual_pipeline, "
            "parallel.first_stage_layers, parallel.last_stage_layers)"
        )


def build(hf_config: Any, parallel: Parallel, precision: PrecisionConfig, frozen: Sequence[str] = ()) -> Model:
    """This rank's part of the model, zero-filled (load weights with ``hf_checkpoint.load``), wrapped for DDP.

    ``frozen``: prefixes of Megatron parameter names that are not trained, with the full model's layer numbers; "vision"
    is the tower without its projector. KV groups that the tensor-parallel size does not divide are zero padded: outputs
    are unchanged, padded weights get zero gradients and stay zero.
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
        **precision.ddp_options(),
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
        # The interleaved schedule's other way mixes up both directions between the same two ranks when there are two.
        overlap_p2p_comm=sizes.virtual_pipeline > 1,
        batch_p2p_comm=sizes.virtual_pipeline == 1,
        moe_token_dispatcher_type="alltoall",  # Megatron-Core ties variable lengths to this, dense models included
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        # The loss is already divided by the whole batch's counts: sum over micro-batches and data-parallel ranks.
        calculate_per_token_loss=True,
    )


def build_chunk(
    hf_config: Any, config: TransformerConfig, parallel: Parallel, frozen: Sequence[str], stage: int
) -> MegatronModule:
    """The bare module of one virtual stage: GPTModel, in a VisionLanguageModel where the family has a vision tower."""
    arch = family(hf_config.architectures[0])
    text = arch.text_config(hf_config)
    sizes = parallel.config
    first = parallel.pipeline_rank == 0 and stage == 0
    last = parallel.is_last_stage and stage == sizes.virtual_pipeline - 1
    sees, scalar = hasattr(arch, "vision_tower"), has_scalar_head(hf_config)
    virtual = stage if sizes.virtual_pipeline > 1 else None
    model: MegatronModule = GPTModel(
        config=config,
        transformer_layer_spec=platform.current().layer_specs(config, virtual),
        vocab_size=sharding_of(text, sizes.tensor, parallel.tensor_rank).padded_vocab,
        max_sequence_length=text.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=text.tie_word_embeddings and not scalar,
        scatter_embedding_sequence_parallel=not sees,  # the tower's rows go in first
        vp_stage=virtual,
        **arch.gpt_options(text),
    )
    if scalar and last:
        model.output_layer = ScalarHead(config.hidden_size, config.params_dtype)
    if model.position_embedding_type == "mrope":
        model.rotary_pos_emb.cp_group = None  # positions of a packed batch are cut behind the rotation, not before
    if sees:
        recompute = RECOMPUTE[sizes.recompute]
        tower = arch.vision_tower(hf_config, parallel, config.params_dtype, recompute) if first else None
        model = VisionLanguageModel(config, model, tower)
    for name, parameter in model.named_parameters():
        if any(frozen_by(prefix, global_name(model, name)) for prefix in frozen):
            parameter.requires_grad = False
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if (
        sizes.recompute == "full"
        and any(trained.values())
        and not all(trains for name, trains in trained.items() if "word_embeddings" in name)
    ):
        raise ValueError(
            f"model.frozen={list(frozen)} with parallel.recompute='full': layers made again behind a frozen "
            "embedding get no gradient from Megatron-Core; use parallel.recompute=selective, or train the embedding"
        )
    return model


def check_frozen(frozen: Sequence[str], mappings: Sequence[ModuleMapping], layers: int) -> None:
    """Raises ValueError naming an entry of ``model.frozen`` that is no beginning of any parameter's name; ``layers``:
    how many the decoder has."""
    names = [module.prefix + param.megatron_name for module in mappings for param in module.params]
    for prefix in frozen:
        if not any(frozen_by(re.sub(r"\.\d+(?=\.|$)", ".{}", prefix), name) for name in names):
            raise ValueError(
                f"model.frozen: {prefix!r} begins no parameter's name; those are like {names[0]}, {names[-1]} "
                "({}: the number of a layer in the whole model)"
            )
        if (match := re.search(r"\bdecoder\.layers\.(\d+)", prefix)) and int(match[1]) >= layers:
            raise ValueError(f"model.frozen: {prefix!r}: the decoder's layers are 0 to {layers - 1}")


def global_name(model: MegatronModule, name: str) -> str:
    """A parameter's name with its layer's number in the whole model, not that on this pipeline stage."""
    if not (match := re.match(r"(.*?\blayers)\.\d+", name)):
        return name
    return f"{match[1]}.{global_layer_index(model, match.group())}{name[match.end() :]}"


def frozen_by(prefix: str, name: str) -> bool:
    """Whether ``model.frozen``'s entry covers a parameter; a tower's projector is named for itself."""
    return name.startswith(f"{prefix}.") and (prefix != "vision" or not name.startswith("vision.projector."))
