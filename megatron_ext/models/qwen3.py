"""Qwen3 (dense): Llama with an RMS norm on every query and key head.

docs/new_base_model.md describes how this family was added.
"""

from typing import Any

from megatron_ext.models import llama
from megatron_ext.models.llama import gpt_options, text_config
from megatron_ext.weight_map import ModuleMapping, ParamMapping, replicated, sharding_of

__all__ = ["decoder_mappings", "gpt_options", "param_mappings", "text_config", "transformer_options"]


def decoder_mappings(text: Any, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[ParamMapping, ...]:
    """Llama's mappings and the mappings of the head norms, which are replicated on every rank."""
    attention = f"{prefix}layers.{{}}.self_attn."
    return (
        *llama.decoder_mappings(text, prefix, head),
        ParamMapping((f"{attention}q_norm.weight",), "decoder.layers.{}.self_attention.q_layernorm.weight", replicated),
        ParamMapping((f"{attention}k_norm.weight",), "decoder.layers.{}.self_attention.k_layernorm.weight", replicated),
    )


def param_mappings(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[ModuleMapping, ...]:
    """The model is one module."""
    return (ModuleMapping("", decoder_mappings(hf_config), sharding_of(hf_config, tensor, tensor_rank)),)


def transformer_options(text: Any) -> dict[str, Any]:
    """Llama's TransformerConfig fields with QK-norm.

    Raises ValueError for sliding-window attention or biases, which no dense Qwen3 uses.
    """
    for field in ("use_sliding_window", "attention_bias"):
        if getattr(text, field):
            raise ValueError(f"{field}=true in the model's config.json: no dense Qwen3 has it, and this family doesn't")
    return llama.transformer_options(text) | {"qk_layernorm": True}
