"""Build a Megatron-Core GPTModel for a Hugging Face configuration, in any layout."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_ext import platform
from megatron_ext.blocks import Shard
from megatron_ext.models import family
from megatron_ext.parallel import Parallel
from megatron_ext.weight_map import Sharding, shards

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
logger = logging.getLogger(__name__)


@dataclass
class Model:
    """A policy on this rank: ``chunks`` (Megatron-Core DDP), configuration, which HF weights its ``shards`` hold."""

    chunks: list[DistributedDataParallel]
    config: TransformerConfig
    hf_config: Any
    sharding: Sharding
    parallel: Parallel
    shards: list[Shard]


def sharding_of(hf_config: Any, tensor: int, tensor_rank: int) -> Sharding:
    """True head, group and vocabulary counts with this rank's tensor-parallel position."""
    heads = hf_config.num_attention_heads
    return Sharding(
        tensor=tensor,
        tensor_rank=tensor_rank,
        heads=heads,
        groups=getattr(hf_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        vocab=hf_config.vocab_size,
    )


def check(hf_config: Any, tensor: int, pipeline: int) -> None:
    """Raises ValueError naming the field when the architecture does not fit the layout."""
    family(hf_config.architectures[0]).gpt_options(hf_config)
    if hf_config.intermediate_size % tensor:
        raise ValueError(f"parallel.tensor={tensor} does not divide the model's ffn size {hf_config.intermediate_size}")
    if hf_config.num_hidden_layers % pipeline:
        raise ValueError(
            f"parallel.pipeline={pipeline} does not divide the model's {hf_config.num_hidden_layers} layers"
        )


def build(hf_config: Any, parallel: Parallel, precision: str, distributed_optimizer: bool) -> Model:
    """This rank's part of the model, zero-filled (load weights with ``hf_checkpoint.load``), wrapped for DDP.

    KV groups that the tensor-parallel size does not divide are zero padded: outputs are unchanged, padded weights get
    zero gradients and stay zero.
    """
    check(hf_config, parallel.tensor, parallel.pipeline)
    dtype = DTYPES[precision]
    arch = family(hf_config.architectures[0])
    sharding = sharding_of(hf_config, parallel.tensor, parallel.tensor_rank)
    if sharding.padded_groups != sharding.groups:
        logger.warning(
            "parallel.tensor=%d does not divide %d KV heads: attention is zero-padded to %d KV and %d query heads",
            parallel.tensor, sharding.groups, sharding.padded_groups, sharding.padded_heads,
        )  # fmt: skip
    config = TransformerConfig(
        **arch.transformer_options(hf_config),
        **platform.current().config_options(),
        num_attention_heads=sharding.padded_heads,
        num_query_groups=sharding.padded_groups,
        kv_channels=sharding.head_dim,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=parallel.pipeline > 1,
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
    module = GPTModel(
        config=config,
        transformer_layer_spec=platform.current().layer_specs(config),
        vocab_size=sharding.padded_vocab,
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=parallel.pipeline_rank == 0,
        post_process=parallel.is_last_stage,
        share_embeddings_and_output_weights=hf_config.tie_word_embeddings,
        **arch.gpt_options(hf_config),
    )
    module.to(device=platform.current().device(), dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
        check_for_nan_in_grad=True,  # raises before the update, so the weights stay usable
    )
    chunk = DistributedDataParallel(config=config, ddp_config=ddp, module=module)
    return Model(
        chunks=[chunk],
        config=config,
        hf_config=hf_config,
        sharding=sharding,
        parallel=parallel,
        shards=shards([chunk.module], arch.rules(hf_config), sharding),
    )
