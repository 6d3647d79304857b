"""Hugging Face → Megatron's shards → Hugging Face: same names, files and bits, each rank reading only what it owns."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_ext import hf_checkpoint, scalar_head
from megatron_ext.blocks import Block, Shard, region
from tests.megatron_ext import cases
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import Ranks

Results = Callable[[str], list[dict[str, Any]]]
every_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)


def tensors_by_file(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def whole(name: str, tensor: torch.Tensor) -> Shard:
    zero = (0,) * tensor.dim()
    return Shard(name, tensor, (Block(name, zero, zero, tuple(tensor.shape)),))


@every_case
def test_round_trip_keeps_names_files_and_bits(case: Case, launched: Ranks) -> None:
    source = launched.folder / case.twin
    target = launched.after(case.name) / "exports" / case.name
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
def test_an_export_loads_in_transformers_like_its_source(name: str, launched: Ranks) -> None:
    case = cases.by_name(name)
    exported, loading = AutoModelForCausalLM.from_pretrained(
        launched.after(name) / "exports" / name, dtype="auto", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    source = AutoModelForCausalLM.from_pretrained(launched.folder / case.twin, dtype=dtype)
    tokens = torch.tensor([cases.batch(case)[0].prompt])
    assert exported.dtype == dtype
    assert torch.equal(exported(tokens).logits, source(tokens).logits)


def test_the_sharded_twin_has_several_files(twins: Path) -> None:
    assert len(list((twins / "sharded").glob("*.safetensors"))) > 2
    assert (twins / "sharded" / "model.safetensors.index.json").is_file()


@every_case
def test_a_rank_reads_only_its_rectangles(case: Case, results: Results, launched: Ranks) -> None:
    stored = sum(
        t.numel() for tensors in tensors_by_file(launched.folder / case.twin).values() for t in tensors.values()
    )
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


@pytest.mark.parametrize(
    ("whole_shape", "start", "shape"),
    [
        ((7,), (2,), (3,)),
        ((4, 6), (0, 0), (4, 6)),
        ((4, 6), (1, 0), (2, 6)),
        ((4, 6), (1, 2), (3, 4)),
        ((3, 4, 5), (1, 0, 0), (2, 4, 5)),
        ((3, 4, 5), (0, 1, 0), (3, 2, 5)),
        ((3, 4, 5), (1, 1, 3), (2, 2, 2)),
        ((2, 3, 2, 2, 3), (0, 1, 0, 0, 0), (2, 2, 2, 2, 3)),
    ],
)
def test_the_elements_that_an_export_writes_are_the_rectangles_alone(
    whole_shape: tuple[int, ...], start: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """In order and in as few runs as there can be: another node may write what lies between them."""
    numbered = torch.arange(math.prod(whole_shape)).view(whole_shape)
    inside = numbered[region(start, shape)].flatten()
    runs = list(hf_checkpoint._runs(start, shape, whole_shape))
    assert [element for first, count in runs for element in range(first, first + count)] == inside.tolist()
    assert len(runs) == 1 + int((inside.diff() != 1).sum()) or shape == whole_shape


def test_an_export_of_a_scalar_head_gives_the_same_scores(launched: Ranks) -> None:
    sequence = cases.batch(cases.by_name("scalar-one"))[0]
    tokens = torch.tensor([sequence.prompt + sequence.response])
    for name, labels in (("scalar-tp2-sp-pp2", 1), ("scalar-qwen2-tp2-sp-dp2", 3)):
        exported, loading = AutoModelForSequenceClassification.from_pretrained(
            launched.after(name) / "exports" / name, output_loading_info=True
        )
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
        source = AutoModelForSequenceClassification.from_pretrained(launched.folder / cases.by_name(name).twin)
        scores = exported(tokens).logits
        assert scores.shape == (1, labels) and scores.all()
        assert torch.equal(scores, source(tokens).logits)


VALUES = scalar_head.value_head(["safety", "honesty", "knowledge"])


@pytest.mark.parametrize(
    ("twin", "files", "outputs"),
    [("tied", 1, scalar_head.REWARD), ("untied", 1, VALUES), ("sharded", 3, scalar_head.REWARD)],
)
def test_a_language_model_becomes_one_with_a_scalar_head(
    twin: str, files: int, outputs: scalar_head.Head, twins: Path, tmp_path: Path
) -> None:
    """The head is loaded as zeros; an export has it, and no output layer, and transformers loads it as it is said to
    be."""
    labels = len(outputs.labels)
    head = whole("score.weight", torch.full((labels, 192), float("nan")))
    hf_checkpoint.load([head], twins / twin)
    assert torch.equal(head.tensor, torch.zeros(labels, 192))
    head.tensor.normal_(generator=torch.Generator().manual_seed(1))
    stored = {n: t for part in tensors_by_file(twins / twin).values() for n, t in part.items() if n != "lm_head.weight"}
    shards = [*(whole(name, tensor) for name, tensor in stored.items()), head]
    hf_checkpoint.export(shards, twins / twin, tmp_path / "value", writes=True, head=outputs)
    exported = tensors_by_file(tmp_path / "value")
    assert len(exported) >= files
    assert {name for tensors in exported.values() for name in tensors} == {*stored, "score.weight"}
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "value", output_loading_info=True, attn_implementation="eager"
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert model.config.architectures == ["LlamaForSequenceClassification"]
    assert model.config.id2label == dict(enumerate(outputs.labels))
    assert scalar_head.head_of(model.config) == outputs
    language = AutoModelForCausalLM.from_pretrained(twins / twin, attn_implementation="eager")
    tokens = torch.tensor([[5, 7, 11]])
    expected = head.tensor @ language.model(tokens).last_hidden_state[0, -1]
    assert torch.allclose(model(tokens).logits[0], expected, atol=1e-5)
    again = whole("score.weight", torch.zeros(labels, 192))
    hf_checkpoint.load([again], tmp_path / "value")
    assert torch.equal(again.tensor, head.tensor)


def test_a_folder_that_says_it_has_a_scalar_head_must_have_it(twins: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((twins / "scalar" / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((twins / "tied" / "model.safetensors").read_bytes())
    with pytest.raises(KeyError, match=r"tensor 'score\.weight' is missing"):
        hf_checkpoint.load([whole("score.weight", torch.zeros(1, 192))], tmp_path)


def test_a_head_with_other_outputs_is_refused(twins: Path) -> None:
    language = hf_checkpoint.config(twins / "tied")
    values = scalar_head.scalar_config(language, VALUES)
    assert scalar_head.head_of(scalar_head.scalar_config(values, VALUES)) == VALUES
    swapped = scalar_head.value_head(["safety", "knowledge", "honesty"])
    for other in (swapped, scalar_head.REWARD):
        with pytest.raises(ValueError, match="with the outputs safety, honesty, knowledge, not "):
            scalar_head.scalar_config(values, other)


def test_an_architecture_without_a_scalar_form_is_named() -> None:
    assert scalar_head.architecture("Qwen3ForCausalLM") == "Qwen3ForSequenceClassification"
    assert scalar_head.architecture("LlamaForSequenceClassification") == "LlamaForSequenceClassification"
    with pytest.raises(ValueError, match="a 'InternVLChatModel' has no form with a scalar head"):
        scalar_head.architecture("InternVLChatModel")
