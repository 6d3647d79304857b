"""Export a checkpoint as a Hugging Face folder, in one process without ranks and without a Megatron-Core model.

A checkpoint holds each parameter of the complete model under one name, whatever parallel layout wrote it. So the
mappings of the model family for a tensor-parallel size of 1 describe which rectangles of Hugging Face tensors a
parameter consists of.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_ext import hf_checkpoint, scalar_head, shard_files
from megatron_ext.blocks import Block
from megatron_ext.checkpoint import POLICY, CheckpointError, manifest
from megatron_ext.hf_checkpoint import Layout, Parameter
from megatron_ext.models import family
from megatron_ext.weight_map import complete_blocks, finder

# Key prefixes of the policy's tensors in a checkpoint that are not weights.
OTHER_STATES = (f"{POLICY}/optimizer.", f"{POLICY}/rng.")


def export(checkpoint: Path, layout: Layout, folder: Path) -> None:
    """Write the policy of a complete checkpoint into an empty folder, bit for bit as ``hf_checkpoint.export`` does.

    At any moment a few pieces of ``hf_checkpoint.PIECE_BYTES`` are in memory: the piece that was read, and the mapped
    pages of the file that it comes from. The files that hold weights are first compared with their checksums.

    Args:
        checkpoint: the folder ``step_…``.
        layout: the layout for the Hugging Face folder that training started from, in the dtype of training.
        folder: the folder to write into.

    Raises:
        CheckpointError: a file is damaged, or the checkpoint is that of another model.
    """
    described = manifest(checkpoint)
    tensors = {
        key: tensor
        for key, tensor in described["tensors"].items()
        if key.startswith(f"{POLICY}/") and not key.startswith(OTHER_STATES)
    }
    for name in sorted({part[0] for tensor in tensors.values() for part in tensor["parts"]}):
        fault = shard_files.fault(checkpoint / name, described["files"][name])
        if fault is not None:
            raise CheckpointError(f"{checkpoint} is damaged: {fault}; use another step")
    parameters = []
    for key, blocks in _blocks(tensors, layout).items():
        parameters.append(Parameter(blocks, partial(_read, checkpoint, tensors, key, layout.dtype)))
    hf_checkpoint.create(folder, layout)
    hf_checkpoint.fill(folder, layout, parameters)


def _blocks(tensors: Mapping[str, Any], layout: Layout) -> dict[str, list[Block]]:
    """The blocks of each tensor of a checkpoint.

    Raises CheckpointError for a tensor that does not fit the exported model or that the checkpoint lacks. Also raises
    it if two tensors of the checkpoint are one tensor in the model, because the model's embeddings are tied and the
    checkpoint's are not.
    """
    hf_config = hf_checkpoint.config(layout.source)
    mappings = family(hf_config.architectures[0]).param_mappings(hf_config, 1, 0)
    if layout.head is not None:
        mappings = scalar_head.with_scalar_head(mappings)
    find = finder(mappings)
    published = hf_checkpoint.published_name(layout.source)
    shapes: dict[str, list[int]] = {}
    for header in layout.headers.values():
        shapes |= {published(name): entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    blocks_of = {}
    covered: dict[tuple[str, tuple[int, ...]], str] = {}
    for key, tensor in tensors.items():
        blocks_of[key] = complete_blocks(find, key.removeprefix(f"{POLICY}/"), tuple(tensor["shape"]))
        for block in blocks_of[key]:
            shape = shapes.get(block.hf_name, [])
            ends = [start + size for start, size in zip(block.hf_start, block.shape, strict=True)]
            if len(ends) != len(shape) or any(end > size for end, size in zip(ends, shape, strict=True)):
                raise CheckpointError(
                    f"{key} of the checkpoint does not fit {block.hf_name} {shape} of {layout.source}: the run began "
                    "with another model"
                )
            other = covered.setdefault((block.hf_name, block.hf_start), key)
            if other != key:
                raise CheckpointError(
                    f"{other} and {key} of the checkpoint are both {block.hf_name} in {layout.source}: the run began "
                    "with another model"
                )
    lacking = shapes.keys() - {hf_name for hf_name, _ in covered}
    if lacking:
        named = ", ".join(sorted(lacking)[:3])
        raise CheckpointError(
            f"the checkpoint has nothing of {named} of {layout.source} ({len(lacking)} tensors): the run began with "
            "another model"
        )
    return blocks_of


def _read(
    checkpoint: Path,
    tensors: Mapping[str, Any],
    key: str,
    dtype: torch.dtype,
    start: tuple[int, ...],
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Read a rectangle of a tensor of the checkpoint."""
    values = torch.empty(shape, dtype=dtype)
    # Each rectangle has its own reader, because the pages that a reader maps stay in memory until it is closed.
    with shard_files.Reader(checkpoint, tensors) as reader:
        reader.fill(key, tuple(tensors[key]["shape"]), start, values)
    return values
