"""A Megatron-Core GPTModel with a vision tower, and the transformer layers of such a tower."""

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


def gathered(part: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """Collective over the tensor-parallel ranks: all-gather the rows of which each rank has a ``part``.

    ``order`` [rows] is the index of each row in the concatenation of the parts. If ``order`` is None, ``part`` is
    complete and is returned as it is.
    """
    if order is None:
        return part
    group = mpu.get_tensor_model_parallel_group()
    parts = part.new_empty(group.size() * len(part), *part.shape[1:])
    torch.distributed.all_gather_into_tensor(parts, part, group=group)
    return parts.index_select(0, order)


class VisionLanguageModel(MegatronModule):
    """One pipeline stage: a GPTModel ``language``, and on the first stage a tower ``vision``.

    The tower's output rows replace the embeddings of the placeholder tokens. The module has the attributes of a
    GPTModel that Megatron-Core's schedules, DDP and gradient reduction read.
    """

    def __init__(
        self, config: TransformerConfig, language: GPTModel, vision: torch.nn.Module | None, every_parameter: bool
    ) -> None:
        """With ``every_parameter`` every trained parameter gets a gradient in every micro-batch, even if it is zero."""
        super().__init__(config=config)
        self.every_parameter = every_parameter
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
        """GPTModel's forward pass with the images and clips of the micro-batch in ``vision``.

        A micro-batch without images (None) does not run the tower.
        """
        embeddings = None
        if self.vision is not None:
            # [T, 1, hidden] of all tokens of the pack, because ``vision.places`` are positions in the complete pack.
            # Sequence parallelism scatters the rows after the replacement.
            embeddings = self.language.embedding(input_ids=input_ids, position_ids=position_ids)
            if vision is not None:
                images = gathered(vision.images, vision.order)
                tower: Any = self.vision
                of_images = tower.projector(images) if vision.encoded else tower(images, vision.layout)
                rows = of_images.index_select(0, vision.rows)
                embeddings = embeddings.index_copy(0, vision.places, rows.unsqueeze(1).to(embeddings.dtype))
            elif self.every_parameter and torch.is_grad_enabled():
                embeddings = embeddings + self._zero_of_tower()
            if self.config.sequence_parallel:
                # Cloned, as in Megatron-Core's embedding: the scattered part is a view that would keep all rows alive.
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

    def _zero_of_tower(self) -> torch.Tensor | float:
        """A 0 that depends on every trained parameter of the tower, so that each gets a gradient of zeros.

        Used for a micro-batch without images.
        """
        assert self.vision is not None
        firsts = [p.flatten()[0] for p in self.vision.parameters() if p.requires_grad]
        return 0.0 * torch.stack(firsts).sum() if firsts else 0.0


def tower_config(sharding: Sharding, dtype: torch.dtype, **options: Any) -> TransformerConfig:
    """Megatron-Core's configuration of a vision tower.

    Args:
        sharding: the tower's heads.
        dtype: dtype of weights and activations.
        options: the family's TransformerConfig fields.
    """
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
    """Process groups of a vision tower.

    The tower is not context-parallel: each context-parallel rank runs the complete tower.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # In a dense model this group is the rank alone.
    groups.cp = mpu.get_expert_model_parallel_group()
    return groups


class EncoderLayers(torch.nn.ModuleList):
    """``config.num_layers`` bidirectional transformer layers, sharded over the tensor-parallel group only.

    Every context-parallel rank runs the complete tower, and only the first pipeline stage has it.
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
        """Hidden states [patches, 1, width] → the same shape.

        Args:
            hidden: embedded patches.
            rotary: rotary angles [patches, 1, 1, head_dim].
            packs: for each layer, the sequences within which it attends.

        Under full recompute only the inputs of the layers are saved, as in Megatron-Core's TransformerBlock.
        """

        def run(n: int, hidden: torch.Tensor) -> torch.Tensor:
            output, _ = self[n](hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=packs[n])
            return output

        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            # After a frozen embedding the input needs no gradient, and a recomputed layer would then get none either.
            hidden.requires_grad_()
        for n in range(len(self)):
            hidden = checkpoint(partial(run, n), False, hidden) if self.recompute else run(n, hidden)
        return hidden

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The sharded states of the layers. Megatron-Core would treat those of a plain ModuleList as replicated."""
        layers: list[Any] = list(self)
        state: dict[str, Any] = {}
        for n, layer in enumerate(layers):
            state |= layer.sharded_state_dict(f"{prefix}{n}.", sharded_offsets, metadata)
        return state
