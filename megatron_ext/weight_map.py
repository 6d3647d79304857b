"""Hugging Face ↔ Megatron weight names and layouts, declaratively: a family lists ``Rule``s, everything else follows.

Loading, export, gradient mapping and the bridge to vLLM all read the blocks made here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.blocks import Block, Shard

# Transformer Engine fuses a norm into the linear layer behind it; the tables use the unfused names.
_FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
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


def sharding_of(text: Any, tensor: int, tensor_rank: int) -> Sharding:
    """A language model's true head, group and vocabulary counts with this rank's tensor-parallel position."""
    heads = text.num_attention_heads
    return Sharding(
        tensor=tensor,
        tensor_rank=tensor_rank,
        heads=heads,
        groups=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
    )


Layout = Callable[[tuple[str, ...], tuple[int, ...], Sharding], list[Block]]


@dataclass(frozen=True)
class Rule:
    """HF name pattern(s) (``{}`` is the layer), Megatron name pattern, and how the local shard is cut from HF's."""

    hf: tuple[str, ...]
    megatron: str
    layout: Layout


@dataclass(frozen=True)
class Part:
    """A module of a model: its Megatron names begin with ``prefix``; ``rules`` speak of the names behind it.

    A text model is one part with prefix "". A vision-language model has "language." and "vision.", each with heads of
    its own.
    """

    prefix: str
    rules: Sequence[Rule]
    sharding: Sharding


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def replicated(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Every rank holds the whole tensor."""
    zero = (0,) * len(shape)
    return [Block(names[0], zero, zero, shape)]


def column_parallel(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Output dimension (rows) cut evenly. Weight or bias."""
    return [Block(names[0], (s.tensor_rank * shape[0], *(0,) * len(shape[1:])), (0,) * len(shape), shape)]


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
    return _grouped(names, (0, 0, 0), shape, s)


def fused_qkv(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """As ``qkv``, from one HF tensor with the rows of all query, then all key, then all value heads."""
    query, key = s.heads * s.head_dim, s.groups * s.head_dim
    return _grouped(names * 3, (0, query, query + key), shape, s)


def _grouped(names: tuple[str, ...], offsets: tuple[int, int, int], shape: tuple[int, ...], s: Sharding) -> list[Block]:
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
        for name, offset, heads in zip(names, offsets, (per_group, 1, 1), strict=True):
            rows = heads * s.head_dim
            blocks.append(Block(name, (offset + group * rows, *zeros), (start, *zeros), (rows, *rest)))
            start += rows
    return blocks


def heads(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """A vector over all heads (a QK-norm of the full width), cut like them; padded heads stay zero."""
    start = s.tensor_rank * shape[0]
    length = max(0, min(shape[0], s.heads * s.head_dim - start))
    return [Block(names[0], (start,), (0,), (length,))] if length else []


def attention_output(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Row parallel over heads; columns of padded heads stay zero."""
    start = s.tensor_rank * shape[1]
    columns = max(0, min(shape[1], s.heads * s.head_dim - start))
    return [Block(names[0], (0, start), (0, 0), (shape[0], columns))] if columns else []


def layer_in_whole(model: torch.nn.Module, layer: str) -> int:
    """The number in the whole model of the layer that this stage has under the name ``layer``."""
    return model.get_submodule(layer).layer_number - 1  # type: ignore[operator, return-value]


def shards(models: Sequence[torch.nn.Module], parts: Sequence[Part]) -> list[Shard]:
    """Every local parameter with its blocks. Raises KeyError naming a parameter that no rule matches."""
    rules = [
        (re.compile(re.escape(part.prefix + rule.megatron).replace(r"\{\}", r"(\d+)")), rule, part.sharding)
        for part in parts
        for rule in part.rules
    ]
    found = []
    for chunk, model in enumerate(models):
        for name, parameter in model.named_parameters():
            plain = name
            for fused, unfused in _FUSED_NORM_NAMES.items():
                plain = plain.replace(fused, unfused)
            matching = ((m, rule, sharding) for p, rule, sharding in rules if (m := p.fullmatch(plain)))
            match, rule, sharding = next(matching, (None, None, None))
            if match is None or rule is None or sharding is None:
                raise KeyError(f"parameter {name!r} matches no rule of the family's weight map: add one to its table")
            names = rule.hf
            if match.groups():
                names = tuple(n.format(layer_in_whole(model, plain[: match.end(1)])) for n in rule.hf)
            blocks = tuple(rule.layout(names, tuple(parameter.shape), sharding))
            found.append(Shard(f"{chunk}.{name}", parameter.data, blocks))
    return found
