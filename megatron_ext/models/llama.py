"""Llama family (Llama 3, DeepSeek-R1-Distill-Llama-70B, SmolLM2): shapes and weight map."""

from typing import Any

import torch.nn.functional as F

from megatron_ext.weight_map import (
    Part,
    Rule,
    attention_output,
    gate_up,
    qkv,
    replicated,
    row_parallel,
    sharding_of,
    vocabulary,
)


def text_config(hf_config: Any) -> Any:
    """The language model's configuration: this one."""
    return hf_config


def rules(text: Any, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[Rule, ...]:
    """The weight map of a decoder whose HF names begin with ``prefix``.

    With tied embeddings the last pipeline stage's output layer is the embedding again.
    """
    layer = f"{prefix}layers.{{}}."
    return (
        Rule((f"{prefix}embed_tokens.weight",), "embedding.word_embeddings.weight", vocabulary),
        Rule((f"{layer}input_layernorm.weight",), "decoder.layers.{}.input_layernorm.weight", replicated),
        Rule(
            tuple(f"{layer}self_attn.{p}_proj.weight" for p in "qkv"),
            "decoder.layers.{}.self_attention.linear_qkv.weight",
            qkv,
        ),
        Rule(
            (f"{layer}self_attn.o_proj.weight",),
            "decoder.layers.{}.self_attention.linear_proj.weight",
            attention_output,
        ),
        Rule((f"{layer}post_attention_layernorm.weight",), "decoder.layers.{}.pre_mlp_layernorm.weight", replicated),
        Rule(
            (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
            "decoder.layers.{}.mlp.linear_fc1.weight",
            gate_up,
        ),
        Rule((f"{layer}mlp.down_proj.weight",), "decoder.layers.{}.mlp.linear_fc2.weight", row_parallel),
        Rule((f"{prefix}norm.weight",), "decoder.final_layernorm.weight", replicated),
        Rule(
            (f"{prefix}embed_tokens.weight" if text.tie_word_embeddings else head,), "output_layer.weight", vocabulary
        ),
    )


def parts(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[Part, ...]:
    """The whole model is one part."""
    return (Part("", rules(hf_config), sharding_of(hf_config, tensor, tensor_rank)),)


def transformer_options(text: Any) -> dict[str, Any]:
    """TransformerConfig fields that the architecture fixes (heads come padded from the sharding)."""
    return {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "ffn_hidden_size": text.intermediate_size,
        "layernorm_epsilon": text.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    }


def gpt_options(text: Any) -> dict[str, Any]:
    """GPTModel arguments: rotary base and Llama 3's frequency scaling. Raises ValueError on another scaling."""
    rope = text.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        expected = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        wrong = {key: rope[key] for key, value in expected.items() if rope[key] != value}
        if wrong:
            raise ValueError(f"rope_parameters {wrong}: Megatron-Core's Llama 3 scaling is fixed to {expected}")
    elif kind != "default":
        raise ValueError(f"rope_parameters.rope_type={kind!r}: this family supports 'default' and 'llama3'")
    return {
        "position_embedding_type": "rope",
        "rotary_base": rope["rope_theta"],
        "rope_scaling": kind == "llama3",
        "rope_scaling_factor": rope.get("factor", 1.0),
    }
