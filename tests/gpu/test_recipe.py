"""The demo recipe on one GPU: the CPU run's command with another ``cluster`` and ``parallel``."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM

from megatron_ext.platform import cuda

ROOT = Path(__file__).resolve().parents[2]
STEPS = 2
RECIPE = ["recipe=demo", "cluster=slurm_h100", "cluster.ranks=1", "parallel=tp1"]
RECIPE += [f"algorithm.steps={STEPS}", "stage.sft.steps=2"]
PARAMETERS = 134_515_008


@pytest.fixture(scope="module")
def run_dir(gpu: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    command = [sys.executable, "-m", "recipes.train", *RECIPE, f"run_dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    return folder


def test_the_run_measures_what_the_cpu_run_measures(
    run_dir: Path, record_property: Callable[[str, object], None]
) -> None:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    record_property("seconds_of_the_last_step", {key: rows[-1][key] for key in rows[-1] if key.startswith("time/")})
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["kl/reference"] == 0, "before the first update the policy is the reference"
    assert rows[1]["kl/reference"] > 0
    for row in rows:
        assert 0 < row["train_inference_mismatch/mean"] < 0.05 and row["grad_norm"] > 0
        # In BF16.
        assert row["sync/bytes"] == 2 * PARAMETERS
    assert is_one_process_here(json.loads((run_dir / "environment.json").read_text())["machine"])


def is_one_process_here(machine: dict[str, Any]) -> bool:
    """Whether environment.json describes a run of one process on this node, however many GPUs the node has."""
    return machine["processes"] == 1 and machine["device"] == cuda.machine()


def test_the_trained_model_loads_in_transformers(run_dir: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(run_dir / "hf")
    assert sum(parameter.numel() for parameter in network.parameters()) == PARAMETERS


def test_no_process_of_the_run_is_left(run_dir: Path) -> None:
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]
    assert left == []
