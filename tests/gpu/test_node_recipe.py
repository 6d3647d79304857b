"""Whole runs on the eight GPUs of one node: the layout of a 72B node, and several engines of several GPUs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.gpu import small_run
from tests.recipes import tiny

ROOT = Path(__file__).resolve().parents[2]
GPUS = 8
STEPS = 3
LAYOUTS = {
    "a 72B node: TP 8, one engine": ["parallel.tensor=8", "rollout.tensor=8"],
    "TP 2, PP 2, CP 2, four engines of two GPUs": [
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.context=2",
        "rollout.engines=4",
        "rollout.tensor=2",
    ],
}


@pytest.fixture(scope="module")
def folder(enough_gpus: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, its data and the run folders."""
    folder = tmp_path_factory.mktemp("node_recipe")
    tiny.make(folder, **small_run.MODEL)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_syncs_by_ipc_and_sleeps(
    layout: str, folder: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Engines read the weights of all ranks in place, and the checksums of every sync are compared. The export is a
    model for transformers."""
    run_dir = tmp_path / "run"
    arguments = small_run.overrides(folder, run_dir, STEPS, f"cluster.ranks={GPUS}", *LAYOUTS[layout])
    command = [sys.executable, "-m", "recipes.train", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:]
    metrics = small_run.rows(run_dir)
    record_property("seconds_of_the_last_step", small_run.seconds(metrics[-1]))
    small_run.assert_sound(metrics, STEPS)
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder / "model", run_dir / "hf"))
    assert before.config.hidden_size == after.config.hidden_size == small_run.MODEL["width"]
    changed = [name for name, old in before.named_parameters() if not old.equal(after.get_parameter(name))]
    assert len(changed) > 0
