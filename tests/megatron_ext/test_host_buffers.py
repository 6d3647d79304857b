"""Host copies are the values of their moment, and the memory of the first is that of all."""

from collections.abc import Iterator

import pytest
import torch

from megatron_ext import platform
from megatron_ext.host_buffers import HostBuffers


@pytest.fixture(autouse=True)
def allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tensors each call of the platform made."""
    cpu = platform.activate("cpu")
    counts: list[int] = []
    empty_on_host = cpu.empty_on_host
    monkeypatch.setattr(cpu, "empty_on_host", lambda tensors: counts.append(len(tensors)) or empty_on_host(tensors))
    yield counts


def test_a_second_copy_takes_no_memory(allocations: list[int]) -> None:
    tensors = [torch.rand(3, 4), torch.rand(5).bfloat16(), torch.nn.Parameter(torch.rand(2)), torch.rand(4, 3).T]
    buffers = HostBuffers()
    first = buffers.copy(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(first, tensors, strict=True))
    assert all(copy.is_contiguous() and not copy.requires_grad for copy in first)
    addresses, old = [copy.data_ptr() for copy in first], [copy.clone() for copy in first]
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(1)
    assert all(torch.equal(copy, value) for copy, value in zip(first, old, strict=True)), "a copy of its moment"
    second = buffers.copy(tensors)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(second, tensors, strict=True))
    assert [copy.data_ptr() for copy in second] == addresses
    assert allocations == [4]


@pytest.mark.parametrize("other", [[torch.zeros(3)], [torch.zeros(2).double()], [torch.zeros(2), torch.zeros(2)]])
def test_other_shapes_are_made_anew(other: list[torch.Tensor], allocations: list[int]) -> None:
    buffers = HostBuffers()
    buffers.copy([torch.ones(2)])
    copies = buffers.copy(other)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, other, strict=True))
    assert [copy.dtype for copy in copies] == [tensor.dtype for tensor in other]
    assert allocations == [1, len(other)]
