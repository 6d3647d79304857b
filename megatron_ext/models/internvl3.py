"""InternVL3: InternViT (6B or 300M), pixel shuffle and projector before Qwen2.5, in both layouts of the hub.

``-hf`` repositories hold transformers' InternVLForConditionalGeneration. The original "chat" repositories hold
InternVLChatModel and its code. ``config_from_chat`` reads the configuration without running that code.
``hf_config.architectures`` says which of the two layouts a model has. The tower follows transformers'
modeling_internvl.py.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from transformers import InternVLConfig, Qwen2Config

from megatron_ext import platform
from megatron_ext.models import qwen2
from megatron_ext.models.qwen2 import transformer_options
from megatron_ext.packing import OnDevice
from megatron_ext.parallel import Parallel
from megatron_ext.vision_language import tower_config, tower_groups
from megatron_ext.weight_map import (
    ModuleMapping,
    ParamMapping,
    ShardFn,
    Sharding,
    attention_output,
    column_parallel,
    fused_qkv,
    head_vector,
    qkv,
    replicated,
    row_parallel,
    sharding_of,
)

__all__ = [
    "config_from_chat",
    "gpt_options",
    "param_mappings",
    "text_config",
    "tower_is_quantised",
    "transformer_options",
    "vision_tower",
]

CHAT = "InternVLChatModel"
NORMS = {"rms_norm": "RMSNorm", "layer_norm": "LayerNorm"}
_SAME_IN_CHAT = (
    "hidden_size",
    "hidden_act",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "norm_type",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
)
# transformers fixes the epsilon of the QK-norm. layer_norm_eps is the epsilon of the other norms.
QK_NORM_EPSILON = 1e-6
# The beginning of a tower layer's names in Megatron-Core, in the -hf layout and in the chat layout.
LAYER = "encoder.layers.{}."
HF_LAYER = "vision_tower.encoder.layer.{}."
CHAT_LAYER = "vision_model.encoder.layers.{}."
# Each row: the parameter's name in Megatron-Core's tower, how it is sharded, the name in the -hf layout, and the name
# in the chat layout. ``*`` stands for weight and bias. ``_vision_mappings`` adds query, key and value, which are three
# tensors in the -hf layout and one in the chat layout.
TABLE: tuple[tuple[str, ShardFn, str, str], ...] = (
    ("class_token", replicated, "vision_tower.embeddings.cls_token", "vision_model.embeddings.class_embedding"),
    (
        "position_embedding",
        replicated,
        "vision_tower.embeddings.position_embeddings",
        "vision_model.embeddings.position_embedding",
    ),
    (
        "patch_embedding.*",
        replicated,
        "vision_tower.embeddings.patch_embeddings.projection.*",
        "vision_model.embeddings.patch_embedding.*",
    ),
    (f"{LAYER}input_layernorm.*", replicated, "layernorm_before.*", "norm1.*"),
    (f"{LAYER}self_attention.q_layernorm.weight", head_vector, "attention.q_norm.weight", "attn.q_norm.weight"),
    (f"{LAYER}self_attention.k_layernorm.weight", head_vector, "attention.k_norm.weight", "attn.k_norm.weight"),
    (
        f"{LAYER}self_attention.linear_proj.weight",
        attention_output,
        "attention.projection_layer.weight",
        "attn.proj.weight",
    ),
    (f"{LAYER}self_attention.linear_proj.bias", replicated, "attention.projection_layer.bias", "attn.proj.bias"),
    (f"{LAYER}self_attn_bda.scale", replicated, "lambda_1", "ls1"),
    (f"{LAYER}pre_mlp_layernorm.*", replicated, "layernorm_after.*", "norm2.*"),
    (f"{LAYER}mlp.linear_fc1.*", column_parallel, "mlp.fc1.*", "mlp.fc1.*"),
    (f"{LAYER}mlp.linear_fc2.weight", row_parallel, "mlp.fc2.weight", "mlp.fc2.weight"),
    (f"{LAYER}mlp.linear_fc2.bias", replicated, "mlp.fc2.bias", "mlp.fc2.bias"),
    (f"{LAYER}mlp_bda.scale", replicated, "lambda_2", "ls2"),
    ("projector.layer_norm.*", replicated, "multi_modal_projector.layer_norm.*", "mlp1.0.*"),
    ("projector.linear_1.*", column_parallel, "multi_modal_projector.linear_1.*", "mlp1.1.*"),
    ("projector.linear_2.weight", row_parallel, "multi_modal_projector.linear_2.weight", "mlp1.3.weight"),
    ("projector.linear_2.bias", replicated, "multi_modal_projector.linear_2.bias", "mlp1.3.bias"),
)


def text_config(hf_config: Any) -> Any:
    """The configuration of the language model, Qwen2.5.

    Raises ValueError naming a field whose value is not supported.
    """
    text = hf_config.text_config
    vision = hf_config.vision_config
    rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
    supported: dict[str, tuple[Any, bool]] = {
        "text_config.model_type": (text.model_type, text.model_type == "qwen2"),
        "vision_config.norm_type": (vision.norm_type, vision.norm_type in NORMS),
        "vision_config.hidden_act": (vision.hidden_act, vision.hidden_act == "gelu"),
        "vision_config.image_size": (vision.image_size, rows == columns and rows % 2 == 0),
        "vision_config.use_mean_pooling": (vision.use_mean_pooling, vision.use_mean_pooling is True),
        "vision_config.use_mask_token": (vision.use_mask_token, vision.use_mask_token is False),
        "vision_config.use_absolute_position_embeddings": (
            vision.use_absolute_position_embeddings,
            vision.use_absolute_position_embeddings is True,
        ),
        "downsample_ratio": (hf_config.downsample_ratio, hf_config.downsample_ratio == 0.5),
        "projector_hidden_act": (hf_config.projector_hidden_act, hf_config.projector_hidden_act == "gelu"),
        "vision_feature_layer": (hf_config.vision_feature_layer, hf_config.vision_feature_layer == -1),
    }
    for field, (value, known) in supported.items():
        if not known:
            raise ValueError(f"{field}={value!r} in the model's config.json: no InternVL3 has it, nor this family")
    return text


def gpt_options(text: Any) -> dict[str, Any]:
    """Qwen2.5's GPTModel arguments.

    InternVL3's configuration has dynamic NTK scaling, which does not change RoPE up to ``max_position_embeddings``
    tokens. Longer sequences are not supported.
    """
    if text.rope_parameters["rope_type"] == "dynamic":
        return {"position_embedding_type": "rope", "rotary_base": text.rope_parameters["rope_theta"]}
    return qwen2.gpt_options(text)


def param_mappings(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[ModuleMapping, ...]:
    """The mappings of the language model and of the vision tower.

    Raises ValueError when the tensor-parallel size does not divide the tower's feed-forward size or the language
    model's hidden size.
    """
    text = text_config(hf_config)
    language = qwen2.decoder_mappings(text, "language_model.model.", "language_model.lm_head.weight")
    chat = hf_config.architectures[0] == CHAT
    return (
        ModuleMapping("language.", language, sharding_of(text, tensor, tensor_rank)),
        ModuleMapping("vision.", _vision_mappings(chat), _vision_sharding(hf_config, tensor, tensor_rank)),
    )


def tower_is_quantised(hf_config: Any) -> bool:
    """Whether vLLM quantises the tower when it quantises the model.

    In the -hf layout the tower stays in BF16, because vLLM 0.32 does not pass the quantisation on to the tower's layers
    (``InternS1VisionModel``).
    """
    return hf_config.architectures[0] == CHAT


def _vision_mappings(chat: bool) -> tuple[ParamMapping, ...]:
    """The tower's mappings, with the names of the chat layout (``chat``) or of the -hf layout."""
    mappings = []
    for kind in ("weight", "bias"):
        megatron_name = f"{LAYER}self_attention.linear_qkv.{kind}"
        if chat:
            mappings.append(ParamMapping((f"{CHAT_LAYER}attn.qkv.{kind}",), megatron_name, fused_qkv))
        else:
            hf_names = tuple(f"{HF_LAYER}attention.{p}_proj.{kind}" for p in "qkv")
            mappings.append(ParamMapping(hf_names, megatron_name, qkv))
    for megatron_name, shard_fn, hf_layout_name, chat_layout_name in TABLE:
        hf_name = chat_layout_name if chat else hf_layout_name
        if megatron_name.startswith(LAYER):
            hf_name = (CHAT_LAYER if chat else HF_LAYER) + hf_name
        kinds = ("weight", "bias") if "*" in hf_name else ("",)
        for kind in kinds:
            mappings.append(ParamMapping((hf_name.replace("*", kind),), megatron_name.replace("*", kind), shard_fn))
    return tuple(mappings)


