"""Hugging Face → Megatron's shards → Hugging Face: same names, files and bits, each rank reading only what it owns."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_ext import hf_checkpoint
from megatron_ext.blocks import Block, Shard
from tests.megatron_ext import cases
from tests.megatron_ext.cases import Case

Results = Callable[[str], list[dict[str, Any]]]
every_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


def tensors_by_file(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def whole(name: str, tensor: torch.Tensor) -> Shard:
    zero = (0,) * tensor.dim()
    return Shard(name, tensor, (Block(name, zero, zero, tuple(tensor.shape)),))


@every_case
def test_round_trip_keeps_names_files_and_bits(case: Case, launched: Path) -> None:
    source, target = launched / case.twin, launched / "exports" / case.name
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in source.iterdir())
    before, after = tensors_by_file(source), tensors_by_file(target)
    assert {file: list(tensors) for file, tensors in after.items()} == {f: list(t) for f, t in before.items()}
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    differ = [
        name
        for file, tensors in before.items()
        for name, tensor in tensors.items()
        if not torch.equal(after[file][name], tensor.to(dtype)) or after[file][name].dtype != dtype
    ]
    assert differ == []
    assert json.loads((target / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("name", ["tp2-sp-pp2", "sharded-tp2-dp2", "bf16-tp2-sp"])
def test_an_export_loads_in_transformers_like_its_source(name: str, launched: Path) -> None:
    case = cases.by_name(name)
    exported, loading = AutoModelForCausalLM.from_pretrained(
        launched / "exports" / name, dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    source = AutoModelForCausalLM.from_pretrained(launched / case.twin, dtype=dtype)
    tokens = torch.tensor([cases.batch(case)[0].prompt])
    assert exported.dtype == dtype
    assert torch.equal(exported(tokens).logits, source(tokens).logits)


def test_the_sharded_twin_has_several_files(twins: Path) -> None:
    assert len(list((twins / "sharded").glob("*.safetensors"))) > 2
    assert (twins / "sharded" / "model.safetensors.index.json").is_file()


@every_case
def test_a_rank_reads_only_its_rectangles(case: Case, results: Results, launched: Path) -> None:
    stored = sum(t.numel() for tensors in tensors_by_file(launched / case.twin).values() for t in tensors.values())
    for rank in results(case.name):
        owned = sum(math.prod(extent) for _, _, blocks in rank["blocks"] for _, _, _, extent in blocks)
        assert rank["numbers_read"] == owned
        # Padded attention, unequal vocabulary parts and tied stages keep it from the exact share.
        stages = case.pipeline if case.first_stage_layers is None else 1
        assert owned <= 1.5 * stored / (case.tensor * stages)


def test_uncovered_elements_become_zero(twins: Path) -> None:
    name = "model.norm.weight"
    shard = Shard(name, torch.full((200,), float("nan")), (Block(name, (10,), (5,), (100,)),))
    hf_checkpoint.load([shard], twins / "tied")
    stored = load_file(twins / "tied" / "model.safetensors")[name]
    assert torch.equal(shard.tensor, torch.cat([torch.zeros(5), stored[10:110], torch.zeros(95)]))


def test_a_missing_tensor_is_named(twins: Path) -> None:
    with pytest.raises(KeyError, match=r"tensor 'lm_head\.weight' is missing"):
        hf_checkpoint.load([whole("lm_head.weight", torch.empty(130, 192))], twins / "tied")


def test_a_rectangle_outside_the_tensor_is_refused(twins: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.norm\.weight: .* lies outside the checkpoint's \[192\]"):
        hf_checkpoint.load([whole("model.norm.weight", torch.empty(193))], twins / "tied")


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        hf_checkpoint.config(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors file"):
        hf_checkpoint.load([], tmp_path)


def test_export_replaces_an_older_export_and_leaves_folders_out(twins: Path, tmp_path: Path) -> None:
    """In one process without torch.distributed; a source may hold folders, such as Llama's ``original``."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for file in (twins / "tied").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "original").mkdir()
    target.mkdir()
    (target / "stale.safetensors").touch()
    stored = load_file(source / "model.safetensors")
    hf_checkpoint.export([whole(name, t + 1) for name, t in stored.items()], source, target, writes=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]
    assert sorted(p.name for p in target.iterdir()) == sorted(p.name for p in source.iterdir() if p.is_file())
    assert all(torch.equal(t, stored[name] + 1) for name, t in load_file(target / "model.safetensors").items())
