"""Divide the processing of prompts among the ranks: each row with images or clips is processed by one rank.

That rank keeps the row's pixels. The ranks exchange the rest as safetensors blocks, with the prompts in the format of
``megatron_ext.batch``.
"""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load, save

from megatron_ext import batch as batches
from megatron_ext.batch import Array, TokenBatch
from megatron_ext.collectives import on_all_ranks_bytes
from megatron_ext.packing import VisionInputs
from recipes.data.processor import ProcessedPrompt, PromptProcessor
from recipes.data.rows import Row, media_files

PROMPTS = "prompts"  # the block's entry with the prompts
SHAPES = "shapes"  # the block's entry with the shapes of the pixels, as JSON


def process(
    processor: PromptProcessor,
    rows: Sequence[Row],
    dtype: torch.dtype,
    group: dist.ProcessGroup,
    keep_pixels: bool = True,
) -> list[ProcessedPrompt]:
    """Collective over a gloo group: process the rows into prompts, in order, with pixels in ``dtype``.

    A row that occurs again, by its id, has the same prompt.

    Rows with images or clips are distributed over the ranks in turn. The pixels stay on the rank that computed them,
    and are on the meta device on the other ranks. Without ``keep_pixels`` they are on the meta device on every rank;
    this is for the engines, which compute their own. Every rank processes all text rows.

    Raises what ``processor`` raises. The other ranks then raise RuntimeError with its text.
    """
    by_id = {row["id"]: row for row in rows}
    with_media = [row_id for row_id, row in by_id.items() if media_files(row)]
    prompts = {row_id: processor(row) for row_id, row in by_id.items() if not media_files(row)}
    if with_media:
        rank = dist.get_rank(group)
        ranks = dist.get_world_size(group)
        device = "cpu" if keep_pixels else "meta"
        own: list[ProcessedPrompt] = []

        def of_this_rank() -> bytes:
            own.extend(with_pixels_as(processor(by_id[row_id]), dtype, device) for row_id in with_media[rank::ranks])
            return to_bytes(own)

        for source, block in enumerate(on_all_ranks_bytes(of_this_rank, group)):
            of_rank = own if source == rank else from_bytes(block, dtype)
            prompts |= dict(zip(with_media[source::ranks], of_rank, strict=True))
    return [prompts[row["id"]] for row in rows]


def with_pixels_as(processed: ProcessedPrompt, dtype: torch.dtype, device: str) -> ProcessedPrompt:
    """The prompt with its pixels in ``dtype``, the precision of the vision tower's input, on ``device``."""
    assert processed.vision is not None  # of a row with media
    pixels = processed.vision.pixels.to(device, dtype)
    return replace(processed, vision=replace(processed.vision, pixels=pixels))


def to_bytes(processed: Sequence[ProcessedPrompt]) -> bytes:
    """Serialise prompts, without their pixels. Inverse of :func:`from_bytes`."""
    responses: list[Array] = [np.empty(0, np.int32)] * len(processed)
    prompts = batches.build([each.prompt for each in processed], responses).to_bytes()
    tensors: dict[str, Array] = {PROMPTS: np.frombuffer(prompts, np.uint8)}
    shapes = []
    for i, each in enumerate(processed):
        assert each.vision is not None  # of a row with media
        shapes.append(list(each.vision.pixels.shape))
        tensors[f"placeholders {i}"] = np.array(each.vision.placeholders, np.int32)
        if each.vision.grid is not None:
            tensors[f"grid {i}"] = each.vision.grid.numpy()
        if each.vision.positions is not None:
            tensors[f"positions {i}"] = np.array(each.vision.positions, np.int32)
    tensors[SHAPES] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    return save(tensors)


def from_bytes(block: bytes, dtype: torch.dtype) -> list[ProcessedPrompt]:
    """Inverse of :func:`to_bytes`. The pixels are on the meta device."""
    tensors = load(block)
    prompts = TokenBatch.from_bytes(tensors[PROMPTS].tobytes()).prompts
    processed = []
    for i, (prompt, shape) in enumerate(zip(prompts, json.loads(tensors[SHAPES].tobytes()), strict=True)):
        grid = tensors.get(f"grid {i}")
        positions = tensors.get(f"positions {i}")
        vision = VisionInputs(
            pixels=torch.empty(shape, dtype=dtype, device="meta"),
            grid=None if grid is None else torch.from_numpy(grid),
            placeholders=tensors[f"placeholders {i}"].tolist(),
            positions=None if positions is None else positions.tolist(),
        )
        processed.append(ProcessedPrompt(prompt, vision))
    return processed
