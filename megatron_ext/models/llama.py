"""Llama family (Llama 3, DeepSeek-R1-Distill-Llama-70B, SmolLM2): shapes and parameter mappings."""

from typing import Any

import torch.nn.functional as F

from megatron_ext.weight_map import (
    ModuleMapping,
    ParamMapping,
    attention_output,
    gate_up,
    qkv,
    replicated,
    row_parallel,
    sharding_of,
    vocabulary,
)


def text_config(hf_config: Any) -> Any:
    """The language model's configuration, which is the complete configuration."""
    return hf_config


def decoder_mappings(text: Any, prefix: str = "model.", head: str = "lm_head.weight") -> tuple[ParamMapping, ...]:
    """The mappings of a decoder whose Hugging Face names begin with ``prefix``.

    ``head`` is the Hugging Face name of the output layer. With tied embeddings the output layer of the last pipeline
    stage maps to the embedding.
    """
    layer = f"{prefix}layers.{{}}."
    embedding = f"{prefix}embed_tokens.weight"
    output_layer = embedding if text.tie_word_embeddings else head
    return (
        ParamMapping((embedding,), "embedding.word_embeddings.weight", vocabulary),
        ParamMapping((f"{layer}input_layernorm.weight",), "decoder.layers.{}.input_layernorm.weight", replicated),
        ParamMapping(
            tuple(f"{layer}self_attn.{p}_proj.weight" for p in "qkv"),
            "decoder.layers.{}.self_attention.linear_qkv.weight",
            qkv,
        ),
        ParamMapping(
            (f"{layer}self_attn.o_proj.weight",),
            "decoder.layers.{}.self_attention.linear_proj.weight",
            attention_output,
        ),
        ParamMapping(
            (f"{layer}post_attention_layernorm.weight",), "decoder.layers.{}.pre_mlp_layernorm.weight", replicated
        ),
        ParamMapping(
            (f"{layer}mlp.gate_proj.weight", f"{layer}mlp.up_proj.weight"),
            "decoder.layers.{}.mlp.linear_fc1.weight",
            gate_up,
        ),
        ParamMapping((f"{layer}mlp.down_proj.weight",), "decoder.layers.{}.mlp.linear_fc2.weight", row_parallel),
        ParamMapping((f"{prefix}norm.weight",), "decoder.final_layernorm.weight", replicated),
        ParamMapping((output_layer,), "output_layer.weight", vocabulary),
    )


def param_mappings(hf_config: Any, tensor: int, tensor_rank: int) -> tuple[ModuleMapping, ...]:
    """The model is one module."""
    return (ModuleMapping("", decoder_mappings(hf_config), sharding_of(hf_config, tensor, tensor_rank)),)


def transformer_options(text: Any) -> dict[str, Any]:
    """TransformerConfig fields that the architecture fixes.

    The numbers of heads are not among them. They are padded, and taken from Sharding.
    """
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
    """GPTModel arguments: rotary base and Llama 3's frequency scaling. Raises ValueError for any other scaling."""
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
