"""The layout of a vLLM worker's parameters, as rectangles of Hugging Face tensors. It converts to plain JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Index = tuple[int, ...]


class LayoutError(ValueError):
    """Elements of a tensor have no source, two sources, or no destination. The message names the tensor."""


@dataclass(frozen=True)
class Rectangle:
    """A rectangle of a tensor: its ``start`` and its extent ``shape`` in elements, one entry per dimension."""

    start: Index
    shape: Index

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> Index:
        return tuple(a + n for a, n in zip(self.start, self.shape, strict=True))

    def contains(self, other: "Rectangle") -> bool:
        starts = zip(self.start, other.start, strict=True)
        stops = zip(self.stop, other.stop, strict=True)
        return all(a <= b for a, b in starts) and all(a >= b for a, b in stops)

    def intersect(self, other: "Rectangle") -> "Rectangle | None":
        start = tuple(map(max, self.start, other.start))
        shape = tuple(b - a for a, b in zip(start, map(min, self.stop, other.stop), strict=True))
        return Rectangle(start, shape) if all(n > 0 for n in shape) else None


@dataclass(frozen=True)
class Region:
    """A rectangle of a worker's parameter, and the rectangle of an HF tensor that it comes from.

    ``start`` is the position in the parameter, ``hf_start`` that in tensor ``hf_name``. Both have the same ``shape``.
    """

    start: Index
    hf_name: str
    hf_start: Index
    shape: Index

    @property
    def target(self) -> Rectangle:
        return Rectangle(self.start, self.shape)

    @property
    def source(self) -> Rectangle:
        return Rectangle(self.hf_start, self.shape)


@dataclass(frozen=True)
class ParameterLayout:
    """The layout of one parameter of one vLLM worker."""

    name: str
    shape: Index
    dtype: str
    regions: tuple[Region, ...]
    # The rectangles that hold zeros instead of weights.
    padding: tuple[Rectangle, ...]
    # Whether the weight is assembled in separate memory and then quantised (``quantised.py``).
    staged: bool = False

    @staticmethod
    def from_json(data: dict[str, Any]) -> "ParameterLayout":
        """The inverse of ``dataclasses.asdict``, after a round trip through JSON."""
        return ParameterLayout(
            name=data["name"],
            shape=tuple(data["shape"]),
            dtype=data["dtype"],
            regions=tuple(
                Region(tuple(r["start"]), r["hf_name"], tuple(r["hf_start"]), tuple(r["shape"]))
                for r in data["regions"]
            ),
            padding=tuple(Rectangle(tuple(r["start"]), tuple(r["shape"])) for r in data["padding"]),
            staged=data["staged"],
        )


def add_indices(a: Sequence[int], b: Sequence[int]) -> Index:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def subtract_indices(a: Sequence[int], b: Sequence[int]) -> Index:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def wrap(value: int) -> int:
    """Return ``value`` modulo 2**64 as a signed 64-bit integer, the form in which checksums are added up."""
    return (value + 2**63) % 2**64 - 2**63


def check_exact_cover(what: str, shape: Index, rectangles: Sequence[Rectangle]) -> None:
    """Raise LayoutError naming ``what`` unless ``rectangles`` tile a tensor of ``shape``: each element exactly once."""
    tensor = Rectangle((0,) * len(shape), shape)
    for i, one in enumerate(rectangles):
        if not tensor.contains(one):
            raise LayoutError(f"{what} of shape {shape}: {one} sticks out of it")
        for other in rectangles[:i]:
            if one.intersect(other):
                raise LayoutError(f"{what} of shape {shape}: {one} and {other} provide the same elements")
    covered = sum(rectangle.size for rectangle in rectangles)
    if covered != tensor.size:
        raise LayoutError(f"{what} of shape {shape}: only {covered} of {tensor.size} elements are provided")
