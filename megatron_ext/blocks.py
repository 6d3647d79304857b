"""Block and Shard. Loading, export and the weight sync all move rectangles of Hugging Face tensors."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """A rectangle of one Hugging Face tensor and its place in one local Megatron parameter.

    Elements of a local parameter that no block covers are padding: they are zero and never sent.

    Attributes:
        hf_name: name of the Hugging Face tensor.
        hf_start: the rectangle's first element in that tensor, one index per dimension.
        local_start: the rectangle's first element in the local parameter.
        shape: the rectangle's extent.
    """

    hf_name: str
    hf_start: tuple[int, ...]
    local_start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A local Megatron parameter: its ``name`` (unique on this rank), its ``tensor`` and the ``blocks`` in it."""

    name: str
    tensor: torch.Tensor
    blocks: tuple[Block, ...]


def region(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Index expression of the rectangle at ``start`` with extent ``shape``."""
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
