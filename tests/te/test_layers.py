"""Transformer Engine's layers on "meta": names, shapes, sharded states, sizes, FP8 recipes of the platform ``cuda``."""

from typing import Any

import pytest

from megatron_ext.platform import capabilities
from tests.settings import precision_config
from tests.te.examine_cases import FP8, PUBLISHED, TEXT_TWINS, VISION_TWINS


@pytest.mark.parametrize("twin", TEXT_TWINS)
def test_a_text_familys_ranks_hold_what_the_cpu_platforms_hold(twin: str, examined: dict[str, Any]) -> None:
    """Blocks of the checkpoint, shapes, marks of parameters, keys and places in a checkpoint, estimates of memory; on
    one rank, and under all axes of parallelism."""
    assert examined["text"][twin] == []


@pytest.mark.parametrize("twin", VISION_TWINS)
def test_a_vision_familys_ranks_hold_what_the_cpu_platforms_hold(twin: str, examined: dict[str, Any]) -> None:
    assert examined["vision"][twin] == []


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_models_ranks_hold_what_the_cpu_platforms_hold(name: str, examined: dict[str, Any]) -> None:
    """That these together hold each element once is in test_preflight."""
    assert examined["published"]["differences"][name] == []


def test_every_tensor_of_a_published_checkpoint_is_covered(examined: dict[str, Any]) -> None:
    whole = {"expected": 729, "covered": 729, "missing": [], "unexpected": [], "duplicated": []}
    assert examined["published"]["coverage"] == {"Qwen2.5-VL-7B-Instruct": whole}


def test_frozen_names_mean_the_same_on_both_platforms(examined: dict[str, Any]) -> None:
    """Where a norm is part of the layer after it, its name freezes it, and the layer's name does not."""
    assert examined["frozen"] == []


@pytest.mark.parametrize("name", FP8)
def test_fp8_settings_give_their_recipe_in_every_layer(name: str, examined: dict[str, Any]) -> None:
    result = examined["fp8"][name]
    recipe, quantizer = {
        "delayed": ("TEDelayedScaling", "Float8Quantizer"),
        "current": ("Float8CurrentScaling", "Float8CurrentScalingQuantizer"),
        "blockwise": ("Float8BlockScaling", "Float8BlockQuantizer"),
    }[name]
    settings = FP8[name]
    layers = result["layers"]
    ends = settings.get("bf16_layers", 0)
    for number, (enabled, recipe_found, format_found, quantizers) in enumerate(layers):
        in_bf16 = number < ends or number >= len(layers) - ends
        assert enabled != in_bf16
        if enabled:
            assert (recipe_found, format_found, quantizers) == (recipe, settings["format"].upper(), [quantizer])
    # Weights stay in BF16.
    assert result["parameters"] == ["Parameter"]


def test_settings_of_speed_are_on_in_every_matrix_of_the_decoder(examined: dict[str, Any]) -> None:
    """Gradients are fused; what a matrix gathers or sums overlaps with a product of its own, in a buffer of a pack's
    hidden states. Megatron-Core's output layer has neither."""
    speed = examined["speed"]
    before_attention = {"on": ["fuse_wgrad_accumulation", "ub_overlap_ag_fprop", "ub_bulk_dgrad", "ub_bulk_wgrad"]}
    after_it = {"on": ["fuse_wgrad_accumulation", "ub_overlap_rs_fprop", "ub_overlap_ag_dgrad"]}
    of_layer = {
        "self_attention.linear_qkv": {"buffer": "qkv", **before_attention},
        "self_attention.linear_proj": {"buffer": "proj", **after_it},
        "mlp.linear_fc1": {"buffer": "fc1", **before_attention},
        "mlp.linear_fc2": {"buffer": "fc2", **after_it},
    }
    expected = {f"decoder.layers.{n}.{name}": state for n in range(4) for name, state in of_layer.items()}
    assert speed["matrices"] == expected
    assert not speed["output layer fuses"]
    products = ("fprop", "dgrad", "wgrad")
    names = {f"{name}_{product}" for name in ("qkv", "proj", "fc1", "fc2") for product in products}
    assert speed["buffers"] == {name: [96, 256] for name in names}
    assert speed["given up"], "the next ranks' packs may have another length"
    assert "(96, 256), this model needs (96, 512)" in speed["other hidden size"]


def test_the_buffers_bytes_are_the_estimate(examined: dict[str, Any]) -> None:
    speed = examined["speed"]
    assert speed["estimate"] == speed["bytes"] == 12 * 96 * 256 * 2
    # One of each shape of a layer's matrices: query, key and value; output, and gate with up; down.
    matrices = {tuple(shape) for shape in speed["layer"] if len(shape) == 2}
    assert matrices == {(512, 256), (256, 256), (256, 128)}
    assert speed["estimate of fused gradients"] == 2 * sum(rows * columns for rows, columns in matrices)


def test_block_scaling_gathers_fp8_where_ranks_have_whole_blocks(examined: dict[str, Any]) -> None:
    """Of other numbers of tokens Transformer Engine gathers BF16, with a warning."""
    gathers = {int(tokens): possible for tokens, possible in examined["gathers"].items()}
    assert gathers == {16: False, 144: False, 128: True, 2048: True}
    multiple = precision_config("fp8", recipe="blockwise", format="e4m3").token_multiple
    assert examined["fp8"]["blockwise"]["multiple"] == multiple == 128


def test_what_a_gpu_has_no_attention_for_is_refused(examined: dict[str, Any]) -> None:
    """test_config tests the refusal."""
    assert examined["attention"] == {
        "torch.bfloat16 False": True, "torch.bfloat16 True": True, "torch.float32 False": True,
        "torch.float32 True": capabilities("cuda").has_fp32_context_parallel,
    }  # fmt: skip


def test_fp8_tensors_have_an_empty_storage(examined: dict[str, Any]) -> None:
    """So engines could not read them. ``share_tensors`` refuses them, and no setting makes parameters of them."""
    assert examined["fp8 storage"] == 0
