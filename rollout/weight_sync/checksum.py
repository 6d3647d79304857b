"""An exact checksum of a tensor, which is the sum of the checksums of any rectangles that tile the tensor.

For a tensor with rows r (the first dimension) and columns c (the other dimensions, flattened), the checksum is

    sum over r, c of  bits[r, c] * (a(r) + b(c))     in 64-bit integers that wrap around.

Here ``bits`` are the bit patterns of the elements, and a and b are hashes of the position in the full tensor. Integer
sums do not round and do not depend on the order, so trainer and engine get the same number from any layout. The
checksum changes when a bit changes, and when a row or column is in the wrong place or replaces another one.
"""

from collections.abc import Sequence

import torch

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _hash(index: torch.Tensor, salt: int) -> torch.Tensor:
    """Return an odd pseudo-random int64 for each int64 index, by two rounds of multiply and xor-shift."""
    value = index + salt
    for multiplier in (-7046029254386353131, -4658895280553007687):
        value = value * multiplier
        value = value ^ (value >> 31)
    return value | 1


def checksum_unit(itemsize: int, last_dimension: Sequence[int]) -> int:
    """Return how many neighbouring elements along the last dimension are read as one integer.

    It is the largest power of two of elements that fits into 64 bits and that divides every offset and extent in
    ``last_dimension``. Trainer and engine must use the same unit.
    """
    unit = 8 // itemsize
    while any(number % unit for number in last_dimension):
        unit //= 2
    return unit


def _as_integers(values: torch.Tensor, unit: int) -> torch.Tensor:
    width = values.element_size() * unit
    strides_are_aligned = all(
        stride % unit == 0 for stride, size in zip(values.stride()[:-1], values.shape[:-1], strict=True) if size > 1
    )
    starts_aligned = values.storage_offset() % unit == 0 and values.data_ptr() % width == 0
    if values.stride(-1) != 1 or not strides_are_aligned or not starts_aligned:
        # A view as wider integers needs contiguous, aligned rows.
        values = values.clone(memory_format=torch.contiguous_format)
    return values.view(INTEGERS[width])


def rectangle_checksum(values: torch.Tensor, start: Sequence[int], shape: Sequence[int], unit: int) -> int:
    """Return the contribution of a rectangle to the checksum of a tensor of ``shape``.

    ``values`` are the rectangle's elements: floats, with at least one dimension. ``start`` is its position in the
    tensor, and ``unit`` comes from :func:`checksum_unit`. The sum over rectangles that tile the tensor, wrapped by
    ``layout.wrap``, is the tensor's checksum.
    """
    integers = _as_integers(values.detach(), unit)
    device = values.device
    if integers.ndim == 1:
        first = start[0] // unit
        rows = _hash(torch.arange(first, first + integers.shape[0], device=device), 1)
        return int((integers.to(torch.int64) * rows).sum())
    # Positions in the full tensor, where the last dimension is counted in units.
    extents = [*shape[1:-1], shape[-1] // unit]
    starts = [*start[1:-1], start[-1] // unit]
    columns = torch.zeros((), dtype=torch.int64, device=device)
    for first, extent, size in zip(starts, extents, integers.shape[1:], strict=True):
        columns = columns.unsqueeze(-1) * extent + torch.arange(first, first + size, device=device)
    rows = torch.arange(start[0], start[0] + integers.shape[0], device=device)
    matrix = integers.reshape(integers.shape[0], -1)
    # The sum of bits * (a + b) equals the sum of (row sums * a) plus the sum of (column sums * b).
    row_sums = matrix.sum(1, dtype=torch.int64)
    column_sums = matrix.sum(0, dtype=torch.int64)
    total = (row_sums * _hash(rows, 1)).sum() + (column_sums * _hash(columns.reshape(-1), 2)).sum()
    return int(total)
