"""The checksum adds up over any tiling, and sees what it must see."""

import itertools

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.weight_sync.checksum import checksum_unit, rectangle_checksum
from rollout.weight_sync.layout import wrap


def tiles(draw, shape):
    """Random cuts of each dimension; the rectangles between them."""
    grid = [[]]
    for extent in shape:
        cuts = sorted({0, extent, *draw(st.lists(st.integers(0, extent), max_size=3))})
        grid = [[*one, (a, b)] for one in grid for a, b in itertools.pairwise(cuts)]
    return [tuple(slice(a, b) for a, b in one) for one in grid]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_shares_of_any_tiling_add_up_to_the_checksum_of_the_whole(data):
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float32]))
    values = torch.randn(shape).to(dtype)
    parts = tiles(data.draw, shape)
    ends = [shape[-1], *(part[-1].start for part in parts), *(part[-1].stop for part in parts)]
    unit = checksum_unit(values.element_size(), ends)
    checksum = rectangle_checksum(values, (0,) * len(shape), shape, unit)
    shares = [rectangle_checksum(values[part], [s.start for s in part], shape, unit) for part in parts]
    assert wrap(sum(shares)) == checksum


def test_matches_the_formula_in_the_docstring():
    """Against a slow computation in Python integers, with the hashes taken from one-element tensors."""
    bits = torch.tensor([[3, -7], [0, 11]], dtype=torch.int32)
    one = torch.ones((1, 1), dtype=torch.int32).view(torch.float32)

    def weight(row: int, column: int) -> int:
        return rectangle_checksum(one, (row, column), (2, 2), 1)

    expected = sum(int(bits[r, c]) * weight(r, c) for r in range(2) for c in range(2))
    assert rectangle_checksum(bits.view(torch.float32), (0, 0), (2, 2), 1) == wrap(expected)


@pytest.mark.parametrize("unit", [1, 4])
def test_sees_a_flipped_bit_and_exchanged_rows_columns_and_elements(unit):
    values = torch.randn(16, 32).to(torch.bfloat16)
    rows, columns, elements, bit = (values.clone() for _ in range(4))
    rows[[2, 9]] = rows[[9, 2]]
    columns[:, [2, 9]] = columns[:, [9, 2]]
    elements[3, 4], elements[5, 6] = values[5, 6], values[3, 4]
    bit.view(torch.int16)[7, 7] ^= 1
    sums = {rectangle_checksum(changed, (0, 0), (16, 32), unit) for changed in (values, rows, columns, elements, bit)}
    assert len(sums) == 5


def test_does_not_depend_on_strides_or_alignment():
    store = torch.randn(40, 72).to(torch.bfloat16)
    odd = store[1:33, 3:67]
    assert rectangle_checksum(odd, (0, 0), (32, 64), 4) == rectangle_checksum(odd.contiguous(), (0, 0), (32, 64), 4)
    transposed = store[:32, :64].t().contiguous().t()
    straight = rectangle_checksum(store[:32, :64].contiguous(), (0, 0), (32, 64), 4)
    assert rectangle_checksum(transposed, (0, 0), (32, 64), 4) == straight


def test_unit_divides_every_boundary_and_fills_at_most_64_bits():
    assert checksum_unit(2, [576, 64]) == 4
    assert checksum_unit(2, [576, 66]) == 2
    assert checksum_unit(2, [577]) == 1
    assert checksum_unit(4, [576]) == 2


@given(st.integers(-(2**70), 2**70))
def test_wrap_is_two_complement_64_bit(value):
    assert wrap(value) == int(numpy.uint64(value % 2**64).astype(numpy.int64))
