"""Load and export Hugging Face checkpoints. A rank reads and writes only the rectangles that it holds."""

import itertools
import json
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoConfig

from megatron_ext import scalar_head
from megatron_ext.blocks import Block, Shard, region
from megatron_ext.models import family
from megatron_ext.scalar_head import Head

# The number of bytes of values that an export reads and writes at once.
PIECE_BYTES = 16 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def config(folder: str | Path) -> Any:
    """transformers' configuration of the model in ``folder``.

    Raises FileNotFoundError if there is no config.json, and ValueError for a model that is not supported.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"model.path={str(folder)!r} holds no config.json: give a Hugging Face model folder")
    raw = json.loads(file.read_text())
    if raw["model_type"] == "internvl_chat":
        # transformers does not know this type. The repository has code of its own, which is not run.
        from megatron_ext.models import internvl3

        return internvl3.config_from_chat(raw)
    return AutoConfig.from_pretrained(folder)


def headers(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """File → its safetensors header (tensor name → dtype, shape, data_offsets), in the order of file names.

    Raises FileNotFoundError if the folder has no safetensors file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model.path={str(folder)!r} holds no *.safetensors file")
    header_of = {}
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header_of[file] = json.loads(stream.read(size))
    return header_of


def published_name(folder: str | Path) -> Callable[[str], str]:
    """Return a function from a tensor's name in this checkpoint to its name in the family's parameter mappings.

    A family whose checkpoints have two kinds of names defines ``RENAMED``: prefix → prefix in published checkpoints.
    """
    prefixes: dict[str, str] = getattr(family(config(folder).architectures[0]), "RENAMED", {})

    def rename(name: str) -> str:
        for prefix, published_prefix in prefixes.items():
            if name.startswith(prefix):
                return published_prefix + name.removeprefix(prefix)
        return name

    return rename


