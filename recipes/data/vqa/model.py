"""Writes the visual demo's model without weights: ``python -m recipes.data.vqa.model``.

A small model of the Qwen2.5-VL architecture, its processor, and a byte-level tokenizer that was trained on the
questions of the package easy-vqa, so that each of their words is a token. ``model.random_weights_of`` makes the
weights.
"""

from pathlib import Path

import easy_vqa
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

FOLDER = Path("conf/model/vqa_tiny")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
# ChatML without a system prompt, with Qwen2.5-VL's marks around an image.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
UNIT = 28 * 28  # pixels of a token: 2 x 2 patches of 14 x 14
IMAGE_TOKENS = 16  # an image of 64 x 64 pixels is enlarged to 112 x 112


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())
    )
    questions, answers, _ = easy_vqa.get_train_questions()
    tokenizer.train_from_iterator([*questions, *answers, *["user", "assistant"] * 1000], trainer)
    tokenizer.add_special_tokens(VISION)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def main(folder: Path = FOLDER) -> None:
    words = make_tokenizer()
    start, end, image, video = words.convert_tokens_to_ids(VISION)
    Qwen2_5_VLConfig(
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        text_config={
            "vocab_size": len(words),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
            "initializer_range": 0.05,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "initializer_range": 0.05,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    ).save_pretrained(folder)
    size = {"shortest_edge": IMAGE_TOKENS * UNIT, "longest_edge": IMAGE_TOKENS * UNIT}
    Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size), words, Qwen2VLVideoProcessor(size=size), chat_template=TEMPLATE
    ).save_pretrained(folder)


if __name__ == "__main__":
    main()
