"""InternVL3 against transformers, from both layouts of the hub, on one rank and on two: tower, log-probs, gradients."""

import json
import os
import unittest.mock
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_ext import hf_checkpoint
from megatron_ext.models import internvl3
from tests.megatron_ext import internvl_twins
from tests.megatron_ext.internvl_twins import RUNS, Reference, Run
from tests.megatron_ext.reference import all_pieces, assemble

Results = Callable[[Run], list[dict[str, Any]]]
References = Callable[[Run], Reference]
every_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("internvl3")
    internvl_twins.make_twins(made)
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """What each rank of a run found, by rank: two processes go through all of ``RUNS``."""
    with unittest.mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1"}):
        torch.multiprocessing.spawn(internvl_twins.compute, (str(folder),), nprocs=2)

    @cache
    def load(run: Run) -> list[dict[str, Any]]:
        found = [torch.load(file, weights_only=True) for file in sorted(folder.glob(f"{run.name}.?.pt"))]
        assert len(found) == run.layout.model_parallel
        return found

    return load


@pytest.fixture(scope="module")
def reference(folder: Path) -> References:
    compute = cache(lambda twin: internvl_twins.reference(folder / f"{twin}-hf"))
    return lambda run: compute(run.twin)


def test_transformers_saves_the_names_of_the_hub(folder: Path) -> None:
    """The names that the ``-hf`` repositories have, in full for one layer of each kind."""
    kinds = {
        "language_model.": "lm_head.weight model.embed_tokens.weight model.norm.weight",
        "language_model.model.layers.1.": "input_layernorm.weight post_attention_layernorm.weight mlp.down_proj.weight "
        "mlp.gate_proj.weight mlp.up_proj.weight self_attn.o_proj.weight self_attn.q_proj.weight self_attn.q_proj.bias "
        "self_attn.k_proj.weight self_attn.k_proj.bias self_attn.v_proj.weight self_attn.v_proj.bias",
        "multi_modal_projector.": "layer_norm.weight layer_norm.bias linear_1.weight linear_1.bias linear_2.weight "
        "linear_2.bias",
        "vision_tower.embeddings.": "cls_token position_embeddings patch_embeddings.projection.weight "
        "patch_embeddings.projection.bias",
        "vision_tower.encoder.layer.1.": "lambda_1 lambda_2 layernorm_before.weight layernorm_after.weight "
        "attention.q_proj.weight attention.k_proj.weight attention.v_proj.weight attention.q_norm.weight "
        "attention.k_norm.weight attention.projection_layer.weight attention.projection_layer.bias mlp.fc1.weight "
        "mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias",
    }
    expected = {prefix + name for prefix, names in kinds.items() for name in names.split()}
    saved = load_file(folder / "6b-hf" / "model.safetensors")
    assert {name for name in saved if ".1." in name or "layer." not in name.replace("layers.", "layer.")} == expected


@every_run
def test_the_tower_equals_transformers(run: Run, results: Results, reference: References) -> None:
    """With its projector; on the first pipeline stage only."""
    expected = reference(run).rows
    towers = [rank["rows"] for rank in results(run) if "rows" in rank]
    assert len(towers) == (1 if run.layout.pipeline == 2 else len(results(run)))
    for rows in towers:
        assert rows.shape == expected.shape
        assert float((rows - expected).abs().max() / expected.abs().max()) < 2e-6


@every_run
def test_log_probs_equal_transformers(run: Run, results: Results, reference: References) -> None:
    """Packed, text with images; the pieces of context-parallel ranks together."""
    found: dict[int, dict[int, float]] = {}
    for rank in results(run):
        assert len(rank["images"]) > 1 and max(tiles or 0 for tiles in rank["images"]) > 1
        for index, places, values in rank["log_probs"]:
            found.setdefault(index, {}).update(zip(places.tolist(), values.tolist(), strict=True))
    assert sorted(found) == sorted(reference(run).log_probs)
    for index, expected in reference(run).log_probs.items():
        values = torch.tensor([found[index][place] for place in range(len(expected))])
        assert (values - expected).abs().max() < 1e-5


@every_run
def test_the_loss_equals_transformers(run: Run, results: Results, reference: References) -> None:
    for rank in results(run):
        assert rank["loss"] == pytest.approx(reference(run).loss, rel=1e-6)


@every_run
def test_every_gradient_equals_transformers(run: Run, results: Results, reference: References) -> None:
    """By tensor of the checkpoint; a frozen tower has none but its projector's."""
    expected = reference(run).gradients
    # Adding one vector to all keys leaves a softmax as it is: what is there is rounding. The query's shows the scale.
    key_biases = {name for name in expected if name.startswith("vision") and name.endswith("k_proj.bias")}
    scale = {name: expected[name.replace("k_proj", "q_proj")].norm() for name in key_biases}
    if run.source == "chat":
        expected = internvl_twins.chat_tensors(expected)
    if run.frozen:
        expected = {name: gradient for name, gradient in expected.items() if not name.startswith("vision_")}
    found = assemble(all_pieces(results(run), "gradients"), expected)
    errors = {n: float((found[n] - e).norm() / scale.get(n, e.norm())) for n, e in expected.items()}
    assert {name: error for name, error in errors.items() if not error < 1e-5} == {}


