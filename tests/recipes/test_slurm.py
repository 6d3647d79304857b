"""Who is a rank under Slurm, and what slurm/train.sh runs. The variables are those that Slurm 24.11 was seen to set."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from recipes.config import ConfigError
from recipes.slurm import adopt_step

ROOT = Path(__file__).resolve().parents[2]
BATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
TASK = {**BATCH, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
TASK |= {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1"}
SHELL = {**BATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}
SHELL |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"}
RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
NODE = {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2"}
ONLY = {"LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TASK | MASTER, RANK | NODE),
        (SHELL | MASTER, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"} | ONLY),
        ({}, {}),
        (BATCH | MASTER, {}),  # the batch script itself has SLURM_PROCID
        (SHELL, {}),  # srun --pty bash
        (SHELL | MASTER | {"SLURM_STEP_ID": "4294967290"}, {}),  # the interactive step of salloc
        (
            TASK | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
        ),
    ],
    ids=["task", "only task", "no slurm", "batch script", "shell", "interactive step", "torchrun in a task"],
)
def test_only_a_task_of_a_step_becomes_a_rank(
    environment: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in RANK | NODE or name in MASTER:
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    try:
        adopt_step()
        assert {name: os.environ[name] for name in RANK | NODE if name in os.environ} == expected
    finally:
        os.environ.clear()
        os.environ |= before


def test_tasks_without_a_master_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*RANK, *NODE, *MASTER):
        monkeypatch.delenv(name, raising=False)
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set in a Slurm step of 4 tasks: start it with sbatch"):
        adopt_step()


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


def run_script(folder: Path, *arguments: str, srun: str, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Run slurm/train.sh with programs that only write down how they were called."""
    shutil.copy(ROOT / "slurm" / "train.sh", folder)
    program(folder / ".venv/bin/python", 'echo "python $*" >> calls')
    program(folder / "bin/scontrol", 'echo "$*" >> calls; printf "node7\\nnode8\\n"')
    program(folder / "bin/srun", srun)
    slurm = {"SLURM_NTASKS": "16", "SLURM_JOB_ID": "40007", "SLURM_JOB_NODELIST": "node[7-8]"}
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "train.sh", *arguments],
        cwd=folder,
        env={"PATH": path, **(slurm if environment is None else environment)},
        capture_output=True,
        text=True,
    )
    calls = folder / "calls"
    return done.returncode, (calls.read_text() if calls.exists() else "") + done.stderr


def test_the_script_prepares_once_and_starts_the_same_entry_point_on_every_task(tmp_path: Path) -> None:
    srun = 'echo "srun $MASTER_ADDR $MASTER_PORT $*" >> calls; exit 7'
    status, calls = run_script(tmp_path, "recipe=demo", "algorithm.steps=2", srun=srun)
    assert status == 7, "the job ends with the step's exit code"
    assert calls.splitlines() == [
        "show hostnames node[7-8]",
        "python -m recipes.prepare recipe=demo algorithm.steps=2 cluster.ranks=16",
        "srun node7 10007 --cpus-per-task=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 "
        ".venv/bin/python -m recipes.train recipe=demo algorithm.steps=2 cluster.ranks=16",
    ]


def test_the_script_wants_the_number_of_tasks(tmp_path: Path) -> None:
    status, output = run_script(tmp_path, srun="echo srun >> calls", environment={"SLURM_JOB_ID": "1"})
    assert status != 0
    assert "give --ntasks-per-node (ranks per node) to sbatch" in output and "srun" not in output
