"""Sharded tensors in safetensors files, one file per rank, with checksums. They can be read back in any other division.

Nothing is pickled. The files are safetensors, and their description is JSON.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open

# The number of bytes that are written or read at once.
CHUNK = 16 << 20
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class TensorPart:
    """A box of the complete tensor ``key``.

    Attributes:
        key: name of the complete tensor.
        global_shape: shape of the complete tensor.
        start: the box's first element in the complete tensor.
        values: the box's values on the host, with as many dimensions as the complete tensor.
    """

    key: str
    global_shape: tuple[int, ...]
    start: tuple[int, ...]
    values: torch.Tensor


def write(path: Path, parts: list[TensorPart]) -> dict[str, Any]:
    """Write the parts into one file. The file has been flushed to the disk when this returns.

    Returns the file's entry for :func:`manifest` (JSON). Raises OSError naming the file if it can't be written.
    """
    names = [f"{part.key}@{','.join(map(str, part.start))}" for part in parts]
    ends = list(accumulate(part.values.nbytes for part in parts))
    header = {
        name: {
            "dtype": _NAMES[part.values.dtype],
            "shape": list(part.values.shape),
            "data_offsets": [end - part.values.nbytes, end],
        }
        for name, part, end in zip(names, parts, ends, strict=True)
    }
    assert len(header) == len(parts), f"{path}: a part is there twice"
    text = json.dumps(header).encode()
    # The format requires that the tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    checksum = 0
    try:
        with path.open("wb") as file:
            data: Any
            for data in (len(text).to_bytes(8, "little"), text, *(_bytes(part.values) for part in parts)):
                for i in range(0, len(data), CHUNK):
                    chunk = data[i : i + CHUNK]
                    checksum = zlib.crc32(chunk, checksum)
                    file.write(chunk)
            size = file.tell()
            sync(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    index = [
        [part.key, list(part.global_shape), name, list(part.start), list(part.values.shape)]
        for name, part in zip(names, parts, strict=True)
    ]
    return {"file": path.name, "bytes": size, "crc32": f"{checksum:08x}", "parts": index}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write one JSON file atomically. Returns its entry for :func:`manifest`."""
    return write_bytes(path, json.dumps(value).encode())


def write_bytes(path: Path, data: bytes) -> dict[str, Any]:
    """Write one file atomically. Returns its entry for :func:`manifest`."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        sync(file)
    os.replace(partial, path)
    return {"file": path.name, "bytes": len(data), "crc32": f"{zlib.crc32(data):08x}", "parts": []}


def sync(file: Any) -> None:
    """Flush an open file to the disk."""
    file.flush()
    os.fsync(file.fileno())


def manifest(written: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the entries of all files into a manifest.

    Returns ``files`` (name → ``bytes`` and ``crc32``) and ``tensors`` (key → ``shape`` and ``parts``). A part is a list
    of file, name in the file, start and shape.
    """
    tensors: dict[str, Any] = {}
    for entry in written:
        for key, shape, name, start, size in entry["parts"]:
            tensor = tensors.setdefault(key, {"shape": shape, "parts": []})
            tensor["parts"].append([entry["file"], name, start, size])
    return {"files": {e["file"]: {"bytes": e["bytes"], "crc32": e["crc32"]} for e in written}, "tensors": tensors}


def fault(path: Path, expected: Mapping[str, Any]) -> str | None:
    """Compare a file with ``bytes`` and ``crc32`` of ``expected``. Returns what is wrong, or None if it is intact."""
    checksum = 0
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes, {expected['bytes']} were written"
        with path.open("rb") as file:
            chunk = file.read(CHUNK)
            while chunk:
                checksum = zlib.crc32(chunk, checksum)
                chunk = file.read(CHUNK)
    except OSError as error:
        return f"{path.name}: {error.strerror}"
    if f"{checksum:08x}" != expected["crc32"]:
        return f"{path.name} has the checksum {checksum:08x}, written was {expected['crc32']}"
    return None


class Reader:
    """A context manager that reads boxes of the tensors of a folder. Files are opened once and memory-mapped."""

    def __init__(self, folder: Path, tensors: Mapping[str, Any]) -> None:
        """``tensors`` is the entry of that name in the folder's :func:`manifest`."""
        self.folder = folder
        self.tensors = tensors
        self.stack = ExitStack()
        self.files: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stack.close()

    def fill(self, key: str, global_shape: tuple[int, ...], start: tuple[int, ...], target: torch.Tensor) -> None:
        """Copy a box of the complete tensor ``key`` into ``target``. The box begins at ``start``.

        Raises ValueError if the tensor is missing, has another shape, or lacks a part of the box.
        """
        if key not in self.tensors:
            raise ValueError(f"{self.folder}: holds no tensor {key}")
        written = self.tensors[key]
        if list(global_shape) != written["shape"]:
            raise ValueError(
                f"{self.folder}: {key} has the shape {written['shape']}, asked for is {list(global_shape)}"
            )
        filled = 0
        with torch.no_grad():
            for file, name, part_start, part_shape in written["parts"]:
                # The overlap of the part and the box, in elements of the complete tensor.
                low, extents = _overlap(part_start, part_shape, start, target.shape)
                if any(extent <= 0 for extent in extents):
                    continue
                piece = self._file(file).get_slice(name)[_slices(low, extents, part_start)]
                target[_slices(low, extents, start)].copy_(piece)
                filled += prod(extents)
        if filled != target.numel():
            raise ValueError(f"{self.folder}: {filled} of {target.numel()} elements of {key} are there")

    def _file(self, name: str) -> Any:
        if name not in self.files:
            self.files[name] = self.stack.enter_context(safe_open(self.folder / name, framework="pt"))
        return self.files[name]


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy())


def _overlap(
    start: Sequence[int], shape: Sequence[int], other_start: Sequence[int], other_shape: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The start of the overlap of two boxes, and its extent along each axis.

    Without overlap, an extent is 0 or negative.
    """
    low = []
    extents = []
    for first, size, other_first, other_size in zip(start, shape, other_start, other_shape, strict=True):
        begin = max(first, other_first)
        end = min(first + size, other_first + other_size)
        low.append(begin)
        extents.append(end - begin)
    return low, extents


def _slices(low: Sequence[int], extents: Sequence[int], origin: Sequence[int]) -> tuple[slice, ...]:
    """The box that begins at ``low``, as an index into a tensor whose first element is at ``origin``."""
    slices = []
    for first, extent, base in zip(low, extents, origin, strict=True):
        slices.append(slice(first - base, first - base + extent))
    return tuple(slices)
