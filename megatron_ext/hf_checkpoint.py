"""Hugging Face checkpoints in and out, streaming: a rank reads and writes only the rectangles it owns."""

import json
import math
import mmap
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoConfig

from megatron_ext.blocks import Shard, region

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def config(folder: str | Path) -> Any:
    """The model's configuration. Raises FileNotFoundError when the folder holds no model."""
    if not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"model.path={str(folder)!r} holds no config.json: give a Hugging Face model folder")
    return AutoConfig.from_pretrained(folder)


def headers(folder: str | Path) -> dict[Path, dict[str, Any]]:
    """File → its safetensors header (tensor name → dtype, shape, data_offsets), in file order."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"model.path={str(folder)!r} holds no *.safetensors file")
    found = {}
    for file in files:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            found[file] = json.loads(stream.read(size))
    return found


def load(shards: list[Shard], folder: str | Path) -> None:
    """Fill the local shards in place (cast to their dtype; uncovered elements become zero).

    Raises KeyError naming a tensor that the checkpoint lacks and ValueError on a rectangle outside its shape.
    """
    where = {name: file for file, header in headers(folder).items() for name in header if name != "__metadata__"}
    by_file: dict[Path, list[tuple[Any, torch.Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for shard in shards:
            shard.tensor.zero_()
            for block in shard.blocks:
                if block.hf_name not in where:
                    raise KeyError(f"{folder}: tensor {block.hf_name!r} is missing (needed by {shard.name})")
                by_file[where[block.hf_name]].append((block, shard.tensor))
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for block, tensor in wanted:
                    source = tensors.get_slice(block.hf_name)
                    if any(
                        a + n > full for a, n, full in zip(block.hf_start, block.shape, source.get_shape(), strict=True)
                    ):
                        raise ValueError(f"{block.hf_name}: {block} lies outside the checkpoint's {source.get_shape()}")
                    piece = source[region(block.hf_start, block.shape)]
                    tensor[region(block.local_start, block.shape)].copy_(piece)


def export(shards: list[Shard], source: str | Path, target: str | Path, writes: bool) -> None:
    """Collective: write ``target`` with the names, files and side files of ``source``, the shards' weights and dtype.

    Every rank with ``writes`` (one data-parallel replica) writes its own rectangles into files on a shared file system;
    no full tensor is gathered anywhere. The folder appears under its name only when it is complete.
    """
    source, target = Path(source), Path(target)
    partial = target.with_name(target.name + ".partial")
    layout = {file: _with_dtype(header, shards[0].tensor.dtype) for file, header in headers(source).items()}
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, partial / file.name)
        _set_config_dtype(partial / "config.json", shards[0].tensor.dtype)
        for file, header in layout.items():
            _create(partial / file.name, header)
    _barrier()
    if writes:
        blocks: dict[str, list[tuple[Any, torch.Tensor]]] = defaultdict(list)
        for shard in shards:
            for block in shard.blocks:
                blocks[block.hf_name].append((block, shard.tensor))
        for file, header in layout.items():
            _fill(partial / file.name, header, blocks)
    _barrier()
    if first:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    _barrier()


def _with_dtype(header: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same tensors in the same order, stored as ``dtype``."""
    (name_of_dtype,) = (name for name, d in _DTYPES.items() if d is dtype)
    changed: dict[str, Any] = {}
    end = 0
    for name, entry in header.items():
        if name == "__metadata__":
            changed[name] = entry
            continue
        start, end = end, end + math.prod(entry["shape"]) * dtype.itemsize
        changed[name] = {"dtype": name_of_dtype, "shape": entry["shape"], "data_offsets": [start, end]}
    return changed


def _set_config_dtype(file: Path, dtype: torch.dtype) -> None:
    config = json.loads(file.read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2) + "\n")


def _create(file: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def _fill(file: Path, header: dict[str, Any], blocks: dict[str, list[tuple[Any, torch.Tensor]]]) -> None:
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as memory:
        start = 8 + int.from_bytes(memory[:8], "little")
        for name, entry in header.items():
            for block, tensor in blocks.get(name, ()):
                offset, stop = (start + o for o in entry["data_offsets"])
                dtype = _DTYPES[entry["dtype"]]
                whole = torch.frombuffer(memory, dtype=dtype, count=(stop - offset) // dtype.itemsize, offset=offset)
                piece = tensor[region(block.local_start, block.shape)]
                whole.view(entry["shape"])[region(block.hf_start, block.shape)].copy_(piece)
                del whole  # releases the buffer, without which the map cannot be closed


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
