"""Qwen2.5: Llama with biases on query, key and value. Also the language model of Qwen2.5-VL and InternVL3."""

from typing import Any

from megatron_ext.models import llama
from megatron_ext.models.llama import gpt_options, text_config
from megatron_ext.weight_map import ModuleMapping, ParamMapping, qkv, sharding_of

__all__ = ["decoder_mappings", "gpt_options", "param_mappings", "text_config", "transformer_options"]


def decoder_mappings(text: Any, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[ParamMapping, ...]:
    """Llama's mappings and the mappings of the biases."""
    biases = tuple(f"{prefix}layers.{{}}.self_attn.{p}_proj.bias" for p in "qkv")
    return (
        *llama.decoder_mappings(text, prefix, head),
        ParamMapping(biases, "decoder.layers.{}.self_attention.linear_qkv.bias", qkv),
    )


def param_mappings(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[ModuleMapping, ...]:
    """The model is one module."""
    return (ModuleMapping("", decoder_mappings(hf_config), sharding_of(hf_config, tensor, tensor_rank)),)


def transformer_options(text: Any) -> dict[str, Any]:
    """Llama's TransformerConfig fields with biases on query, key and value.

    Raises ValueError for sliding-window attention, which no published Qwen2.5 uses.
    """
    if text.use_sliding_window:
        raise ValueError("use_sliding_window=true in the model's config.json: this family attends to the full context")
    return llama.transformer_options(text) | {"add_qkv_bias": True}
