"""Qwen2.5 (text; also the language model of Qwen2.5-VL and InternVL3): Llama with biases on query, key and value."""

from typing import Any

from megatron_ext.models import llama
from megatron_ext.models.llama import gpt_options, text_config
from megatron_ext.weight_map import Part, Rule, qkv, sharding_of

__all__ = ["gpt_options", "parts", "rules", "text_config", "transformer_options"]


def rules(text: Any, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[Rule, ...]:
    """Llama's weight map and the biases."""
    biases = tuple(f"{prefix}layers.{{}}.self_attn.{p}_proj.bias" for p in "qkv")
    return (
        *llama.rules(text, prefix, head),
        Rule(biases, "decoder.layers.{}.self_attention.linear_qkv.bias", qkv),
    )


def parts(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[Part, ...]:
    """The whole model is one part."""
    return (Part("", rules(hf_config), sharding_of(hf_config, tensor, tensor_rank)),)


def transformer_options(text: Any) -> dict[str, Any]:
    """Llama's. Raises ValueError on sliding-window attention, which no published Qwen2.5 uses."""
    if text.use_sliding_window:
        raise ValueError("use_sliding_window=true in the model's config.json: this family attends to the whole context")
    return llama.transformer_options(text) | {"add_qkv_bias": True}
