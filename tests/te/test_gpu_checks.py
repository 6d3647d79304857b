"""The trainer's GPU checks on a fake GPU, in an environment where Transformer Engine is installed: their own logic."""

import os
import re
import subprocess
import sys

import pytest
import torch

from megatron_ext.platform import cuda
from tests.gpu.conftest import TINY
from tests.gpu.test_recipe import is_one_process_here
from tests.megatron_ext.ranks import ROOT
from tests.te import packages

CHECKS = "tests/gpu/test_trainer.py"
NCCL = "test_the_process_group_is_nccl_and_its_sums_are_exact"  # gloo is in its place


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """Check → passed, failed or error. The checks start processes on the CPU platform, which must not take Transformer
    Engine's kernels."""
    options = ("-q", "-rA", "--tb=short", "-p", "no:cacheprovider", f"--deselect={CHECKS}::{NCCL}")
    command = [sys.executable, "-m", "tests.te.on_fake_gpu", "pytest", *options, CHECKS]
    paths = {"PYTHONPATH": f"{ROOT}:{packages.site()}", "NVTE_PROJECT_BUILDING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **paths, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout[-8000:], done.stderr[-2000:])
    return {name: outcome for outcome, name in re.findall(rf"^([A-Z]+) {CHECKS}::(.+?)(?: - .*)?$", done.stdout, re.M)}


def test_the_trainers_checks_pass_where_kernels_are_exact(outcomes: dict[str, str]) -> None:
    names = re.findall(r"^def (test_\w+)", (ROOT / CHECKS).read_text(), re.M)
    assert {name.partition("[")[0] for name in outcomes} == set(names) - {NCCL}
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "PASSED"} == {}


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