@every_run
def test_padded_heads_and_vocabulary_stay_zero(run: Run, results: Results) -> None:
    """Five heads become six on two ranks, 131 tokens 132; their gradients are zero, so training leaves them so."""
    padded = {"language.embedding.word_embeddings.weight", "language.output_layer.weight"}
    for layer in range(3):
        attention = f"vision.encoder.layers.{layer}.self_attention."
        padded |= {f"{attention}linear_qkv.weight", f"{attention}linear_proj.weight"}
        names = ("q_layernorm.weight", "k_layernorm.weight") if run.twin == "6b" else ("linear_qkv.bias",)
        padded |= {attention + name for name in names}
    for field in ("padding", "padding_gradients"):
        values = {name.removeprefix("0."): v for rank in results(run) for name, v in rank[field].items() if v.numel()}
        expected = padded if run.layout.tensor == 2 else set()
        if run.frozen and field == "padding_gradients":
            expected = {name for name in expected if not name.startswith("vision.encoder")}
        assert set(values) == expected
        assert not any(v.any() for v in values.values())


@pytest.mark.parametrize("run", [r for r in RUNS if r.source == "chat"], ids=lambda run: run.name)
def test_both_layouts_load_the_same_parameters(run: Run, results: Results) -> None:
    other = Run(run.twin, "hf", run.cut)
    for chat, hf in zip(results(run), results(other), strict=True):
        assert chat["weights"].keys() == hf["weights"].keys()
        assert all(torch.equal(chat["weights"][name], hf["weights"][name]) for name in hf["weights"])


@every_run
def test_an_export_is_the_checkpoint_bit_for_bit(run: Run, results: Results, folder: Path) -> None:
    results(run)
    source, export = folder / run.folder, folder / f"export-{run.name}"
    assert sorted(f.name for f in export.iterdir()) == sorted(f.name for f in source.iterdir())
    expected, found = load_file(source / "model.safetensors"), load_file(export / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("run", [r for r in RUNS if "tp2" in r.cut], ids=lambda run: run.name)
def test_a_checkpoint_joins_the_tower(run: Run, results: Results) -> None:
    """Megatron-Core's checkpoint knows which of the tower's parameters are cut; it stacks the three layers."""
    for rank in results(run):
        shapes = rank["whole_shapes"]
        layer = "vision.encoder.layers.2."
        assert shapes[f"{layer}self_attention.linear_qkv.weight"] == [3, 3 * 6 * 16, 80]
        assert shapes[f"{layer}mlp.linear_fc1.weight"] == [3, 96, 80]
        assert shapes[f"{layer}self_attn_bda.scale"] == [3, 80]
        assert shapes["vision.projector.linear_1.weight"] == [64, 320]
        if run.twin == "6b":
            assert shapes[f"{layer}self_attention.q_layernorm.weight"] == [3, 6 * 16]


@pytest.mark.parametrize("twin", internvl_twins.TWINS)
def test_the_chat_configuration_is_that_of_transformers(twin: str, folder: Path) -> None:
    chat, hf = (hf_checkpoint.config(folder / f"{twin}-{source}").to_dict() for source in ("chat", "hf"))
    assert chat.pop("architectures") == ["InternVLChatModel"]
    assert hf.pop("architectures") == ["InternVLForConditionalGeneration"]
    assert chat.pop("_name_or_path") == "" and hf.pop("_name_or_path") == str(folder / f"{twin}-hf")
    # The chat layout's config.json does not know the token: its own code asks the tokenizer.
    assert (chat.pop("image_token_id"), hf.pop("image_token_id")) == (151667, internvl_twins.IMAGE_TOKEN)
    chat["text_config"].pop("architectures"), hf["text_config"].pop("architectures", None)
    scaling = chat["text_config"]["rope_parameters"]
    assert scaling.pop("type", "dynamic") == "dynamic"
    assert chat == hf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ps_version", "v1"),
        ("force_image_size", 448),
        ("llm_config.architectures", ["InternLM2ForCausalLM"]),
        ("vision_config.layer_norm_eps", 1e-5),
    ],
)
def test_a_chat_configuration_of_another_model_is_refused(field: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "6b-chat" / "config.json").read_text())
    *inner, name = field.split(".")
    (config[inner[0]] if inner else config)[name] = value
    with pytest.raises(ValueError, match=rf"^{field}="):
        internvl3.config_from_chat(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_config.use_mean_pooling", False),
        ("vision_config.norm_type", "batch_norm"),
        ("vision_config.hidden_act", "gelu_pytorch_tanh"),
        ("vision_config.image_size", (56, 28)),
        ("downsample_ratio", 1.0),
        ("vision_feature_layer", -2),
    ],
)
def test_an_unsupported_model_is_refused(field: str, value: Any, folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "6b-hf")
    *inner, name = field.split(".")
    setattr(getattr(config, inner[0]) if inner else config, name, value)
    with pytest.raises(ValueError, match=rf"^{field}="):
        internvl3.text_config(config)


def test_a_tensor_parallel_size_that_does_not_divide_is_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder / "6b-hf")
    with pytest.raises(ValueError, match=r"parallel.tensor=64 does not divide .*vision_config.intermediate_size=96"):
        internvl3.parts(config, 64, 0)
