"""Which checkpoint is exported and where to: refusals that name what is there, and nothing that is overwritten."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_ext.checkpoint import COMPLETE, CheckpointError
from recipes.errors import ConfigError
from recipes.run import exports
from tests.recipes import tiny

CONFIG = {"precision": {"name": "bf16"}, "stage": {"trains": ["sft", "rl"]}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    tiny.make(folder)
    return folder / "model"


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run with checkpoints after 2 and 10 steps, a third that is not complete, one that is damaged, and one of its
    warm start."""
    folder = tmp_path / "run"
    for name in ("step_000002", "step_000010", "step_000012", "damaged_step_000004"):
        (folder / "checkpoints" / name).mkdir(parents=True)
    (folder / "warm_start" / "checkpoints" / "step_000003").mkdir(parents=True)
    for name in ("checkpoints/step_000002", "checkpoints/step_000010", "warm_start/checkpoints/step_000003"):
        (folder / name / COMPLETE).write_text("{}")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": {"path": str(model)}}))
    return folder


def test_the_newest_complete_checkpoint_or_that_of_a_step(run: Path) -> None:
    assert exports.find_checkpoint(run, None) == run / "checkpoints" / "step_000010"
    assert exports.find_checkpoint(run, "2") == run / "checkpoints" / "step_000002"
    warm_start = exports.find_checkpoint(run / "warm_start", None)
    assert exports.default_target(warm_start) == run / "warm_start" / "export" / "step_000003"
    assert exports.read_config(run / "warm_start") == exports.read_config(run)


def test_a_step_without_a_complete_checkpoint_is_refused_with_those_there_are(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"step=12: this checkpoint is not complete.*has step 2, 10$"):
        exports.find_checkpoint(run, "12")
    for step in ("4", "all"):
        with pytest.raises(ConfigError, match=rf"step={step}: no such checkpoint; run=\S+ has step 2, 10$"):
            exports.find_checkpoint(run, step)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"no complete checkpoint in \S+; run=\S+/warm_start has step 3$"):
        exports.find_checkpoint(run, None)


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no complete checkpoint"):
        exports.find_checkpoint(tmp_path / "nowhere", None)
    (run / "config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"no config\.yaml there"):
        exports.export(exports.find_checkpoint(run, None), tmp_path / "hf")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    checkpoint = exports.find_checkpoint(run, None)
    target = tmp_path / "hf"
    for occupied in (target, tmp_path / "hf.partial"):
        occupied.mkdir()
        (occupied / "mine.txt").write_text("keep")
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match=r"to=\S+hf: "):
            exports.export(checkpoint, target)
        assert contents(tmp_path) == before
        shutil.rmtree(occupied)


def test_a_full_disk_and_a_missing_model_are_told_first(
    run: Path, model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    checkpoint = exports.find_checkpoint(run, None)
    size = (model / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size // 2))
    with pytest.raises(ConfigError, match=r"needs 0\.00 GB, free are 0\.00 GB; give another disk"):
        exports.export(checkpoint, tmp_path / "hf")
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"model": {"path": str(tmp_path / "gone")}}))
    with pytest.raises(ConfigError, match=r"gone' holds no \*\.safetensors file; an export takes configuration"):
        exports.export(checkpoint, tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))


def test_a_failed_export_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """The checkpoint of the fixture has no manifest."""
    with pytest.raises(CheckpointError, match=r"manifest\.json: No such file"):
        exports.export(exports.find_checkpoint(run, None), tmp_path / "hf")
    assert not list(tmp_path.glob("hf*"))
