"""Hugging Face checkpoints in and out, streaming: a rank reads and writes only the rectangles it owns."""

import json
import math
import mmap
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoConfig

from megatron_ext import scalar_head
from megatron_ext.blocks import Shard, region
from megatron_ext.models import family

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def config(folder: str | Path) -> Any:
    """The model's configuration. Raises FileNotFoundError when the folder holds no model."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"model.path={str(folder)!r} holds no config.json: give a Hugging Face model folder")
    found = json.loads(file.read_text())
    if found["model_type"] == "internvl_chat":  # transformers does not know it: its own code comes with the folder
        from megatron_ext.models import internvl3

        return internvl3.config_from_chat(found)
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


def published_name(folder: str | Path) -> Callable[[str], str]:
    """From a tensor's name in this checkpoint to its name in the weight map.

    A family whose checkpoints come with two kinds of names has ``RENAMED``: prefix → prefix in the published ones.
    """
    prefixes: dict[str, str] = getattr(family(config(folder).architectures[0]), "RENAMED", {})
    return lambda name: next(
        (new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old)), name
    )


def load(shards: list[Shard], folder: str | Path) -> None:
    """Fill the local shards in place (cast to their dtype; uncovered elements become zero).

    A scalar head that a language model's folder is loaded into begins at zero (our choice): all its values are 0 then.
    Raises KeyError naming a tensor that the checkpoint lacks and ValueError on a rectangle outside its shape.
    """
    found = headers(folder)
    published = published_name(folder)
    new = () if scalar_head.has_scalar_head(config(folder)) else (scalar_head.TENSOR,)
    where = {published(name): (file, name) for file, header in found.items() for name in header}
    by_file: dict[Path, list[tuple[Any, str, torch.Tensor]]] = defaultdict(list)
    with torch.no_grad():
        for shard in shards:
            shard.tensor.zero_()
            for block in shard.blocks:
                if block.hf_name in new:
                    continue
                if block.hf_name not in where:
                    raise KeyError(f"{folder}: tensor {block.hf_name!r} is missing (needed by {shard.name})")
                file, stored = where[block.hf_name]
                by_file[file].append((block, stored, shard.tensor))
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as tensors:
                for block, stored, tensor in wanted:
                    source = tensors.get_slice(stored)
                    if any(
                        a + n > full for a, n, full in zip(block.hf_start, block.shape, source.get_shape(), strict=True)
                    ):
                        raise ValueError(f"{block.hf_name}: {block} lies outside the checkpoint's {source.get_shape()}")
                    piece = source[region(block.hf_start, block.shape)]
                    tensor[region(block.local_start, block.shape)].copy_(piece)


def export(shards: list[Shard], source: str | Path, target: str | Path, writes: bool, scalar: bool = False) -> None:
    """Collective: write ``target`` with the names, files and side files of ``source``, the shards' weights and dtype.

    ``scalar``: the shards are a model's with a scalar head, which ``source`` may be too, or a language model.
    Every rank with ``writes`` (one data-parallel replica) writes its own rectangles into files on a shared file system;
    no full tensor is gathered anywhere. The folder appears under its name only when it is complete.
    """
    source, target = Path(source), Path(target)
    partial = target.with_name(target.name + ".partial")
    stored = headers(source)
    if scalar:
        stored = scalar_head.with_score_tensor(stored, config(source).get_text_config().hidden_size)
    layout = {file: _with_dtype(header, shards[0].tensor.dtype) for file, header in stored.items()}
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, partial / file.name)
        _set_config_dtype(partial / "config.json", shards[0].tensor.dtype)
        if scalar:
            scalar_head.describe(partial, layout)
        for file, header in layout.items():
            _create(partial / file.name, header)
    _barrier()
    if writes:
        blocks: dict[str, list[tuple[Any, torch.Tensor]]] = defaultdict(list)
        for shard in shards:
            for block in shard.blocks:
                blocks[block.hf_name].append((block, shard.tensor))
        published = published_name(source)
        for file, header in layout.items():
            _fill(partial / file.name, header, {name: blocks.get(published(name), []) for name in header})
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
    config.pop("torch_dtype", None)  # the field's older name
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
