"""FP32 masters and moments of a distributed optimiser as boxes of the complete model's tensors, for checkpoints.

A data-parallel rank owns a range of each gradient buffer. Therefore it owns the elements from ``first`` to ``stop`` of
a parameter in row-major order: the end of one row, full rows, and the beginning of another row. Each rank writes these
boxes without any communication, and all ranks write about the same number of bytes.

Megatron-Core has two formats of its own. ``fully_reshardable`` first gathers all states on every data-parallel rank.
``dp_reshardable`` can be loaded only under the layout that wrote it.
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


def state_parts(optimizer: Any, model_state: dict[str, Any]) -> list[TensorPart]:
    """The parts of the DistributedOptimizer's state that this rank writes, as views of the state.

    ``model_state`` is the model's sharded state dict. If model-parallel ranks have equal states, the first of them
    writes.
    """
    parts = []
    for parameter, first, stop, piece, offset in _owned(optimizer, model_state):
        # The last replica number counts data-parallel ranks. They own different ranges, so they are not replicas here.
        if not is_main_replica((*piece.replica_id[:-1], 0)):
            continue
        for name, state in _states(optimizer, parameter).items():
            key = f"optimizer.state.{name}.{piece.key}"
            for start, values in _boxes_of(piece, offset, state, first, stop):
                parts.append(TensorPart(key, piece.global_shape, start, values))
    return parts


@torch.no_grad()
def load_state(optimizer: Any, model_state: dict[str, Any], reader: Reader, prefix: str) -> None:
    """Read this rank's part into the optimiser's state, which must be allocated.

    ``prefix`` precedes the keys of :func:`state_parts`. Raises ValueError for a tensor that is missing or has another
    shape.
    """
    loaded: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    for parameter, first, stop, piece, offset in _owned(optimizer, model_state):
        if parameter not in loaded:
            states = _states(optimizer, parameter)
            loaded[parameter] = {name: torch.empty(stop - first, dtype=state.dtype) for name, state in states.items()}
        for name, state in loaded[parameter].items():
            for start, values in _boxes_of(piece, offset, state, first, stop):
                reader.fill(f"{prefix}optimizer.state.{name}.{piece.key}", piece.global_shape, start, values)
    for parameter, states in loaded.items():
        # States that were not loaded are kept: torch's step counters.
        present = optimizer._get_main_param_and_optimizer_states(parameter)
        optimizer._set_main_param_and_optimizer_states(parameter, present | states)


def _states(optimizer: Any, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """``param``, ``exp_avg`` and ``exp_avg_sq``, flat. torch's step counters belong to the parameter groups."""
    states = optimizer._get_main_param_and_optimizer_states(parameter)
    return {name: states[name] for name in ("param", *optimizer.optimizer_state_keys)}


def _owned(optimizer: Any, model_state: dict[str, Any]) -> Iterator[tuple[torch.Tensor, int, int, ShardedTensor, int]]:
    """Yields (parameter, first, stop, piece, offset): this rank owns elements ``first`` to ``stop`` of the parameter.

    A piece is a tensor of the checkpoint that begins at element ``offset`` of the parameter. A parameter has several
    pieces if a factory splits it. The gate and up projections are such a parameter.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    leaf_of = {leaf.data: leaf for leaf in nested_values(sharded)}
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    first = ranges["param"].start
                    stop = ranges["param"].end
                    leaf = leaf_of[parameter]
                    if isinstance(leaf, ShardedTensorFactory):
                        # Split a meta tensor of the same shape, because the parameter itself may be in FP8.
                        pieces = replace(leaf, data=torch.empty(parameter.shape, device="meta")).build()
                    else:
                        pieces = [leaf]
                    offset = 0
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
    """Yields (start in the complete tensor, view of ``state``) of each box of ``state`` that lies in ``piece``.

    ``state`` [stop - first] holds the elements ``first`` to ``stop`` of the parameter.
    """
    low = max(first, offset)
    high = min(stop, offset + piece.data.numel())
    if low >= high:
        return
    position = low - first
    for start, shape in boxes(tuple(piece.local_shape), low - offset, high - offset):
        size = prod(shape)
        global_start = tuple(g + s for g, s in zip(piece.global_offset, start, strict=True))
        yield global_start, state[position : position + size].view(shape)
        position += size


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields (start, shape) of the boxes that make up elements ``start`` to ``stop`` of a row-major tensor, in order.

    A tensor of n dimensions gives at most 2n - 1 boxes.
    """
    if len(shape) == 1:
        yield (start,), (stop - start,)
        return
    row = prod(shape[1:])
    # Full rows from first_row to end_row.
    first_row = -(-start // row)
    end_row = stop // row
    if first_row > end_row:
        # All elements lie within one row.
        yield from _in_row(shape, end_row, start - end_row * row, stop - end_row * row)
        return
    head = first_row * row - start
    if head:
        yield from _in_row(shape, first_row - 1, row - head, row)
    if first_row < end_row:
        yield (first_row, *[0] * (len(shape) - 1)), (end_row - first_row, *shape[1:])
    tail = stop - end_row * row
    if tail:
        yield from _in_row(shape, end_row, 0, tail)


def _in_row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The boxes of elements ``start`` to ``stop`` of one row."""
    for box_start, box_shape in boxes(shape[1:], start, stop):
        yield (row, *box_start), (1, *box_shape)
