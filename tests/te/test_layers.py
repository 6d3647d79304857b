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
    found = examined["fp8"][name]
    recipe, quantizer = {
        "delayed": ("TEDelayedScaling", "Float8Quantizer"),
        "current": ("Float8CurrentScaling", "Float8CurrentScalingQuantizer"),
        "blockwise": ("Float8BlockScaling", "Float8BlockQuantizer"),
    }[name]
    settings = FP8[name]
    layers = found["layers"]
    ends = settings.get("bf16_layers", 0)
    for number, (enabled, recipe_found, format_found, quantizers) in enumerate(layers):
        in_bf16 = number < ends or number >= len(layers) - ends
        assert enabled != in_bf16
        if enabled:
            assert (recipe_found, format_found, quantizers) == (recipe, settings["format"].upper(), [quantizer])
    # Weights stay in BF16.
    assert found["parameters"] == ["Parameter"]


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
