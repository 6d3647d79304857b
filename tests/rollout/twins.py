"""Tiny Llama models and their Megatron-like shards, made from the HF state dict with plain slicing."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.blocks import Block, Shard


@dataclass(frozen=True)
class Twin:
    """A tiny model: how many heads, whether the embedding is tied, whether attention has biases, feed-forward size,
    how many layers."""

    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    bias: bool
    dtype: torch.dtype
    intermediate: int = 160
    layers: int = 2

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=32 * self.heads,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=32,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            attention_bias=self.bias,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            initializer_range=0.2,
            dtype=self.dtype,
        )

    def model(self, seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        model = LlamaForCausalLM(self.config()).to(self.dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
        return model.eval()

    def save(self, folder: Path, seed: int) -> Path:
        self.model(seed).save_pretrained(folder)
        return folder


# Three key-value groups do not divide by two: the trainer pads them to four. The vocabulary is no multiple of 64.
TIED = Twin(heads=6, kv_heads=3, vocab=203, tied=True, bias=False, dtype=torch.bfloat16)
UNTIED = Twin(heads=4, kv_heads=2, vocab=330, tied=False, bias=True, dtype=torch.float32)


class ShardMaker:
    """Collects shards: each local parameter starts as NaN, so that anything sent without a block is noticed."""

    def __init__(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype
        self.shards: list[Shard] = []

    def add(self, name: str, shape: tuple[int, ...], blocks: list[Block]) -> None:
        tensor = torch.full(shape, float("nan"), dtype=self.dtype)
        self.shards.append(Shard(name, tensor, tuple(blocks)))

    def fill(self) -> None:
        """Copy the present weights into the shards, in place."""
        for shard in self.shards:
            for block in shard.blocks:
                here = tuple(slice(a, a + n) for a, n in zip(block.local_start, block.shape, strict=True))
                there = tuple(slice(a, a + n) for a, n in zip(block.hf_start, block.shape, strict=True))
                shard.tensor[here] = self.weights[block.hf_name][there].to(self.dtype)


def tensor_parallel_shards(
    twin: Twin, weights: dict[str, torch.Tensor], tp: int, rank: int, dtype: torch.dtype
) -> ShardMaker:
    """Megatron's layout: groups [q…q k v] fused and interleaved, gate and up fused, vocabulary and key-value groups
    padded to a multiple of ``tp``; norms and row biases replicated."""
    maker = ShardMaker(weights, dtype)
    config, width, d = twin.config(), 32 * twin.heads, 32
    groups = -(-twin.kv_heads // tp)
    per_group = twin.heads // twin.kv_heads
    rows = -(-twin.vocab // tp)
    for name in ["model.embed_tokens.weight"] + ([] if twin.tied else ["lm_head.weight"]):
        here = min(rows, twin.vocab - rank * rows)
        maker.add(name, (rows, width), [Block(name, (rank * rows, 0), (0, 0), (here, width))])
    inner = config.intermediate_size // tp
    for layer in range(config.num_hidden_layers):
        p = f"model.layers.{layer}."
        qkv: dict[str, list[Block]] = {"weight": [], "bias": []}
        out = []
        for local in range(groups):
            group = rank * groups + local
            if group >= twin.kv_heads:
                continue
            base = local * (per_group + 2) * d
            parts = [("q", group * per_group * d, base, per_group * d)]
            parts += [("k", group * d, base + per_group * d, d), ("v", group * d, base + (per_group + 1) * d, d)]
            for part, hf, at, n in parts:
                qkv["weight"].append(Block(f"{p}self_attn.{part}_proj.weight", (hf, 0), (at, 0), (n, width)))
                qkv["bias"].append(Block(f"{p}self_attn.{part}_proj.bias", (hf,), (at,), (n,)))
            n = per_group * d
            out.append(Block(f"{p}self_attn.o_proj.weight", (0, group * n), (0, local * n), (width, n)))
        maker.add(p + "qkv.weight", (groups * (per_group + 2) * d, width), qkv["weight"])
        maker.add(p + "proj.weight", (width, groups * per_group * d), out)
        if twin.bias:
            maker.add(p + "qkv.bias", (groups * (per_group + 2) * d,), qkv["bias"])
            maker.add(p + "proj.bias", (width,), [Block(f"{p}self_attn.o_proj.bias", (0,), (0,), (width,))])
        gate_up = [
            Block(f"{p}mlp.{part}_proj.weight", (rank * inner, 0), (i * inner, 0), (inner, width))
            for i, part in enumerate(("gate", "up"))
        ]
        maker.add(p + "fc1.weight", (2 * inner, width), gate_up)
        down = Block(f"{p}mlp.down_proj.weight", (0, rank * inner), (0, 0), (width, inner))
        maker.add(p + "fc2.weight", (width, inner), [down])
        for norm in ("input_layernorm", "post_attention_layernorm"):
            maker.add(p + norm, (width,), [Block(f"{p}{norm}.weight", (0,), (0,), (width,))])
    maker.add("model.norm.weight", (width,), [Block("model.norm.weight", (0,), (0,), (width,))])
    maker.fill()
    return maker
