"""Masters and moments of a distributed optimiser as boxes of the whole model's tensors, each rank its own part.

A data-parallel rank owns a range of each gradient buffer, so of a parameter's elements, in row-major order, it owns
those from ``first`` to ``stop``: the rest of a row, whole rows, a part of a row. Written like that nothing is exchanged
and every rank writes as much as any other. Of Megatron-Core's formats one gathers all states on every data-parallel
rank before (``fully_reshardable``), another can be loaded only under the layout that wrote it (``dp_reshardable``).
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_ext.shard_files import Reader, TensorPart


def parts(optimizer: Any, model_state: dict[str, Any]) -> list[TensorPart]:
    """What this rank writes of the DistributedOptimizer's state, as views of it; ``model_state``: the model's sharded
    state. Where model-parallel ranks hold copies, the first one writes."""
    return [
        TensorPart(f"optimizer.state.{name}.{piece.key}", piece.global_shape, start, values)
        for parameter, first, stop, piece, offset in _owned(optimizer, model_state)
        if is_main_replica((*piece.replica_id[:-1], 0))  # the last counts data-parallel ranks, which hold no copies
        for name, state in _states(optimizer, parameter).items()
        for start, values in _boxes_of(piece, offset, state, first, stop)
    ]


@torch.no_grad()
def fill(optimizer: Any, model_state: dict[str, Any], reader: Reader, prefix: str) -> None:
    """Read what this rank holds into the optimiser's state, which must be allocated.

    Raises ValueError where a tensor is not there or has another shape.
    """
    read: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for parameter, first, stop, piece, offset in _owned(optimizer, model_state):
        states = read.setdefault(
            parameter,
            {name: torch.empty(stop - first, dtype=s.dtype) for name, s in _states(optimizer, parameter).items()},
        )
        for name, state in states.items():
            for start, values in _boxes_of(piece, offset, state, first, stop):
                reader.fill(f"{prefix}optimizer.state.{name}.{piece.key}", piece.global_shape, start, values)
    for parameter, states in read.items():
        present = optimizer._get_main_param_and_optimizer_states(parameter)
        optimizer._set_main_param_and_optimizer_states(parameter, present | states)  # torch's counters stay


def _states(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """``param``, ``exp_avg`` and ``exp_avg_sq``, flat; torch's step counters go with the parameter groups."""
    found = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: found[name] for name in ("param", *optimizer.optimizer_state_keys)}


def _owned(optimizer: Any, model_state: dict[str, Any]) -> Iterator[tuple[torch.Tensor, int, int, ShardedTensor, int]]:
    """Parameters of which this rank owns the elements from ``first`` to ``stop``, with the whole tensors' pieces they
    are made of (gate and up projections are two) and where in the parameter each piece begins."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    described = {leaf.data: leaf for leaf in nested_values(sharded)}
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    first, stop, offset = ranges["param"].start, ranges["param"].end, 0
                    leaf = described[parameter]
                    if isinstance(leaf, ShardedTensorFactory):  # of shapes alone: a parameter may be FP8
                        pieces = replace(leaf, data=torch.empty(parameter.shape, device="meta")).build()
                    else:
                        pieces = [leaf]
                    for piece in pieces:
                        assert piece.data.is_contiguous() and not piece.prepend_axis_num, f"{piece.key}: not rows"
                        yield parameter, first, stop, piece, offset
                        offset += piece.data.numel()
                    assert offset == parameter.numel(), (
                        f"{leaf.key}: {offset} of {parameter.numel()} elements described"
                    )


def _boxes_of(
    piece: ShardedTensor, offset: int, state: torch.Tensor, first: int, stop: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Of ``state``, a parameter's elements ``first`` to ``stop``, what is in ``piece``: where each box begins in the
    whole tensor, and a view of it."""
    low, high = max(first, offset), min(stop, offset + piece.data.numel())
    at = low - first
    for start, shape in boxes(tuple(piece.local_shape), low - offset, high - offset) if low < high else ():
        size = prod(shape)
        yield tuple(g + s for g, s in zip(piece.global_offset, start, strict=True)), state[at : at + size].view(shape)
        at += size


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``start`` to ``stop`` of a row-major tensor as boxes, in order: where each begins, and its shape.

    Of n dimensions at most 2n - 1 boxes.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # within one row
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if head := first * row - start:
        yield from _in_row(shape, first - 1, row - head, row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    if tail := stop - last * row:
        yield from _in_row(shape, last, 0, tail)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for where, size in boxes(shape[1:], start, stop):
        yield (row, *where), (1, *size)
