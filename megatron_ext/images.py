"""Images before the passes: the exchange of pixels between ranks, and the output of a frozen vision encoder.

Pixels go from the rank that computed them to the ranks that train on them. Each tensor-parallel rank of the first
pipeline stage gets a part of an image's rows, and the ranks gather the parts on the device.

A frozen encoder runs once for each prompt. Every pass, and every response to a prompt, then takes the same output of
the encoder from the host. The projector has a fiftieth of the encoder's work. It runs in the passes, whether it is
trained or not, so the reference may have another projector.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_ext import platform
from megatron_ext.batch import Array
from megatron_ext.collectives import all_gather_json
from megatron_ext.model import Model
from megatron_ext.packing import Part, VisionInputs, order_of_parts
from megatron_ext.routing import of_ranks
from megatron_ext.vision_language import gathered


def encoder_is_frozen(tower: torch.nn.Module) -> bool:
    """Whether no parameter of a vision tower is trained outside the projector."""
    return not any(p.requires_grad for name, p in tower.named_parameters() if not name.startswith("projector."))


def is_of_encoder(shard: str) -> bool:
    """Whether a shard belongs to a vision encoder.

    ``shard`` is the shard's name: the model chunk's number, a dot, and the parameter's name.
    """
    _, _, parameter = shard.partition(".")
    return parameter.startswith("vision.") and not parameter.startswith("vision.projector.")


def exchange(inputs: Sequence[VisionInputs], wanted: Array, model: Model, group: dist.ProcessGroup) -> None:
    """Collective over all ranks of a gloo group: set ``part`` of the prompts that this rank wants.

    All ranks have the same prompts in the same order. ``wanted``, bool [prompts], is True for the prompts that this
    rank wants. The pixels are this rank's own, or those of the first rank that has them. Raises ValueError for pixels
    that no rank has.
    """
    held = of_ranks(np.array([not vision.pixels.is_meta for vision in inputs], np.bool_), group)
    missing = of_ranks(wanted, group) & ~held
    nowhere = np.flatnonzero(missing.any(axis=0) & ~held.any(axis=0))
    if len(nowhere):
        raise ValueError(f"no rank has the pixels of prompt {nowhere[0]} of {len(inputs)}")
    source = held.argmax(axis=0)
    rank = dist.get_rank(group)
    ranks = model.parallel.tensor
    tensor_ranks = all_gather_json(model.parallel.tensor_rank, group)
    sent: list[dist.Work | None] = []
    # All receivers of the same part get the same block. The blocks are kept until they have been sent.
    outgoing: dict[tuple[int, bytes], torch.Tensor] = {}
    incoming: list[tuple[list[int], torch.Tensor]] = []
    for receiver, sender in np.argwhere(_pairs(missing, source)).tolist():
        chosen = np.flatnonzero(missing[receiver] & (source == sender)).tolist()
        if rank == sender:
            key = (tensor_ranks[receiver], bytes(missing[receiver] & (source == sender)))
            if key not in outgoing:
                parts = [Part.of(inputs[i].pixels, tensor_ranks[receiver], ranks) for i in chosen]
                outgoing[key] = torch.cat([part.rows.flatten().view(torch.uint8) for part in parts])
            sent.append(dist.isend(outgoing[key], group=group, group_dst=receiver))
        elif rank == receiver:
            block = torch.empty(sum(_part_bytes(inputs[i].pixels, ranks) for i in chosen), dtype=torch.uint8)
            sent.append(dist.irecv(block, group=group, group_src=sender))
            incoming.append((chosen, block))
    for i in np.flatnonzero(wanted & held[rank]).tolist():
        inputs[i].part = Part.of(inputs[i].pixels, model.parallel.tensor_rank, ranks)
    for work in sent:
        assert work is not None  # it is for a rank outside the group
        work.wait()
    for chosen, block in incoming:
        start = 0
        for i in chosen:
            pixels = inputs[i].pixels
            end = start + _part_bytes(pixels, ranks)
            rows = block[start:end].view(pixels.dtype).view(-1, *pixels.shape[1:])
            inputs[i].part = Part(rows, len(pixels), ranks)
            start = end


def _pairs(missing: Array, source: Array) -> Array:
    """bool [ranks, ranks]: whether a rank (the row) gets anything from another rank (the column)."""
    pairs = np.zeros((len(missing), len(missing)), np.bool_)
    for receiver, of_receiver in enumerate(missing):
        pairs[receiver, source[of_receiver]] = True
    return pairs


def _part_bytes(pixels: torch.Tensor, ranks: int) -> int:
    """The number of bytes of a rank's part of the pixels. The pixels may be on the meta device."""
    return -(-len(pixels) // ranks) * pixels[0].numel() * pixels.itemsize


@torch.no_grad()
def encode(model: Model, inputs: Sequence[VisionInputs]) -> None:
    """Collective over the tensor-parallel ranks of the first pipeline stage: run the frozen encoder on the images.

    For each prompt, ``encoded`` is set to this rank's part of the encoder's output, on the host. ``part``, the pixels,
    is set to None.
    """
    tower: Any = model.tower
    here = model.parallel

    def on_device(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(platform.current().device())

    for vision in inputs:
        part = vision.part
        assert part is not None, "exchange comes first"
        order = on_device(torch.from_numpy(order_of_parts([part]))) if part.ranks > 1 else None
        pixels = gathered(on_device(part.rows.to(tower.dtype)), order)
        rows = tower.encode(pixels, tower.layout(vision.grid, on_device))
        own = Part.of(rows, here.tensor_rank, here.tensor)
        vision.encoded = Part(own.rows.cpu(), own.total, own.ranks)
        vision.part = None
