"""Qwen2.5-VL (7B, 72B): Qwen2.5 with mRoPE, and a vision tower with window attention, as in transformers' model.

The tower treats images and video clips alike. Its input is the patches and their grid (frames, rows, columns). Patches
are ordered in units of ``spatial_merge_size`` x ``spatial_merge_size``. The projector merges one unit into one token.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule

from megatron_ext.models import qwen2
from megatron_ext.packing import OnDevice
from megatron_ext.parallel import Parallel
from megatron_ext.vision_language import EncoderLayers, tower_config
from megatron_ext.weight_map import (
    ModuleMapping,
    ParamMapping,
    Sharding,
    attention_output,
    column_parallel,
    fused_qkv,
    gate_up,
    replicated,
    row_parallel,
    sharding_of,
)

_BLOCK = "visual.blocks.{}."
_GATE_UP = tuple(f"{_BLOCK}mlp.{p}_proj." for p in ("gate", "up"))
VISION_MAPPINGS = (
    ParamMapping(("visual.patch_embed.proj.weight",), "patch_embed.weight", replicated),
    ParamMapping((f"{_BLOCK}norm1.weight",), "layers.{}.input_layernorm.weight", replicated),
    ParamMapping((f"{_BLOCK}attn.qkv.weight",), "layers.{}.self_attention.linear_qkv.weight", fused_qkv),
    ParamMapping((f"{_BLOCK}attn.qkv.bias",), "layers.{}.self_attention.linear_qkv.bias", fused_qkv),
    ParamMapping((f"{_BLOCK}attn.proj.weight",), "layers.{}.self_attention.linear_proj.weight", attention_output),
    ParamMapping((f"{_BLOCK}attn.proj.bias",), "layers.{}.self_attention.linear_proj.bias", replicated),
    ParamMapping((f"{_BLOCK}norm2.weight",), "layers.{}.pre_mlp_layernorm.weight", replicated),
    ParamMapping(tuple(f"{name}weight" for name in _GATE_UP), "layers.{}.mlp.linear_fc1.weight", gate_up),
    ParamMapping(tuple(f"{name}bias" for name in _GATE_UP), "layers.{}.mlp.linear_fc1.bias", gate_up),
    ParamMapping((f"{_BLOCK}mlp.down_proj.weight",), "layers.{}.mlp.linear_fc2.weight", row_parallel),
    ParamMapping((f"{_BLOCK}mlp.down_proj.bias",), "layers.{}.mlp.linear_fc2.bias", replicated),
    ParamMapping(("visual.merger.ln_q.weight",), "projector.norm.weight", replicated),
    ParamMapping(("visual.merger.mlp.0.weight",), "projector.linear_fc1.weight", column_parallel),
    ParamMapping(("visual.merger.mlp.0.bias",), "projector.linear_fc1.bias", column_parallel),
    ParamMapping(("visual.merger.mlp.2.weight",), "projector.linear_fc2.weight", row_parallel),
    ParamMapping(("visual.merger.mlp.2.bias",), "projector.linear_fc2.bias", replicated),
)
# Prefix of tensor names in checkpoints saved by transformers 4.52 and later → prefix in published checkpoints.
RENAMED = {"model.language_model.": "model.", "model.visual.": "visual."}
# The epsilon of every norm in the tower. transformers' model does not read it from the configuration either.
_EPSILON = 1e-6


def text_config(hf_config: Any) -> Any:
    """The language model's configuration. ``tie_word_embeddings`` is taken from the outer configuration."""
    text = copy.copy(hf_config.text_config)
    text.tie_word_embeddings = hf_config.tie_word_embeddings
    return text


