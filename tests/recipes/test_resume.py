"""Whole launches in one folder: beside a first one, after its end, with other settings, and as srun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from recipes.run import folder as run_folder
from recipes.run import lock, records
from recipes.training import stages
from tests import warm
from tests.recipes import tiny
from tests.recipes.test_run_folder import tree

SFT = ("stage=sft", "stage.evaluates=false", "stage.sft.epochs=null", "parallel=tp1", "cluster.ranks=1")
SFT += ("precision=fp32", "stage.sft.decay=constant", "stage.sft.warmup_fraction=0")
RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0"}
RANK |= {"GROUP_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def killed(twin: Path) -> Path:
    """The folder of a run whose launcher was killed when it had a checkpoint; while it ran, others tried to begin."""
    run_dir = twin / "killed"
    run = tiny.Run(tiny.overrides(twin, run_dir, *SFT, "stage.sft.steps=100000", "checkpoint.every_steps=1"))
    try:
        run.wait_for("a checkpoint", lambda: list(run_dir.glob("checkpoints/*/complete.json")))
        for option in ("resume=true", "overwrite=true"):
            printed, code = refused(twin, run_dir, "stage.sft.steps=100000", option)
            assert code == 1 and f"another launch uses it: process {run.process.pid} on " in printed
        assert run.process.poll() is None
        run.process.send_signal(signal.SIGKILL)
        run.output()
        assert run.remains(60) == ({}, set())
    finally:
        run.kill_all()
    assert len(list(run_dir.glob("lock.*"))) == 1, "as a kill leaves it"
    return run_dir


def refused(twin: Path, run_dir: Path, *options: str) -> tuple[str, int]:
    run = tiny.Run(tiny.overrides(twin, run_dir, *SFT, *options))
    printed = run.output()
    assert "Traceback" not in printed
    return printed, run.process.returncode


def settings(run_dir: Path, name: str = "config.yaml") -> dict[str, Any]:
    return yaml.safe_load((run_dir / name).read_text())


def saved(run_dir: Path) -> int:
    return max(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/*/complete.json"))


def test_a_killed_run_is_refused_as_another_experiment_and_goes_on_as_itself(twin: Path, killed: Path) -> None:
    """Nothing of it changes by what is refused: by the settings, or by the checkpoint when the ranks load it."""
    (lost,) = killed.glob("lock.*")
    run_dir = killed
    steps = f"stage.sft.steps={saved(run_dir) + 2}"
    accept = "resume_accept=[stage.sft]"
    before = {name: content for name, content in tree(run_dir).items() if name != lost.name}
    for options, message in (
        ((steps,), "holds a run with results (checkpoints, metrics.jsonl)"),
        ((steps, "resume=true"), "stage.sft.steps: 100000 → "),
        ((steps, "resume=true", accept, "seed=2"), "seed: 1 → 2"),
    ):
        printed, code = refused(twin, run_dir, *options)
        assert code == 1 and message in printed
        assert {name: content for name, content in tree(run_dir).items() if name != lost.name} == before
    assert (run_dir / "config.yaml").read_bytes() == before["config.yaml"]
    assert not (run_dir / "config.1.yaml").exists() and not list(run_dir.glob("lock.*"))

    changed = (steps, "stage.sft.learning_rate=1e-4", "logger=tensorboard")
    printed = tiny.complete(tiny.overrides(twin, run_dir, *SFT, *changed, "resume=true", accept))
    assert "resume: logger.tensorboard: false → true" in printed and "resume: stage.sft.steps: 100000 → " in printed
    assert settings(run_dir, "config.1.yaml")["stage"]["sft"]["steps"] == 100000
    assert settings(run_dir)["stage"]["sft"]["steps"] == saved(run_dir)
    *_, last = (event for event in records.read_events(run_dir / "events.jsonl") if event["kind"] == "resume")
    names = {change.partition(":")[0] for change in last["changes"]}
    assert names == {"stage.sft.steps", "stage.sft.learning_rate", "logger.tensorboard"}
    learning_rates = [row["learning_rate"] for row in records.read_rows(run_dir / "metrics.jsonl")]
    assert max(learning_rates[-2:]) <= 1e-4 < min(learning_rates[:2])
    assert not list(run_dir.glob("lock.*"))
    assert run_folder.run_id(run_dir) == json.loads((run_dir / "environment.json").read_text())["run"]["id"]


def test_a_finished_run_is_moved_aside_whole(twin: Path, killed: Path) -> None:
    before = tree(killed)
    tiny.complete(tiny.overrides(twin, killed, *SFT, "stage.sft.steps=1", "overwrite=true"))
    assert tree(killed.with_name("killed.1")) == before
    assert saved(killed) == 1


def test_a_rank_of_srun_holds_the_prepared_folder_and_gives_it_back(twin: Path, tmp_path: Path) -> None:
    """Also at a SIGTERM. Without recipes.prepare it makes nothing."""
    run_dir = tmp_path / "run"
    arguments = tiny.overrides(twin, run_dir, *SFT, "stage.sft.steps=100000")

    def start(module: str, environment: dict[str, str]) -> subprocess.Popen[str]:
        with warm.processes():
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=tiny.ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                text=True,
            )

    rank = start("recipes.train", RANK)
    assert "is not prepared for this launch" in rank.communicate(timeout=600)[0] and rank.returncode == 1
    assert not run_dir.exists()
    assert start("recipes.prepare", {}).wait(600) == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    rank = start("recipes.train", RANK | {"MASTER_PORT": port})
    try:
        while not (run_dir / "metrics.jsonl").exists():
            assert rank.poll() is None, rank.communicate()
            time.sleep(0.01)
        (held,) = run_dir.glob("lock.*")
        assert lock.Holder(**json.loads(held.read_text())).pid == rank.pid
        rank.terminate()
        assert rank.wait(600) == -signal.SIGTERM
    finally:
        rank.kill()
    assert not list(run_dir.glob("lock.*"))


@pytest.mark.parametrize(("steps_made", "asked"), [(0, []), (3, ["after"])])
def test_a_finished_run_that_goes_on_for_more_steps_answers_anew(
    steps_made: int, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write_json(tmp_path / "answers.json", {"before": {}, "after": {}})
    given: list[str] = []

    def train(training: Any, run: Any, *_: Any) -> int:
        run.steps_made = steps_made
        return 3

    def evaluate(_: Any, model: str, answers: dict[str, Any], version: int = 0) -> None:
        if model not in answers:
            given.append(model)

    monkeypatch.setattr(stages, "train", train)
    monkeypatch.setattr(stages, "_evaluate", evaluate)
    stage = SimpleNamespace(trains=["rl"], evaluates=True, after=None, name="rl")
    run = MagicMock(folder=tmp_path, rank=1, steps_made=0)
    config = SimpleNamespace(stage=stage, model=SimpleNamespace(path=str(tmp_path / "model")))
    stages.run_stage(MagicMock(config=config, run=run))
    assert given == asked
