"""A vision tower in front of a Megatron-Core GPTModel, and the tower's transformer layers."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import checkpoint
from megatron.core.tensor_parallel.mappings import scatter_to_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module

from megatron_ext import platform
from megatron_ext.packing import VisionBatch
from megatron_ext.weight_map import Sharding


class VisionLanguageModel(MegatronModule):
    """One pipeline stage: ``language``, and on the first stage ``vision``, whose output rows replace token embeddings.

    Megatron-Core's schedules, DDP and gradient reduction see the language model through this module: what they ask of a
    GPTModel is answered by ``language``.
    """

    def __init__(self, config: TransformerConfig, language: GPTModel, vision: torch.nn.Module | None) -> None:
        super().__init__(config=config)
        self.language = language
        self.vision = vision
        self.pre_process = language.pre_process
        self.post_process = language.post_process
        self.model_type = language.model_type
        self.vp_stage = language.vp_stage
        self.share_embeddings_and_output_weights = language.share_embeddings_and_output_weights

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        return self.language.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        self.language.set_input_tensor(input_tensor)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSeqParams,
        output_processor: Callable[..., torch.Tensor],
        output_processor_context: Any,
        vision: VisionBatch | None = None,
    ) -> torch.Tensor:
        """As GPTModel's, with the micro-batch's images and clips. A batch of text does not run the tower."""
        embeddings = None
        if self.vision is not None:
            # [T, 1, hidden] of all tokens, which the places count: sequence parallelism cuts behind the replacement.
            embeddings = self.language.embedding(input_ids=input_ids, position_ids=position_ids)
            if vision is not None:
                rows = self.vision(vision.pixels, vision.grid).index_select(0, vision.rows)
                embeddings = embeddings.index_copy(0, vision.places, rows.unsqueeze(1).to(embeddings.dtype))
            if self.config.sequence_parallel:
                # A copy, as in Megatron-Core's embedding: the cut is a view, which would keep all tokens' rows alive.
                embeddings = scatter_to_sequence_parallel_region(embeddings).clone()
        return self.language(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            decoder_input=embeddings,
            packed_seq_params=packed_seq_params,
            output_processor=output_processor,
            output_processor_context=output_processor_context,
        )


def tower_config(sharding: Sharding, dtype: torch.dtype, **options: Any) -> TransformerConfig:
    """A vision tower's configuration: heads as ``sharding`` pads them, what towers share, and the family's options."""
    return TransformerConfig(
        **platform.current().config_options() | options,
        num_attention_heads=sharding.padded_heads,
        num_query_groups=sharding.padded_groups,
        kv_channels=sharding.head_dim,
        add_bias_linear=True,
        tensor_model_parallel_size=sharding.tensor,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
    )


def tower_groups() -> ProcessGroupCollection:
    """Process groups of a vision tower: every context-parallel rank runs the whole of it."""
    groups = ProcessGroupCollection.use_mpu_process_groups()
    groups.cp = mpu.get_expert_model_parallel_group()  # a dense model's is this rank alone
    return groups


class EncoderLayers(torch.nn.ModuleList):
    """``config.num_layers`` bidirectional transformer layers, cut over the tensor-parallel group alone.

    Every context-parallel rank runs the whole tower, and no pipeline stage but the first has it.
    """

    def __init__(self, config: TransformerConfig) -> None:
        groups = tower_groups()
        spec = platform.current().encoder_layer(config)
        super().__init__(
            build_module(spec, config=config, layer_number=n + 1, pg_collection=groups, add_layer_offset=False)
            for n in range(config.num_layers)
        )
        self.recompute = config.recompute_granularity == "full"

    def forward(self, hidden: torch.Tensor, rotary: torch.Tensor, packs: Sequence[PackedSeqParams]) -> torch.Tensor:
        """[patches, 1, width], each layer with its own of the ``packs``. Under full recompute a layer keeps its input
        alone, as in Megatron-Core's TransformerBlock."""

        def run(n: int, hidden: torch.Tensor) -> torch.Tensor:
            output, _ = self[n](hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packs[n])
            return output

        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            hidden.requires_grad_()  # behind a frozen embedding a checkpoint would give the layers no gradient
        for n in range(len(self)):
            hidden = checkpoint(partial(run, n), False, hidden) if self.recompute else run(n, hidden)
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Each layer's own: Megatron-Core takes what a plain ModuleList holds for replicated."""
        layers: list[Any] = list(self)
        return {
            name: tensor
            for n, layer in enumerate(layers)
            for name, tensor in layer.sharded_state_dict(f"{prefix}{n}.", sharded_offsets, metadata).items()
        }