def param_mappings(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[ModuleMapping, ...]:
    """Language model and vision tower, with the tensor names of the published checkpoints.

    Raises ValueError when the tensor-parallel size does not divide the tower's feed-forward size.
    """
    text = text_config(hf_config)
    ffn = hf_config.vision_config.intermediate_size
    if ffn % tensor:
        raise ValueError(
            f"parallel.tensor={tensor} does not divide the vision tower's ffn size {ffn}: use one that does"
        )
    return (
        ModuleMapping("language.", qwen2.decoder_mappings(text), sharding_of(text, tensor, tensor_rank)),
        ModuleMapping("vision.", VISION_MAPPINGS, _vision_sharding(hf_config.vision_config, tensor, tensor_rank)),
    )


def transformer_options(text: Any) -> dict[str, Any]:
    """Qwen2.5's TransformerConfig fields and the numbers of rotary frequencies for time, height and width."""
    return qwen2.transformer_options(text) | {"mrope_section": text.rope_parameters["mrope_section"]}


def gpt_options(text: Any) -> dict[str, Any]:
    """Qwen2.5's GPTModel arguments with multimodal RoPE."""
    return qwen2.gpt_options(text) | {"position_embedding_type": "mrope"}


def prompt_positions(
    hf_config: Any, tokens: Sequence[int], grid: torch.Tensor, seconds: Sequence[float] = ()
) -> list[list[int]]:
    """mRoPE positions [3][tokens] (time, height, width) of a prompt with images and video clips, as vLLM counts them.

    Text advances all three axes together. The positions of an image or clip start where the text before it stopped. The
    text after it continues from the largest of its positions plus 1. In that last step transformers 5 ignores a clip's
    time (get_rope_index). Qwen's own code did not.

    Args:
        hf_config: the complete model's configuration.
        tokens: token ids of the prompt, with one placeholder for each token of an image or clip.
        grid: (frames, rows, columns) in patches [images and clips, 3], in the order of the prompt.
        seconds: for each clip, the time in seconds from one frame of the grid to the next.

    Raises:
        ValueError: tokens, grid and seconds do not fit together.
    """
    merge = hf_config.vision_config.spatial_merge_size
    per_second = hf_config.vision_config.tokens_per_second
    placeholders = (hf_config.image_token_id, hf_config.video_token_id)
    axes: list[list[int]] = [[], [], []]
    # The position of the next text token, and the first token that has no positions yet.
    position = 0
    done = 0
    seconds_of_clip = iter(seconds)
    for frames, height, width in grid.tolist():
        first = next((i for i in range(done, len(tokens)) if tokens[i] in placeholders), len(tokens))
        rows = height // merge
        columns = width // merge
        count = frames * rows * columns
        image = tokens[first : first + count]
        if len(image) < count or len(set(image)) > 1:
            raise ValueError(
                f"the {len(image)} tokens from place {first} on are not one image or clip of {rows=} {columns=}"
            )
        time_step = 1.0
        if image[0] == hf_config.video_token_id:
            time_step = per_second * next(seconds_of_clip, 0.0)
            if time_step == 0:
                raise ValueError(f"seconds={list(seconds)}: give a positive number for each video clip")
        text = range(position, position + first - done)
        position += len(text)
        times = [int(frame * time_step) for frame in range(frames)]
        axes[0] += [*text, *(position + time for time in times for _ in range(rows * columns))]
        axes[1] += [*text, *(position + row for _ in times for row in range(rows) for _ in range(columns))]
        axes[2] += [*text, *(position + column for _ in range(frames * rows) for column in range(columns))]
        position += max(times[-1] + 1, rows, columns)
        done = first + count
    if any(token in placeholders for token in tokens[done:]):
        raise ValueError(f"more placeholder tokens than the grid {grid.tolist()} has images and clips")
    for axis in axes:
        axis += range(position, position + len(tokens) - done)
    return axes


def tower_is_quantised(hf_config: Any) -> bool:
    """Whether vLLM quantises the tower when it quantises the model."""
    return True


def vision_tower(hf_config: Any, parallel: Parallel, dtype: torch.dtype, recompute: dict[str, Any]) -> "VisionTower":
    """The tower and projector of the first pipeline stage, sharded over the tensor-parallel group.

    ``recompute`` has TransformerConfig's fields for recomputation.
    """
    vision = hf_config.vision_config
    sharding = _vision_sharding(vision, parallel.tensor, parallel.tensor_rank)
    config = tower_config(
        sharding,
        dtype,
        **recompute,
        num_layers=vision.depth,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=_EPSILON,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_qkv_bias=True,
    )
    return VisionTower(config, vision)


def _vision_sharding(vision: Any, tensor: int, tensor_rank: int) -> Sharding:
    heads = vision.num_heads
    return Sharding(tensor, tensor_rank, heads, heads, vision.hidden_size // heads, vocab=0)


class VisionTower(MegatronModule):
    """Patches [patches, channels x frames x patch x patch] and their layout → rows [tokens, language hidden size].

    The layers in ``fullatt_block_indexes`` attend within a frame, all others within windows of ``window_size`` pixels.
    The layers process the patches in the order of windows. Before the projector the tokens are put back in their
    original order.
    """

    # For the memory estimate: attention has rotary embeddings.
    rotates = True

    def __init__(self, config: TransformerConfig, vision: Any) -> None:
        super().__init__(config=config)
        self.hf_config = vision
        self.dtype = config.params_dtype
        self.patch_embed = PatchEmbedding(vision, config.params_dtype)
        self.layers = EncoderLayers(config)
        self.projector = Projector(config, vision)

    def sequences_per_layer(self, patches: int) -> list[tuple[int, int]]:
        """For the memory estimate: (number, length) of the sequences in which each layer attends to one image.

        The last window of an image counts as a full one.
        """
        window = (self.hf_config.window_size // self.hf_config.patch_size) ** 2
        windows = -(-patches // window)
        full_attention = self.hf_config.fullatt_block_indexes
        return [(1, patches) if n in full_attention else (windows, window) for n in range(len(self.layers))]

    def extra_saved_bytes(self, rows: int) -> int:
        """For the memory estimate: bytes that a layer saves beyond Megatron-Core's layer."""
        return 0

    def pixel_rows(self, patches: int) -> int:
        """For the memory estimate: rows of the pixels, which are split over tensor-parallel ranks. A row is a patch."""
        return patches

    def layout_bytes(self, patches: int) -> int:
        """For the memory estimate: bytes of a :class:`TowerLayout`, without the bounds of its sequences."""
        angles = patches * self.config.kv_channels * 4
        orders = 2 * 8 * patches // self.hf_config.spatial_merge_size**2
        return angles + orders

    def layout(self, grid: torch.Tensor, on_device: OnDevice) -> "TowerLayout":
        """Compute the :class:`TowerLayout` of a micro-batch. ``grid`` [images, 3] is on the host."""
        vision = self.hf_config
        sizes = grid.tolist()
        # The number of patches in a unit.
        unit = vision.spatial_merge_size**2
        window_side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        order, windows = window_order(sizes, vision.spatial_merge_size, window_side)
        angles = rotary_angles(sizes, vision)
        angles = angles.view(-1, unit, angles.shape[-1])[order].view(-1, 1, 1, angles.shape[-1])
        return TowerLayout(
            order=on_device(order),
            back=on_device(order.argsort()),
            angles=on_device(angles),
            by_window=_packed([units * unit for units in windows], on_device),
            by_frame=_packed([rows * columns for frames, rows, columns in sizes for _ in range(frames)], on_device),
        )

    def forward(self, pixels: torch.Tensor, layout: "TowerLayout") -> torch.Tensor:
        """See the class."""
        return self.projector(self.encode(pixels, layout))

    def encode(self, pixels: torch.Tensor, layout: "TowerLayout") -> torch.Tensor:
        """Compute the input of the projector: [tokens, 4 x width], the four patches of a token side by side."""
        vision = self.hf_config
        hidden = self.patch_embed(pixels)
        hidden = hidden.view(-1, vision.spatial_merge_size**2, hidden.shape[-1])[layout.order]
        hidden = hidden.view(-1, 1, hidden.shape[-1])
        full_attention = vision.fullatt_block_indexes
        packs = [layout.by_frame if n in full_attention else layout.by_window for n in range(len(self.layers))]
        return self.layers(hidden, layout.angles, packs).view(-1, self.projector.width)[layout.back]


@dataclass(frozen=True)
class TowerLayout:
    """The inputs of the tower in addition to the patches.

    They are computed once for each micro-batch, and are on the device before the pass begins.
    """

    # [units]: the index of the unit of patches at each place in the order of windows.
    order: torch.Tensor
    # [units]: the place of each unit in the order of windows.
    back: torch.Tensor
    # [patches, 1, 1, head_dim]: rotary angles, in the order of windows.
    angles: torch.Tensor
    # The sequences within which layers attend: windows or frames.
    by_window: PackedSeqParams
    by_frame: PackedSeqParams


class PatchEmbedding(torch.nn.Module):
    """Patches [N, channels x frames x patch x patch] → [N, hidden size].

    A convolution whose stride equals its kernel size is one matrix product. ``weight`` keeps the convolution's shape.
    """

    def __init__(self, vision: Any, dtype: torch.dtype) -> None:
        super().__init__()
        kernel = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
        self.weight = torch.nn.Parameter(torch.empty(vision.hidden_size, vision.in_channels, *kernel, dtype=dtype))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.linear(pixels, self.weight.flatten(1))


class Projector(MegatronModule):
    """Four patches of each token side by side, [N, 4 x width] → rows [N, language model's hidden size].

    Sharded over the tensor-parallel group: the 72B model's projector has 68 million weights, which with FP32 gradients
    and optimiser states would otherwise take over a GB on every rank.
    """

    def __init__(self, config: TransformerConfig, vision: Any) -> None:
        super().__init__(config=config)
        self.width = vision.hidden_size * vision.spatial_merge_size**2
        self.patch_width = vision.hidden_size
        options = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": False}
        self.norm = torch.nn.RMSNorm(vision.hidden_size, eps=_EPSILON, dtype=config.params_dtype)
        self.linear_fc1 = ColumnParallelLinear(self.width, self.width, gather_output=False, **options)
        self.linear_fc2 = RowParallelLinear(self.width, vision.out_hidden_size, input_is_parallel=True, **options)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide, _ = self.linear_fc1(self.norm(hidden.view(-1, self.patch_width)).view(-1, self.width))
        rows, _ = self.linear_fc2(F.gelu(wide))
        return rows


def window_order(sizes: list[list[int]], merge: int, side: int) -> tuple[torch.Tensor, list[int]]:
    """Order the units by windows of ``side`` x ``side`` units. Windows at the right and lower edges may be smaller.

    Args:
        sizes: (frames, rows, columns) in patches of each image or clip.
        merge: the number of rows, and of columns, of patches in a unit.
        side: the number of rows, and of columns, of units in a window.

    Returns:
        The old index of the unit at each new position [units], and the number of units in each window.
    """
    windows: list[torch.Tensor] = []
    first = 0
    for frames, rows, columns in sizes:
        shape = (frames, rows // merge, columns // merge)
        count = shape[0] * shape[1] * shape[2]
        units = torch.arange(first, first + count).view(shape)
        first += count
        for frame in units:
            for band in frame.split(side):
                windows += [window.flatten() for window in band.split(side, dim=1)]
    return torch.cat(windows), [window.numel() for window in windows]


def rotary_angles(sizes: list[list[int]], vision: Any) -> torch.Tensor:
    """Rotary angles [patches, head_dim] in FP32.

    The first quarter of the head is rotated by the patch's row, the second quarter by its column. The second half of
    the head has the same angles again, for the other element of each rotated pair.
    """
    merge = vision.spatial_merge_size
    half = vision.hidden_size // vision.num_heads // 2
    frequencies = 1 / vision.rope_parameters["rope_theta"] ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    places = []
    for frames, rows, columns in sizes:
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
        blocks = grid.view(rows // merge, merge, columns // merge, merge, 2).transpose(1, 2).reshape(-1, 2)
        places.append(blocks.repeat(frames, 1))
    angles = (torch.cat(places)[..., None] * frequencies).flatten(1)
    return torch.cat((angles, angles), dim=1)


def _packed(lengths: list[int], on_device: OnDevice) -> PackedSeqParams:
    """Megatron-Core's description of a pack of sequences with these lengths."""
    starts = on_device(torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32))
    longest = max(lengths)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=longest, max_seqlen_kv=longest
    )
