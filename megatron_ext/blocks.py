"""The one primitive of every weight transfer: a rectangle of a Hugging Face tensor and its place in a local shard."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """A rectangle of one HF tensor and its place in one local Megatron parameter.

    ``hf_start`` / ``local_start`` are element offsets, ``shape`` the extent; all three have the tensor's rank.
    Elements of a local parameter that no block covers are padding (zero, never sent).
    """

    hf_name: str
    hf_start: tuple[int, ...]
    local_start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """A local Megatron parameter: ``name`` (unique on this rank), its ``tensor`` and the ``blocks`` that cover it."""

    name: str
    tensor: torch.Tensor
    blocks: tuple[Block, ...]


def region(start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Index expression of the rectangle at ``start`` with extent ``shape``."""
    return tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
