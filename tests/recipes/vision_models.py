"""Folders of tiny vision-language models without weights: configuration, tokenizer and processor; and image files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from tests.recipes import tiny

QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
INTERNVL_TOKENS = ["<img>", "</img>", "<IMG_CONTEXT>"]
INTERNVL_NAMES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
TILE = 56
START = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# As Qwen2.5-VL's, and as InternVL3's in the -hf layout.
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    + START
    + "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}" + END
)
INTERNVL_TEMPLATE = (
    START
    + "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    + END
)
TEXT = {  # vLLM has attention on a CPU for heads of 32
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def tokenizer(tokens: list[str], template: str, **names: Any) -> PreTrainedTokenizerFast:
    """The tiny byte-level tokenizer with a model's special tokens."""
    tiny_tokenizer = tiny.make_tokenizer()
    tiny_tokenizer.add_tokens(tokens, special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        **names,
    )


def make_qwen2_5_vl(folder: Path, **image_options: Any) -> Path:
    """Patches of 14, merged 2 x 2; an image has 4 to 64 placeholder tokens, a frame of a clip 4 to 16."""
    words = tokenizer(QWEN_TOKENS, QWEN_TEMPLATE)
    start, end, image, video = words.convert_tokens_to_ids(QWEN_TOKENS)
    Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            **TEXT,
            "vocab_size": len(words),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    ).save_pretrained(folder)
    unit = 28 * 28
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 64 * unit}, **image_options),
        words,
        Qwen2VLVideoProcessor(size={"shortest_edge": 4 * unit, "longest_edge": 16 * unit}),
        chat_template=QWEN_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_internvl(folder: Path, image_seq_length: int = 4) -> Path:
    """The ``-hf`` layout: tiles of 56 pixels, 4 placeholder tokens each, at most 6 and a thumbnail."""
    words = tokenizer([*INTERNVL_TOKENS, "<video>"], INTERNVL_TEMPLATE, extra_special_tokens=INTERNVL_NAMES)
    InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": 14,
        },
        text_config={"model_type": "qwen2", **TEXT, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    ).save_pretrained(folder)
    size = {"height": TILE, "width": TILE}
    InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=6),
        words,
        InternVLVideoProcessor(size=size),
        image_seq_length=image_seq_length,
        chat_template=INTERNVL_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_internvl_chat(folder: Path, tokens: list[str] = INTERNVL_TOKENS, **changes: Any) -> Path:
    """The chat layout: no processor of its own, and a chat template for text."""
    words = tokenizer(tokens, tiny.TEMPLATE)
    words.save_pretrained(folder)
    config = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TEXT, "vocab_size": len(words)},
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": TILE,
            "patch_size": 14,
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def draw(path: Path, width: int, height: int, seed: int, mode: str = "RGB") -> str:
    """A file of smooth and of sharp colours; returns its name."""
    generator = np.random.default_rng(seed)
    smooth = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    noise = generator.integers(0, 256, (height, width, 3))
    pixels = np.where(generator.random((height, width, 1)) < 0.5, smooth, noise).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path.name