def _vision_sharding(hf_config: Any, tensor: int, tensor_rank: int) -> Sharding:
    """The sharding of the tower. Heads are zero-padded if the tensor-parallel size does not divide them.

    Raises ValueError if the tensor-parallel size does not divide the tower's feed-forward size or the language model's
    hidden size.
    """
    vision = hf_config.vision_config
    for field, size in (
        ("vision_config.intermediate_size", vision.intermediate_size),
        ("text_config.hidden_size", hf_config.text_config.hidden_size),
    ):
        if size % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide the model's {field}={size}")
    count = vision.num_attention_heads
    return Sharding(tensor, tensor_rank, heads=count, groups=count, head_dim=vision.hidden_size // count, vocab=0)


def vision_tower(hf_config: Any, parallel: Parallel, dtype: torch.dtype, recompute: dict[str, Any]) -> "VisionTower":
    """The tower and projector of the first pipeline stage, sharded over the tensor-parallel group.

    ``recompute`` has TransformerConfig's fields for recomputation.
    """
    vision = hf_config.vision_config
    sharding = _vision_sharding(hf_config, parallel.tensor, parallel.tensor_rank)
    config = tower_config(
        sharding,
        dtype,
        **recompute,
        # Megatron-Core's fused GELU is the tanh approximation. InternViT has the exact GELU.
        bias_activation_fusion=False,
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        normalization=NORMS[vision.norm_type],
        layernorm_epsilon=vision.layer_norm_eps,
        qk_layernorm=vision.use_qk_norm,
        activation_func=F.gelu,
    )
    return VisionTower(config, hf_config)


class VisionTower(MegatronModule):
    """Pixels [tiles, channels, height, width] → rows [tiles x (patches per tile / 4), language model's hidden size].

    Raises ValueError for tiles whose size is not that of the configuration.
    """

    # For the memory estimate: attention has no rotary embeddings.
    rotates = False

    def __init__(self, config: TransformerConfig, hf_config: Any) -> None:
        super().__init__(config)
        vision = hf_config.vision_config
        self.dtype = dtype = config.params_dtype
        self.tile = (vision.num_channels, *vision.image_size)
        self.side = vision.image_size[0] // vision.patch_size[0]
        width = config.hidden_size
        self.patch_embedding = torch.nn.Conv2d(
            vision.num_channels, width, kernel_size=vision.patch_size, stride=vision.patch_size, dtype=dtype
        )
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, width, dtype=dtype))
        self.position_embedding = torch.nn.Parameter(torch.zeros(1, self.side**2 + 1, width, dtype=dtype))
        self.encoder = TransformerBlock(
            config, _layer(config, vision.attention_bias), post_layer_norm=False, pg_collection=tower_groups()
        )
        self.projector = Projector(config, 4 * width, hf_config.text_config.hidden_size)

    def sequences_per_layer(self, patches: int) -> list[tuple[int, int]]:
        """For the memory estimate: (number, length) of the sequences in which each layer attends to one image.

        A sequence is a tile: its patches and the class token.
        """
        tiles = -(-patches // self.side**2)
        return [(tiles, self.side**2 + 1)] * self.config.num_layers

    def extra_saved_bytes(self, rows: int) -> int:
        """For the memory estimate: bytes that a layer saves beyond Megatron-Core's layer, for ``rows`` tokens.

        These are the inputs of both layer scales, the input of the QK-norm in FP32, and the output of the QK-norm
        before the weight is applied.
        """
        config = self.config
        size = config.params_dtype.itemsize
        heads = 2 * config.num_attention_heads // config.tensor_model_parallel_size if config.qk_layernorm else 0
        return rows * (2 * config.hidden_size * size + heads * config.kv_channels * (4 + size))

    def pixel_rows(self, patches: int) -> int:
        """For the memory estimate: rows of the pixels, which are split over tensor-parallel ranks. A row is a tile."""
        return -(-patches // self.side**2)

    def layout_bytes(self, patches: int) -> int:
        """For the memory estimate: bytes of the layout, which this tower does not have."""
        return 0

    def layout(self, grid: torch.Tensor | None, on_device: OnDevice) -> None:
        """Return None: all tiles have the same size, so the forward pass needs only the pixels."""

    def forward(self, pixels: torch.Tensor, layout: None) -> torch.Tensor:
        """See the class."""
        return self.projector(self.encode(pixels, layout))

    def encode(self, pixels: torch.Tensor, layout: None) -> torch.Tensor:
        """Compute the input of the projector: [tokens, 4 x width], the four patches of a token side by side."""
        if pixels.shape[1:] != self.tile:
            raise ValueError(
                f"tiles of {tuple(pixels.shape[1:])} (channels, height, width): the tower sees {self.tile}"
            )
        tiles = pixels.shape[0]
        side = self.side
        width = self.config.hidden_size
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat((self.class_token.expand(tiles, -1, -1), patches), dim=1) + self.position_embedding
        # Each tile is a sequence of the pack.
        tokens = hidden.shape[1]
        starts = torch.arange(0, (tiles + 1) * tokens, tokens, dtype=torch.int32, device=hidden.device)
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=starts, cu_seqlens_kv=starts, max_seqlen_q=tokens, max_seqlen_kv=tokens
        )
        hidden = self.encoder(
            hidden_states=hidden.view(tiles * tokens, 1, width), attention_mask=None, packed_seq_params=packed
        )
        hidden = hidden.view(tiles, tokens, width)[:, 1:]
        # Pixel shuffle: the 2 x 2 patches of each square become one row, squares in row-major order.
        squares = hidden.reshape(tiles, side // 2, 2, side // 2, 2, width).permute(0, 1, 3, 2, 4, 5)
        return squares.reshape(-1, 4 * width)


class Projector(MegatronModule):
    """Layer norm and two linear layers with GELU: [N, ``inputs``] → [N, ``outputs``]."""

    def __init__(self, config: TransformerConfig, inputs: int, outputs: int) -> None:
        super().__init__(config)
        shared: dict[str, Any] = {
            "config": config,
            "init_method": config.init_method,
            "bias": True,
            "skip_bias_add": False,
        }
        self.layer_norm = torch.nn.LayerNorm(inputs, dtype=config.params_dtype)
        self.linear_1 = ColumnParallelLinear(inputs, outputs, gather_output=False, **shared)
        self.linear_2 = RowParallelLinear(outputs, outputs, input_is_parallel=True, **shared)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.linear_1(self.layer_norm(rows))
        projected, _ = self.linear_2(F.gelu(hidden))
        return projected


def _layer(config: TransformerConfig, qkv_bias: bool) -> ModuleSpec:
    """Megatron-Core's layer with InternViT's layer scale, QK-norm over the full width, and optional bias on QKV."""
    layer = platform.current().encoder_layer(config)
    layer.submodules.self_attn_bda = layer.submodules.mlp_bda = ModuleSpec(LayerScale, params={"config": config})
    attention = layer.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = FullWidthRMSNorm
    if not qkv_bias:
        attention.linear_qkv = _without_bias(attention.linear_qkv)
    return layer


def _without_bias(linear: Callable[..., Any]) -> Callable[..., Any]:
    """The linear layer without a bias. Megatron-Core itself has only one switch for the biases of all linear layers."""
    return lambda *sizes, **options: linear(*sizes, **options | {"bias": False})


class LayerScale(torch.nn.Module):
    """Replaces Megatron-Core's bias-dropout-add: residual + scale x (output + bias)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=config.params_dtype))

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        return self.add

    def add(
        self, output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        output, bias = output_with_bias
        return residual + self.scale * (output if bias is None else output + bias)


class FullWidthRMSNorm(torch.nn.Module):
    """RMS norm over all heads of a token: this rank's heads [tokens, batch, heads, head_dim] → the same shape.

    The sum of squares and its gradient are reduced over the tensor-parallel group. Padded heads are zero and add
    nothing to the sum, so the mean is over the width without padding, ``config.hidden_size``.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.width = config.hidden_size
        local = config.num_attention_heads // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(local * hidden_size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        exact = hidden.float()
        squares = reduce_from_tensor_model_parallel_region(exact.square().sum((-2, -1), keepdim=True))
        squares = copy_to_tensor_model_parallel_region(squares)  # reduces the gradient
        normed = exact * torch.rsqrt(squares / self.width + QK_NORM_EPSILON)
        return normed.to(hidden.dtype) * self.weight.view(hidden.shape[-2:])

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """For checkpoints: the weight is sharded along the heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


def config_from_chat(chat: dict[str, Any]) -> InternVLConfig:
    """Build transformers' configuration from a config.json of the chat layout. ``architectures`` stays as it is.

    Stochastic depth (``drop_path_rate``) is ignored, as in transformers' model. Raises ValueError naming a field whose
    value no InternVL3 with Qwen2.5 has.
    """
    language = chat["llm_config"]
    vision = chat["vision_config"]
    image = vision["image_size"]
    patch = vision["patch_size"]
    epsilon = vision["layer_norm_eps"]
    supported: dict[str, tuple[Any, bool]] = {
        "llm_config.architectures": (language["architectures"], language["architectures"] == ["Qwen2ForCausalLM"]),
        "ps_version": (chat["ps_version"], chat["ps_version"] == "v2"),
        "force_image_size": (chat["force_image_size"], chat["force_image_size"] in (None, image)),
        "vision_config.layer_norm_eps": (epsilon, not vision["qk_normalization"] or epsilon == QK_NORM_EPSILON),
    }
    for field, (value, known) in supported.items():
        if not known:
            raise ValueError(f"{field}={value!r} in the model's config.json: no InternVL3 with Qwen2.5 has it")
    known_to_qwen = {f.name for f in fields(Qwen2Config)} | {"rope_theta", "rope_scaling"}
    return InternVLConfig(
        architectures=chat["architectures"],
        dtype=chat["torch_dtype"],
        text_config={name: value for name, value in language.items() if name in known_to_qwen},
        vision_config={
            **{name: vision[name] for name in _SAME_IN_CHAT},
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
        },
        downsample_ratio=chat["downsample_ratio"],
        image_seq_length=int((image // patch * chat["downsample_ratio"]) ** 2),
        vision_feature_layer=chat["select_layer"],
        tie_word_embeddings=language["tie_word_embeddings"],
    )
