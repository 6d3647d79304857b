"""Llama family (Llama 3, DeepSeek-R1-Distill-Llama-70B, SmolLM2): shapes and weight map."""

from typing import Any

import torch.nn.functional as F

from megatron_ext.weight_map import Rule, attention_output, gate_up, qkv, replicated, row_parallel, vocabulary

LAYERS = (
    Rule(("model.layers.{}.input_layernorm.weight",), "decoder.layers.{}.input_layernorm.weight", replicated),
    Rule(
        tuple(f"model.layers.{{}}.self_attn.{p}_proj.weight" for p in "qkv"),
        "decoder.layers.{}.self_attention.linear_qkv.weight",
        qkv,
    ),
    Rule(
        ("model.layers.{}.self_attn.o_proj.weight",),
        "decoder.layers.{}.self_attention.linear_proj.weight",
        attention_output,
    ),
    Rule(
        ("model.layers.{}.post_attention_layernorm.weight",), "decoder.layers.{}.pre_mlp_layernorm.weight", replicated
    ),
    Rule(
        ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
        "decoder.layers.{}.mlp.linear_fc1.weight",
        gate_up,
    ),
    Rule(("model.layers.{}.mlp.down_proj.weight",), "decoder.layers.{}.mlp.linear_fc2.weight", row_parallel),
)


def rules(hf_config: Any) -> tuple[Rule, ...]:
    """The weight map; with tied embeddings the last pipeline stage's output layer is the embedding again."""
    head = "model.embed_tokens.weight" if hf_config.tie_word_embeddings else "lm_head.weight"
    return (
        Rule(("model.embed_tokens.weight",), "embedding.word_embeddings.weight", vocabulary),
        *LAYERS,
        Rule(("model.norm.weight",), "decoder.final_layernorm.weight", replicated),
        Rule((head,), "output_layer.weight", vocabulary),
    )


def transformer_options(hf_config: Any) -> dict[str, Any]:
    """TransformerConfig fields that the architecture fixes (heads come padded from the sharding)."""
    return {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
    }


def gpt_options(hf_config: Any) -> dict[str, Any]:
    """GPTModel arguments: rotary base and Llama 3's frequency scaling. Raises ValueError on another scaling."""
    rope = hf_config.rope_parameters
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
