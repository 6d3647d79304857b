"""Hugging Face ↔ Megatron weight names and layouts, declaratively: a family lists ``Rule``s, everything else follows.

Loading, export, gradient mapping and the bridge to vLLM all read the blocks made here.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from megatron_ext.blocks import Block, Shard

# Transformer Engine fuses a norm into the linear layer behind it; the tables use the unfused names.
_FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Sharding:
    """One rank's tensor-parallel position, and the HF model's true (unpadded) heads, KV groups and vocabulary."""

    tensor: int
    tensor_rank: int
    heads: int
    groups: int
    head_dim: int
    vocab: int

    @property
    def padded_groups(self) -> int:
        """KV groups after zero padding to a multiple of the tensor-parallel size."""
        return round_up(self.groups, self.tensor)

    @property
    def padded_heads(self) -> int:
        return self.heads // self.groups * self.padded_groups

    @property
    def padded_vocab(self) -> int:
        return round_up(self.vocab, self.tensor)


Layout = Callable[[tuple[str, ...], tuple[int, ...], Sharding], list[Block]]


@dataclass(frozen=True)
class Rule:
    """HF name pattern(s) (``{}`` is the layer), Megatron name pattern, and how the local shard is cut from HF's."""

    hf: tuple[str, ...]
    megatron: str
    layout: Layout


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def replicated(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Every rank holds the whole tensor."""
    zero = (0,) * len(shape)
    return [Block(names[0], zero, zero, shape)]


def row_parallel(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Input dimension (columns of the matrix) cut evenly."""
    return [Block(names[0], (0, s.tensor_rank * shape[1]), (0, 0), shape)]


def vocabulary(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Rows cut evenly after padding the vocabulary to a multiple of the tensor-parallel size."""
    start = s.tensor_rank * shape[0]
    rows = max(0, min(shape[0], s.vocab - start))
    return [Block(names[0], (start, 0), (0, 0), (rows, shape[1]))] if rows else []


def gate_up(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """SwiGLU: this rank's gate rows, then its up rows."""
    rows, rest = shape[0] // 2, shape[1:]
    zeros = (0,) * len(rest)
    return [
        Block(name, (s.tensor_rank * rows, *zeros), (i * rows, *zeros), (rows, *rest)) for i, name in enumerate(names)
    ]


def qkv(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Megatron's grouped layout: for each KV group its query heads, its key head, its value head. Weight or bias."""
    per_group = s.heads // s.groups
    rest = shape[1:]
    zeros = (0,) * len(rest)
    local_groups = s.padded_groups // s.tensor
    blocks = []
    for local in range(local_groups):
        group = s.tensor_rank * local_groups + local
        if group >= s.groups:
            break
        start = local * (per_group + 2) * s.head_dim
        for name, heads in zip(names, (per_group, 1, 1), strict=True):
            rows = heads * s.head_dim
            blocks.append(Block(name, (group * rows, *zeros), (start, *zeros), (rows, *rest)))
            start += rows
    return blocks


def attention_output(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Row parallel over heads; columns of padded heads stay zero."""
    start = s.tensor_rank * shape[1]
    columns = max(0, min(shape[1], s.heads * s.head_dim - start))
    return [Block(names[0], (0, start), (0, 0), (shape[0], columns))] if columns else []


def shards(models: Iterable[torch.nn.Module], rules: Sequence[Rule], sharding: Sharding) -> list[Shard]:
    """Every local parameter with its blocks. Raises KeyError naming a parameter that no rule matches."""
    patterns = [(re.compile(re.escape(rule.megatron).replace(r"\{\}", r"(\d+)")), rule) for rule in rules]
    found = []
    for chunk, model in enumerate(models):
        layers = model.decoder.layers  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            plain = name
            for fused, unfused in _FUSED_NORM_NAMES.items():
                plain = plain.replace(fused, unfused)
            match, rule = next(((m, r) for p, r in patterns if (m := p.fullmatch(plain))), (None, None))
            if match is None or rule is None:
                raise KeyError(f"parameter {name!r} matches no rule of the family's weight map: add one to its table")
            names = rule.hf
            if match.groups():
                layer = layers[int(match[1])].layer_number - 1  # type: ignore[index, union-attr]
                names = tuple(n.format(layer) for n in rule.hf)
            blocks = tuple(rule.layout(names, tuple(parameter.shape), sharding))
            found.append(Shard(f"{chunk}.{name}", parameter.data, blocks))
    return found
