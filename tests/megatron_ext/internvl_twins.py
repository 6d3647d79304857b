"""Tiny random InternVL3 models in both layouts of the hub, and a batch for them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

from megatron_ext.packing import VisionInputs
from tests.sequences import PlainSequence

TILE, PATCH, TOKENS_PER_TILE = 56, 14, 4
IMAGE_TOKEN, IMAGE_START, IMAGE_END = 128, 129, 130
# As InternViT-6B, and as the InternViT-300M of the smaller models. Their five heads do not divide by 2.
TWINS: dict[str, dict[str, Any]] = {
    "6b": {"norm_type": "rms_norm", "use_qk_norm": True, "attention_bias": False, "layer_norm_eps": 1e-6},
    "300m": {"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True, "layer_norm_eps": 1e-5},
}
# 131 does not divide by 2. Where 132 does, the tower's heads alone are padded.
VOCAB = {"6b": 131, "300m": 132}
# Tiles of each image of each prompt; two prompts are text alone.
TILES: tuple[tuple[int, ...], ...] = ((3,), (), (2, 1), (1,), (), (1, 1, 2))
MICRO_BATCHES = ([0, 1], [4], [2, 3], [5])  # one is text alone


def make_twins(folder: Path) -> None:
    for twin in TWINS:
        _make(folder / f"{twin}-hf", twin)
        _to_chat_layout(folder / f"{twin}-hf", folder / f"{twin}-chat")


def _make(folder: Path, twin: str) -> None:
    """No parameter keeps its initial value, so that none can be mixed up."""
    torch.manual_seed(0)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 80,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "image_size": TILE,
            "patch_size": PATCH,
            **TWINS[twin],
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": VOCAB[twin],
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "tie_word_embeddings": False,
        },
        image_token_id=IMAGE_TOKEN,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=False,
    )
    twin_model = InternVLForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, parameter in twin_model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif "lambda" in name:
                parameter.uniform_(0.3, 1.2)
            else:
                parameter.normal_(0.0, 0.1)
    twin_model.save_pretrained(folder)


# From transformers' convert_internvl_weights_to_hf.py, read backwards; ``mlp1`` is a Sequential of norm, linear, GELU,
# linear in the chat layout's own code.
CHAT_NAMES = (
    (r"^vision_tower\.", "vision_model."),
    (r"encoder\.layer\.", "encoder.layers."),
    (r"cls_token", "class_embedding"),
    (r"position_embeddings", "position_embedding"),
    (r"patch_embeddings\.projection", "patch_embedding"),
    (r"lambda_(\d)", r"ls\1"),
    (r"attention\.projection_layer", "attn.proj"),
    (r"attention\.(q|k)_norm", r"attn.\1_norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^multi_modal_projector\.layer_norm", "mlp1.0"),
    (r"^multi_modal_projector\.linear_1", "mlp1.1"),
    (r"^multi_modal_projector\.linear_2", "mlp1.3"),
)


def chat_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From the ``-hf`` to the chat layout: other names in the tower, and query, key and value in one tensor."""
    renamed = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(vision_tower.*)attention\.([qkv])_proj\.(weight|bias)", name):
            if match[2] != "q":
                continue
            name = f"{match[1]}attn.qkv.{match[3]}"
            tensor = torch.cat([tensors[f"{match[1]}attention.{p}_proj.{match[3]}"] for p in "qkv"])
        for pattern, replacement in CHAT_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _to_chat_layout(source: Path, target: Path) -> None:
    """With the fields of OpenGVLab/InternVL3's config.json, those that nothing here reads left out."""
    target.mkdir()
    save_file(chat_tensors(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})
    hf = json.loads((source / "config.json").read_text())
    text, vision = hf["text_config"], hf["vision_config"]
    rope = text.pop("rope_parameters")
    chat = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "downsample_ratio": hf["downsample_ratio"],
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "llm_config": {
            **text,
            "architectures": ["Qwen2ForCausalLM"],
            "_attn_implementation_autoset": True,
            "moe_config": None,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": {"factor": rope["factor"], "rope_type": "dynamic", "type": "dynamic"},
            "torch_dtype": "float32",
        },
        "model_type": "internvl_chat",
        "ps_version": "v2",
        "select_layer": -1,
        "torch_dtype": "float32",
        "vision_config": {
            **{name: vision[name] for name in ("hidden_act", "hidden_size", "intermediate_size", "layer_norm_eps")},
            **{name: vision[name] for name in ("norm_type", "num_attention_heads", "num_hidden_layers")},
            "architectures": ["InternVisionModel"],
            "drop_path_rate": 0.1,
            "image_size": TILE,
            "model_type": "intern_vit_6b",
            "patch_size": PATCH,
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
        },
    }
    (target / "config.json").write_text(json.dumps(chat, indent=2))


def pixels(tiles: int, seed: int) -> torch.Tensor:
    return torch.randn(tiles, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))


def batch() -> list[PlainSequence]:
    """As many sequences as ``TILES``, of 5 to 42 tokens; ``weight`` makes the loss the mean over sequences of means."""
    generator = torch.Generator().manual_seed(0)

    def text(low: int) -> list[int]:
        count = int(torch.randint(low, 8, (), generator=generator))
        return torch.randint(0, IMAGE_TOKEN, (count,), generator=generator).tolist()

    sequences = []
    for n, images in enumerate(TILES):
        prompt = text(low=1)
        for tiles in images:
            prompt += [IMAGE_START, *[IMAGE_TOKEN] * (tiles * TOKENS_PER_TILE), IMAGE_END, *text(low=1)]
        response = text(low=2)
        places = [place for place, token in enumerate(prompt) if token == IMAGE_TOKEN]
        values: dict[str, Sequence[float]] = {"place": list(range(len(response)))}
        values["weight"] = [1 / (len(TILES) * len(response))] * len(response)
        vision = VisionInputs(pixels(sum(images), n), None, places, None) if images else None
        sequences.append(PlainSequence(prompt, response, values, vision))
    return sequences


def published(name: str) -> str:
    """A parameter's name in transformers' model → in a checkpoint."""
    name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    return name.removeprefix("model.")