def load(shards: list[Shard], folder: str | Path) -> None:
    """Fill the local shards in place with the checkpoint's weights, cast to the shards' dtype.

    Elements that no block covers become zero. If the checkpoint is that of a language model, a scalar head also becomes
    zero (our choice), so that all its values are 0 at first.

    Raises:
        KeyError: the checkpoint lacks a tensor. The message names it.
        ValueError: a block lies outside the checkpoint's tensor.
    """
    header_of = headers(folder)
    published = published_name(folder)
    may_be_missing = () if scalar_head.has_scalar_head(config(folder)) else (scalar_head.TENSOR,)
    stored_at = {published(name): (file, name) for file, header in header_of.items() for name in header}
    # Grouped by file, so that each file is opened once.
    blocks_by_file: dict[Path, list[tuple[Any, str, torch.Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for shard in shards:
            shard.tensor.zero_()
            for block in shard.blocks:
                if block.hf_name in may_be_missing:
                    continue
                if block.hf_name not in stored_at:
                    raise KeyError(f"{folder}: tensor {block.hf_name!r} is missing (needed by {shard.name})")
                file, stored_name = stored_at[block.hf_name]
                blocks_by_file[file].append((block, stored_name, shard.tensor))
        for file, blocks in blocks_by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for block, stored_name, tensor in blocks:
                    source = tensors.get_slice(stored_name)
                    shape = source.get_shape()
                    ends = [start + n for start, n in zip(block.hf_start, block.shape, strict=True)]
                    if any(end > size for end, size in zip(ends, shape, strict=True)):
                        raise ValueError(f"{block.hf_name}: {block} lies outside the checkpoint's {shape}")
                    values = source[region(block.hf_start, block.shape)]
                    tensor[region(block.local_start, block.shape)].copy_(values)


@dataclass(frozen=True)
class Parameter:
    """A parameter to export.

    Attributes:
        blocks: the rectangles of Hugging Face tensors in the parameter.
        read: (first element, extent) of a rectangle of the parameter → the values of the rectangle.
    """

    blocks: Sequence[Block]
    read: Callable[[tuple[int, ...], tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Layout:
    """The contents of an export: a folder like ``source`` whose tensors have ``dtype``.

    Attributes:
        head: the scalar head of the exported model, None for a language model.
        headers: each file of ``source`` with tensors → the safetensors header of the exported file.
    """

    source: Path
    dtype: torch.dtype
    head: Head | None
    headers: dict[Path, dict[str, Any]]


def export(shards: list[Shard], source: str | Path, target: str | Path, writes: bool, head: Head | None = None) -> None:
    """Collective: write a folder like ``source`` with the shards' weights in their dtype.

    The names of tensors, their division into files and all other files are those of ``source``. No full tensor is
    gathered on any rank. The folder gets the name ``target`` only when it is complete.

    Args:
        shards: this rank's parameters.
        source: the Hugging Face folder that the model was built from.
        target: the folder to write, on a file system that all ranks share.
        writes: whether this rank writes. The ranks of one data-parallel replica must write.
        head: the model's scalar head, None for a language model. ``source`` may have this head or be a language model.
    """
    target = Path(target)
    partial_folder = target.with_name(target.name + ".partial")
    layout = export_layout(source, shards[0].tensor.dtype, head)
    is_first_rank = not dist.is_initialized() or dist.get_rank() == 0
    if is_first_rank:
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        create(partial_folder, layout)
    _barrier()
    if writes:
        fill(partial_folder, layout, [Parameter(shard.blocks, partial(_values, shard.tensor)) for shard in shards])
    _barrier()
    if is_first_rank:
        shutil.rmtree(target, ignore_errors=True)
        partial_folder.rename(target)
    _barrier()


def export_layout(source: str | Path, dtype: torch.dtype, head: Head | None) -> Layout:
    """The layout of an export with the tensors of ``source`` in the same files, stored as ``dtype``.

    With a ``head`` the tensors are those of the model with that scalar head.
    """
    stored = headers(source)
    if head is not None:
        hidden_size = config(source).get_text_config().hidden_size
        stored = scalar_head.with_score_tensor(stored, len(head.labels), hidden_size)
    return Layout(Path(source), dtype, head, {file: _with_dtype(header, dtype) for file, header in stored.items()})


def create(folder: Path, layout: Layout) -> None:
    """Create the files of an export in an empty folder. All tensors are zero."""
    for file in layout.source.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder / file.name)
    _set_config_dtype(folder / "config.json", layout.dtype)
    if layout.head is not None:
        scalar_head.describe(folder, layout.headers, layout.head)
    for file, header in layout.headers.items():
        _create(folder / file.name, header)


def fill(folder: Path, layout: Layout, parameters: Sequence[Parameter]) -> None:
    """Write the parameters' values into the files that :func:`create` has created.

    Values are read in pieces of at most ``PIECE_BYTES`` (or one row of a tensor), and only the bytes of the values are
    written. An NFS client that has a copy of a page would write the whole page. It has such a copy if the file is
    mapped or opened for reading. With the page it would write its older copy of bytes that another node has written in
    the meantime.
    """
    parts: dict[str, list[tuple[Block, Parameter]]] = defaultdict(list)
    for parameter in parameters:
        for block in parameter.blocks:
            parts[block.hf_name].append((block, parameter))
    published = published_name(layout.source)
    for file, header in layout.headers.items():
        data_start = len(_header_bytes(header))
        # Write-only: an NFS client that may read a page would first do so, and then write the whole page.
        descriptor = os.open(folder / file.name, os.O_WRONLY)
        try:
            for name, entry in header.items():
                for block, parameter in parts.get(published(name), ()):
                    _fill(descriptor, data_start, entry, block, parameter)
        finally:
            os.close(descriptor)


def _with_dtype(header: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same tensors in the same order, stored as ``dtype``."""
    (name_of_dtype,) = (name for name, d in _DTYPES.items() if d is dtype)
    changed: dict[str, Any] = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            changed[name] = entry
            continue
        start = end
        end += math.prod(entry["shape"]) * dtype.itemsize
        changed[name] = {"dtype": name_of_dtype, "shape": entry["shape"], "data_offsets": [start, end]}
    return changed


def _set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    """Write the dtype of the weights into a config.json."""
    config = json.loads(file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    # The field's older name.
    config.pop("torch_dtype", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


def tensor_bytes(header: dict[str, Any]) -> int:
    """The number of bytes of all tensors of a file."""
    return max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)


def _create(file: Path, header: dict[str, Any]) -> None:
    """Create a file with the header and the space for the tensors, all zero."""
    written = _header_bytes(header)
    with file.open("wb") as stream:
        stream.write(written)
        stream.truncate(len(written) + tensor_bytes(header))
        stream.flush()
        os.fsync(stream.fileno())
        # This node must not keep a copy of the header's last page (see :func:`fill`).
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _header_bytes(header: dict[str, Any]) -> bytes:
    """The bytes of a file before its tensors: the header's length, then the header, padded to eight bytes."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _fill(file: int, data_start: int, entry: dict[str, Any], block: Block, parameter: Parameter) -> None:
    """Write a block of a parameter into an open file. ``entry`` is the header's entry of the block's tensor."""
    dtype = _DTYPES[entry["dtype"]]
    tensor_start = data_start + entry["data_offsets"][0]
    row_bytes = math.prod(block.shape[1:]) * dtype.itemsize
    rows = max(1, PIECE_BYTES // row_bytes)
    for row in range(0, block.shape[0], rows):
        shape = (min(rows, block.shape[0] - row), *block.shape[1:])
        values = parameter.read((block.local_start[0] + row, *block.local_start[1:]), shape)
        # A copy, because a tensor that shares its memory with numpy can't be resized any more, and offloading resizes
        # parameters.
        stored = values.detach().to("cpu", dtype, copy=True).contiguous().flatten().view(torch.uint8)
        remaining = memoryview(stored.numpy())
        for first, count in _runs((block.hf_start[0] + row, *block.hf_start[1:]), shape, entry["shape"]):
            run = remaining[: count * dtype.itemsize]
            if os.pwrite(file, run, tensor_start + first * dtype.itemsize) != len(run):
                raise OSError(f"{len(run)} bytes of a tensor could not be written: is the disk full?")
            remaining = remaining[len(run) :]


def _runs(start: tuple[int, ...], shape: tuple[int, ...], whole: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first element, number of elements) of each contiguous run of a rectangle in a row-major tensor, in order.

    ``whole`` is the tensor's shape.
    """
    strides = [math.prod(whole[axis + 1 :]) for axis in range(len(whole))]
    # The dimensions after this one are complete.
    last_partial = max((axis for axis in range(len(whole)) if shape[axis] != whole[axis]), default=0)
    count = math.prod(shape[last_partial:])
    outer = [range(start[axis], start[axis] + shape[axis]) for axis in range(last_partial)]
    for index in itertools.product(*outer):
        place = (*index, *start[last_partial:])
        yield sum(i * stride for i, stride in zip(place, strides, strict=True)), count


def _values(tensor: torch.Tensor, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[region(start, shape)]


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
