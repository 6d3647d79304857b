"""The GPU checks on a fake GPU, in an environment where Transformer Engine is installed: their own logic."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_ext.platform import cuda
from tests.gpu.conftest import TINY
from tests.gpu.test_recipe import is_one_process_here
from tests.megatron_ext.ranks import ROOT
from tests.te import gpu_suite

# Numbers that only a GPU has: the assertion with which a check may fail on a fake one.
NUMBERS = {
    "test_the_peak_of_memory_is_the_estimate": "assert 0.9 * estimate < step_peak < (1 + margin) * estimate",
    "test_a_block_of_the_72b_model_keeps_the_gpu_busy": "assert mfu >= max(FIRST_MFU, SPEED.mfu)",
    "test_fp8_learns_as_bf16_does": "assert bf16_losses[-1] < 0.5 * bf16_losses[0]",
    "test_an_engines_step_of_80_narrow_layers": 'assert 0 < graph_gib < TABLE["graph_gib"]',
    "test_log_probs_of_samples_are_the_trainers": "assert gap.mean() < 0.08 and gap.max() < 0.5",
    "test_samples_are_those_of_rounded_queries_keys_and_values": "assert to_rounded.mean() < to_unrounded.mean()",
}


@pytest.fixture(scope="module")
def outcomes(found_by: Callable[..., dict[str, Any]]) -> dict[str, list[str]]:
    """Check → passed, failed or skipped, and its error."""
    return found_by("tests.te.gpu_suite")


def test_the_gpu_checks_pass_but_for_numbers(outcomes: dict[str, list[str]]) -> None:
    """They run to their end, or to the first number that is the hardware's. What they start believes in the GPU too."""
    failed = {name: error for name, (outcome, error) in outcomes.items() if outcome != "passed"}
    for check, assertion in NUMBERS.items():
        failed = {name: error for name, error in failed.items() if check not in name or assertion not in error}
    assert failed == {}


def test_every_gpu_check_runs(outcomes: dict[str, list[str]]) -> None:
    """Of ``test_fp8_rollout`` with one of three kinds of scales: a CPU has no kernel for the others."""
    functions = set()
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        if file.name in gpu_suite.ELSEWHERE:
            continue
        functions |= {f"{file.name}::{name}" for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    assert {name.partition("[")[0] for name in outcomes} == functions


@pytest.mark.parametrize("gpus", [1, 8])
def test_a_run_of_one_process_is_recognised_on_a_node_of_any_size(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert is_one_process_here({"processes": 1, "device": cuda.machine()})
    assert not is_one_process_here({"processes": 2, "device": cuda.machine()})
    assert not is_one_process_here({"processes": 1, "device": "2 cores, some processor"})


def test_the_checks_model_has_sizes_that_fp8_blocks_divide() -> None:
    """vLLM refuses others (validate_fp8_block_shape), DeepGEMM has no kernel for them."""
    config = TINY.config()
    key_size = config.num_key_value_heads * config.head_dim
    sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim, key_size)
    assert [size for size in sizes if size % 128] == []
