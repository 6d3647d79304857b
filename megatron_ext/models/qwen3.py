"""Qwen3 (dense): Llama with an RMS norm on every query and key head. docs/new_base_model.md tells how it was added."""

from typing import Any

from megatron_ext.models import llama
from megatron_ext.models.llama import gpt_options, text_config
from megatron_ext.weight_map import Part, Rule, replicated, sharding_of

__all__ = ["gpt_options", "parts", "rules", "text_config", "transformer_options"]


def rules(text: Any, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[Rule, ...]:
    """Llama's weight map and the head norms, which every rank holds."""
    layer = f"{prefix}layers.{{}}.self_attn."
    return (
        *llama.rules(text, prefix, head),
        Rule((f"{layer}q_norm.weight",), "decoder.layers.{}.self_attention.q_layernorm.weight", replicated),
        Rule((f"{layer}k_norm.weight",), "decoder.layers.{}.self_attention.k_layernorm.weight", replicated),
    )


def parts(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[Part, ...]:
    """The whole model is one part."""
    return (Part("", rules(hf_config), sharding_of(hf_config, tensor, tensor_rank)),)


def transformer_options(text: Any) -> dict[str, Any]:
    """Llama's with QK-norm. Raises ValueError on sliding-window attention or biases, which no dense Qwen3 uses."""
    for field in ("use_sliding_window", "attention_bias"):
        if getattr(text, field):
            raise ValueError(f"{field}=true in the model's config.json: no dense Qwen3 has it, and this family doesn't")
    return llama.transformer_options(text) | {"qk_layernorm": True}
