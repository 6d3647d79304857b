"""Map Hugging Face weights to Megatron-Core parameters: names, and the rectangles that a tensor-parallel rank holds.

A model family lists its ``ParamMapping``s. :func:`shards` turns them into blocks. Loading, export, the comparison of
gradients and the weight sync to vLLM all read these blocks.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.blocks import Block, Shard

# Transformer Engine fuses a norm with the linear layer after it. The mappings use the parameter names of unfused
# layers.
_FUSED_NORM_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


@dataclass(frozen=True)
class Sharding:
    """A rank's tensor-parallel position, and the Hugging Face model's sizes before padding.

    Attributes:
        tensor: tensor-parallel size.
        tensor_rank: this rank's place in the tensor-parallel group.
        heads: query heads of the complete model.
        groups: key-value heads of the complete model.
        head_dim: elements per head.
        vocab: rows of the embedding; 0 for a vision tower.
    """

    tensor: int
    tensor_rank: int
    heads: int
    groups: int
    head_dim: int
    vocab: int

    @property
    def padded_groups(self) -> int:
        """Key-value heads after zero-padding to a multiple of the tensor-parallel size."""
        return round_up(self.groups, self.tensor)

    @property
    def padded_heads(self) -> int:
        """Query heads after zero-padding. The number of query heads per key-value head does not change."""
        return self.heads // self.groups * self.padded_groups

    @property
    def padded_vocab(self) -> int:
        """Vocabulary after padding to a multiple of the tensor-parallel size."""
        return round_up(self.vocab, self.tensor)


def sharding_of(text: Any, tensor: int, tensor_rank: int) -> Sharding:
    """The Sharding of a language model with the Hugging Face configuration ``text``."""
    heads = text.num_attention_heads
    return Sharding(
        tensor=tensor,
        tensor_rank=tensor_rank,
        heads=heads,
        groups=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
    )


# (Hugging Face names, shape of the local parameter, sharding) → the blocks that make up the local parameter.
ShardFn = Callable[[tuple[str, ...], tuple[int, ...], Sharding], list[Block]]


@dataclass(frozen=True)
class ParamMapping:
    """One Megatron parameter and the Hugging Face tensors that it consists of.

    Attributes:
        hf_names: patterns of the tensors' names. ``{}`` stands for the layer's number.
        megatron_name: pattern of the parameter's name.
        shard_fn: computes which rectangles of the tensors a rank holds, and where they are in the parameter.
    """

    hf_names: tuple[str, ...]
    megatron_name: str
    shard_fn: ShardFn


@dataclass(frozen=True)
class ModuleMapping:
    """The parameters of one module of a model.

    A text model is one module with prefix "". A vision-language model has two modules, "language." and "vision.", each
    with its own number of heads.

    Attributes:
        prefix: beginning of the module's Megatron names.
        params: the module's mappings, their Megatron names without the prefix.
        sharding: the module's heads and vocabulary, with this rank's tensor-parallel position.
    """

    prefix: str
    params: Sequence[ParamMapping]
    sharding: Sharding


def round_up(n: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``n``."""
    return -(-n // multiple) * multiple


def replicated(names: tuple[str, ...], shape: tuple[int, ...], s: Sharding) -> list[Block]:
    """Every rank holds the full tensor."""
    zero = (0,) * len(shape)
    return [Block(names[0], zero, zero, shape)]


def column_parallel(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Divide the output dimension (rows of the matrix) evenly over the ranks. For a weight or a bias."""
    local_start = (0,) * len(shape)
    hf_start = (sharding.tensor_rank * shape[0], *local_start[1:])
    return [Block(names[0], hf_start, local_start, shape)]


def row_parallel(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Divide the input dimension (columns of the matrix) evenly over the ranks."""
    return [Block(names[0], (0, sharding.tensor_rank * shape[1]), (0, 0), shape)]


def vocabulary(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Divide the rows evenly over the ranks, after padding the vocabulary to a multiple of the tensor-parallel size."""
    start = sharding.tensor_rank * shape[0]
    rows = max(0, min(shape[0], sharding.vocab - start))
    if rows == 0:
        return []
    return [Block(names[0], (start, 0), (0, 0), (rows, shape[1]))]


def gate_up(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """SwiGLU: this rank's rows of the gate projection, then its rows of the up projection. For a weight or a bias."""
    rows = shape[0] // 2
    rest = shape[1:]
    zeros = (0,) * len(rest)
    hf_start = (sharding.tensor_rank * rows, *zeros)
    return [Block(name, hf_start, (i * rows, *zeros), (rows, *rest)) for i, name in enumerate(names)]


def qkv(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Build Megatron's grouped order from three tensors: for each key-value head its query heads, its key, its value.

    For a weight or a bias. ``names`` has the names of the query, key and value tensors.
    """
    return _grouped(names, (0, 0, 0), shape, sharding)


def fused_qkv(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Like ``qkv``, but from one tensor with the rows of all query heads, then all keys, then all values."""
    query_rows = sharding.heads * sharding.head_dim
    key_rows = sharding.groups * sharding.head_dim
    return _grouped(names * 3, (0, query_rows, query_rows + key_rows), shape, sharding)


def _grouped(
    names: tuple[str, ...], offsets: tuple[int, int, int], shape: tuple[int, ...], sharding: Sharding
) -> list[Block]:
    """The blocks of query, key and value. ``offsets`` has the first row of each one in its tensor."""
    heads_per_group = sharding.heads // sharding.groups
    rest = shape[1:]
    zeros = (0,) * len(rest)
    local_groups = sharding.padded_groups // sharding.tensor
    blocks = []
    for local_group in range(local_groups):
        group = sharding.tensor_rank * local_groups + local_group
        if group >= sharding.groups:
            # The remaining groups of this rank are padding.
            break
        local_row = local_group * (heads_per_group + 2) * sharding.head_dim
        for name, offset, heads in zip(names, offsets, (heads_per_group, 1, 1), strict=True):
            rows = heads * sharding.head_dim
            hf_row = offset + group * rows
            blocks.append(Block(name, (hf_row, *zeros), (local_row, *zeros), (rows, *rest)))
            local_row += rows
    return blocks


def head_vector(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Divide a vector over all heads (a QK-norm of the full width) like the heads. Padded heads stay zero."""
    start = sharding.tensor_rank * shape[0]
    length = max(0, min(shape[0], sharding.heads * sharding.head_dim - start))
    if length == 0:
        return []
    return [Block(names[0], (start,), (0,), (length,))]


def attention_output(names: tuple[str, ...], shape: tuple[int, ...], sharding: Sharding) -> list[Block]:
    """Divide the columns over the ranks like the heads (row-parallel). Columns of padded heads stay zero."""
    start = sharding.tensor_rank * shape[1]
    columns = max(0, min(shape[1], sharding.heads * sharding.head_dim - start))
    if columns == 0:
        return []
    return [Block(names[0], (0, start), (0, 0), (shape[0], columns))]


def unfused_name(name: str) -> str:
    """A parameter's name on a platform that does not fuse a norm with the linear layer after it."""
    for fused, unfused in _FUSED_NORM_NAMES.items():
        name = name.replace(fused, unfused)
    return name


def global_layer_index(model: torch.nn.Module, layer: str) -> int:
    """The index in the complete model, counted from 0, of the layer with the local name ``layer``."""
    return model.get_submodule(layer).layer_number - 1  # type: ignore[operator, return-value]


# Name of a Megatron parameter → (the match of the mapping's pattern, with the layer in group 1; the mapping; the
# sharding of the parameter's module). Raises KeyError for a name that no mapping matches.
FindMapping = Callable[[str], tuple[re.Match[str], ParamMapping, Sharding]]


def finder(mappings: Sequence[ModuleMapping]) -> FindMapping:
    """Return the function that finds a parameter's mapping."""
    patterns = []
    for module in mappings:
        for param in module.params:
            pattern = re.escape(module.prefix + param.megatron_name).replace(r"\{\}", r"(\d+)")
            patterns.append((re.compile(pattern), param, module.sharding))

    def find(name: str) -> tuple[re.Match[str], ParamMapping, Sharding]:
        name = unfused_name(name)
        for pattern, param, sharding in patterns:
            match = pattern.fullmatch(name)
            if match is not None:
                return match, param, sharding
        raise KeyError(f"parameter {name!r} matches no mapping of the model family: add one to its table")

    return find


def shards(chunks: Sequence[torch.nn.Module], mappings: Sequence[ModuleMapping]) -> list[Shard]:
    """All parameters of this rank's model chunks with their blocks.

    Raises KeyError naming a parameter that no mapping matches.
    """
    find = finder(mappings)
    result = []
    for number, chunk in enumerate(chunks):
        for name, parameter in chunk.named_parameters():
            match, param, sharding = find(name)
            hf_names = param.hf_names
            if match.groups():
                layer = global_layer_index(chunk, match.string[: match.end(1)])
                hf_names = tuple(pattern.format(layer) for pattern in hf_names)
            blocks = tuple(param.shard_fn(hf_names, tuple(parameter.shape), sharding))
            result.append(Shard(f"{number}.{name}", parameter.data, blocks))
    return result


def complete_blocks(find: FindMapping, name: str, shape: tuple[int, ...]) -> list[Block]:
    """The blocks of a parameter of the complete model, as a checkpoint stores it.

    The parts of all ranks are joined, and layers are numbered in the complete model. Padded heads and vocabulary rows
    come last, whatever tensor-parallel size they were padded for. No block covers them.

    Args:
        find: the :func:`finder` of the family's mappings for a tensor-parallel size of 1.
        name: the name of the Megatron parameter.
        shape: the shape of the parameter, with padding.

    Raises:
        KeyError: no mapping matches.
    """
    match, param, sharding = find(name)
    hf_names = tuple(pattern.format(*match.groups()) for pattern in param.hf_names)
    return param.shard_fn(hf_names, shape, sharding)
