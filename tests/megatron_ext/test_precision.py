"""What a precision sets in Megatron-Core's configurations; that FP8 trains is for a GPU to show."""

from typing import Any

import pytest

from megatron_ext import platform

platform.activate("cpu")

import torch  # noqa: E402
from megatron.core.enums import Fp8Recipe  # noqa: E402
from transformers import LlamaConfig  # noqa: E402

from megatron_ext import model  # noqa: E402
from megatron_ext.models import llama  # noqa: E402
from megatron_ext.platform.features import processor_precision  # noqa: E402
from megatron_ext.precision import PrecisionConfig, check  # noqa: E402
from megatron_ext.weight_map import sharding_of  # noqa: E402
from tests.settings import parallel_config, precision_config  # noqa: E402

TINY = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=8, num_attention_heads=2)


def transformer_config(precision: PrecisionConfig) -> Any:
    check(precision)
    return model.language_config(llama, TINY, sharding_of(TINY, 1, 0), parallel_config(), precision, stage=0)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (
            precision_config("fp8", recipe="delayed", format="hybrid"),
            {
                "fp8": "hybrid", "fp8_recipe": Fp8Recipe.delayed, "first_last_layers_bf16": False,
                "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max",
            },
        ),
        (
            precision_config("fp8", recipe="current", format="hybrid", bf16_layers=2),
            {
                "fp8": "hybrid", "fp8_recipe": Fp8Recipe.tensorwise, "first_last_layers_bf16": True,
                "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2,
            },
        ),
        (
            precision_config("fp8", recipe="blockwise", format="e4m3"),
            {"fp8": "e4m3", "fp8_recipe": Fp8Recipe.blockwise, "first_last_layers_bf16": False},
        ),
        (precision_config("bf16"), {"fp8": None}),
        (precision_config("fp32"), {"fp8": None}),
    ],
    ids=lambda value: f"{value.name}-{value.recipe}" if isinstance(value, PrecisionConfig) else "",
)  # fmt: skip
def test_every_field_reaches_megatron_core(precision: PrecisionConfig, expected: dict[str, Any]) -> None:
    config = transformer_config(precision)
    assert {name: getattr(config, name) for name in expected} == expected
    dtype = torch.float32 if precision.name == "fp32" else torch.bfloat16
    assert (config.params_dtype, config.pipeline_dtype, config.bf16) == (dtype, dtype, dtype is torch.bfloat16)
    # Weights stay in BF16: Hugging Face's blocks can't be written into FP8 tensors, and engines can't read them there.
    assert not config.fp8_param


@pytest.mark.parametrize(
    ("precision", "multiple"),
    [
        (precision_config("bf16"), 1),
        (precision_config("fp32"), 1),
        (precision_config("fp8", recipe="delayed", format="hybrid"), 16),
        (precision_config("fp8", recipe="current", format="hybrid"), 16),
        (precision_config("fp8", recipe="blockwise", format="e4m3"), 128),
    ],
)
def test_the_tokens_of_a_rank_fill_blocks(precision: PrecisionConfig, multiple: int) -> None:
    assert precision.token_multiple == multiple


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        (precision_config("fp8"), "precision.recipe=None: fp8 needs one: use one of delayed, current, blockwise"),
        (precision_config("fp8", recipe="current"), "precision.format=None: fp8 needs one: use hybrid or e4m3"),
        (
            precision_config("fp8", recipe="delayed", format="e4m3", bf16_layers=1),
            "precision.bf16_layers=1: Megatron-Core can't mix",
        ),
    ],
)
def test_impossible_precisions_are_refused(precision: PrecisionConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(precision)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse4_2 avx avx2 fma", "fp32"),
        ("flags\t\t: avx2 avx512f avx512bw avx512_vnni", "fp32"),
        ("flags\t\t: avx2 avx512f avx512_bf16", "bf16"),
        ("flags\t\t: amx_bf16 amx_tile", "bf16"),
        ("Features\t: fp asimd bf16 i8mm", "bf16"),
        ("model name\t: bf16", "fp32"),
    ],
)
def test_native_precision_is_bf16_where_the_processor_has_its_instructions(flags: str, expected: str) -> None:
    assert processor_precision(f"processor\t: 0\n{flags}\n\nprocessor\t: 1\n{flags}\n") == expected
