"""InternVL3's own: both layouts of the hub, padded heads, limits. Parity in every layout: ``test_qwen2_5_vl.py``."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from megatron_ext import hf_checkpoint
from megatron_ext.models import internvl3
from tests.megatron_ext import internvl_twins, vl_twins
from tests.megatron_ext.ranks import Ranks
from tests.megatron_ext.vl_twins import Results, Run

INTERNVL = [run for run in vl_twins.RUNS if run.is_internvl]


@pytest.fixture(scope="module")
def folder(vision_launched: Ranks) -> Path:
    return vision_launched.folder


@pytest.fixture(scope="module")
def results(vision_launched: Ranks) -> Results:
    return vision_launched.results


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


@pytest.mark.parametrize("run", INTERNVL, ids=lambda run: run.name)
def test_padded_heads_and_vocabulary(run: Run, results: Results) -> None:
    """Five heads become six on two ranks, 131 tokens 132. That padding stays zero: ``test_qwen2_5_vl.py``."""
    large = run.twin.startswith("6b")
    expected = {"language.embedding.word_embeddings.weight", "language.output_layer.weight"} if large else set()
    for layer in range(3):
        attention = f"vision.encoder.layers.{layer}.self_attention."
        expected |= {f"{attention}linear_qkv.weight", f"{attention}linear_proj.weight"}
        names = ("q_layernorm.weight", "k_layernorm.weight") if large else ("linear_qkv.bias",)
        expected |= {attention + name for name in names}
    padded = {re.sub(r"^\d\.", "", name) for rank in results(run.name) for name in rank["padded"]}
    assert padded == (expected if run.tensor == 2 else set())


@pytest.mark.parametrize("name", ["6b-{}-one", "6b-{}-tp2-sp", "300m-{}-one", "300m-{}-tp2-sp"])
def test_both_layouts_load_the_same_parameters(name: str, results: Results) -> None:
    for chat, hf in zip(*(results(name.format(source)) for source in ("chat", "hf")), strict=True):
        assert chat["loaded"].keys() == hf["loaded"].keys()
        assert all(torch.equal(chat["loaded"][name], hf["loaded"][name]) for name in hf["loaded"])


@pytest.mark.parametrize("name", ["6b-hf-tp2", "6b-hf-tp2-sp-pp2", "300m-hf-tp2-sp"])
def test_a_checkpoint_joins_the_tower(name: str, results: Results) -> None:
    """Megatron-Core's checkpoint knows which of the tower's parameters are cut; it stacks the three layers."""
    of_ranks = [rank["whole_shapes"] for rank in results(name) if "whole_shapes" in rank]
    assert len(of_ranks) == 2
    for shapes in of_ranks:
        layer = "vision.encoder.layers.2."
        assert shapes[f"{layer}self_attention.linear_qkv.weight"] == [3, 3 * 6 * 16, 80]
        assert shapes[f"{layer}mlp.linear_fc1.weight"] == [3, 96, 80]
        assert shapes[f"{layer}self_attn_bda.scale"] == [3, 80]
        assert shapes["vision.projector.linear_1.weight"] == [64, 320]
        if name.startswith("6b"):
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
        internvl3.param_mappings(config, 64, 0)
