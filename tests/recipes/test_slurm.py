"""Who is a rank under Slurm, and what slurm/train.sh runs. The variables are those that Slurm 24.11 was seen to set."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from recipes.errors import ConfigError
from recipes.launch.slurm import adopt_step

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


SRUN = r"""echo "$MASTER_ADDR $MASTER_PORT $*" >> calls
case $* in
  *recipes.train*) eval "${RANKS:-exit 7}" ;;
  *recipes.node_check*) [[ -z ${BAD:-} ]] || { echo "bad node $BAD: made up"; exit 1; } ;;
  *recipes.launch.has_new_checkpoint*) exit "${SAVED:-1}" ;;
  *\ true) exit "${ANSWER:-0}" ;;
esac"""
SCONTROL = """case $* in
  *show\\ job*) echo "JobId=1 Command=$PWD/slurm/train.sh $*" ;;
  *hostnames*) printf "node7\\nnode8\\n" ;;
  requeue*) echo "$*" >> calls; kill $PPID ;;
esac"""
SQUEUE = """[[ $* == *%T* ]] && echo -n "${STATE:-COMPLETING} "
echo $(($(date +%s) + 100))"""


def run_script(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Run slurm/train.sh with fake programs, which write down how they were called: the ranks do ``RANKS``, or exit
    with 7; the job is in ``STATE``, or about to end. The site file is empty unless ``SITE_FILE`` is given."""
    if not (folder / "slurm").exists():
        (folder / "slurm").symlink_to(ROOT / "slurm")
    for name, script in (("scontrol", SCONTROL), ("squeue", SQUEUE), ("srun", SRUN)):
        program(folder / "bin" / name, script)
    done = subprocess.run(
        ["bash", "slurm/train.sh", *arguments],
        cwd=folder,
        env={"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SITE_FILE": "/dev/null", **environment},
        capture_output=True,
        text=True,
    )
    calls = folder / "calls"
    return done.returncode, (calls.read_text() if calls.exists() else "") + done.stdout + done.stderr


JOB = {
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_JOB_ID": "40007",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_NUM_NODES": "2",
}
EACH = "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --cpu-bind=none --kill-on-bad-exit=0"
ONCE = "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --cpu-bind=none"
RANKS = "--nodes=2 --ntasks=16 --cpus-per-task=1 --cpu-bind=none --distribution=block --kill-on-bad-exit=1 --wait=60"


@pytest.mark.parametrize(
    ("container", "python"),
    [
        ("", ".venv/bin/python"),
        ("apptainer:/i/x.sif", "apptainer exec --nv --bind {here},/models --pwd {here} /i/x.sif python3"),
        (
            "pyxis:nvcr.io#x:1",
            "--container-image=nvcr.io#x:1 --container-workdir={here} "
            "--container-mounts={here}:{here},/models:/models python3",
        ),
    ],
    ids=["venv", "apptainer", "pyxis"],
)
def test_the_script_prepares_once_and_starts_the_same_entry_point_on_every_task(
    container: str, python: str, tmp_path: Path
) -> None:
    environment = JOB | {"CONTAINER": container, "CONTAINER_MOUNTS": "/models"}
    overrides = ("recipe=demo", "preflight=a100", "algorithm.steps=2", "node_check.shm_gib=4")
    status, calls = run_script(tmp_path, *overrides, **environment)
    assert status == 7, "the job ends with the step's exit code"
    python = python.format(here=tmp_path)
    hydra = "recipe=demo algorithm.steps=2 cluster.nodes=2 cluster.ranks=16"
    assert calls.splitlines() == [
        f"node7 10007 {EACH} {python} -m recipes.node_check {hydra} node_check.shm_gib=4",
        f"node7 10007 {ONCE} {python} -m recipes.preflight {hydra} preflight=a100",
        f"node7 10007 {ONCE} {python} -m recipes.launch.claim {hydra}",
        f"node7 10007 {ONCE} {python} -m rewards.placement node7,node8 8 0 {hydra}",
        f"node7 10007 {ONCE} {python} -m recipes.prepare {hydra}",
        f"node7 10007 {RANKS} {python} -m recipes.train {hydra}",
    ]


def test_the_engines_nodes_are_the_jobs_last_and_the_trainer_has_the_others(tmp_path: Path) -> None:
    status, calls = run_script(tmp_path, "recipe=demo", "cluster.engine_nodes=1", **JOB)
    assert status == 7
    hydra = "recipe=demo cluster.engine_nodes=1 cluster.nodes=1 cluster.ranks=8"
    assert calls.splitlines()[-1] == f"node7 10007 {RANKS} .venv/bin/python -m recipes.train {hydra}"


# Slurm signals the script alone, which ignores the signal until it has started the ranks.
PREEMPTED = "trap 'exit 75' USR1; while true; do kill -USR1 $PPID; sleep 0.1; done"
SAVES = {"STATE": "RUNNING", "SAVED": "0"}


@pytest.mark.parametrize(
    ("environment", "again"),
    [
        ({"STATE": "RUNNING", "RANKS": PREEMPTED}, "preemption was requested"),
        ({"STATE": "RUNNING", "ANSWER": "1"}, "a node does not respond"),
        ({"STATE": "RUNNING"}, None),
        (SAVES, "it failed with code 7 after a new checkpoint"),
        (SAVES | {"STATE": "COMPLETING"}, None),  # Slurm ends it: it was cancelled
        (SAVES | {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "2"}, None),
    ],
    ids=["preemption requested", "a lost node", "failed at once", "failed later", "cancelled", "too often"],
)
def test_a_job_that_may_end_better_is_requeued_and_resumes(
    environment: dict[str, str], again: str | None, tmp_path: Path
) -> None:
    """tests/slurm does the same with a real Slurm."""
    status, output = run_script(tmp_path, "recipe=demo", **JOB, **environment)
    assert ("requeue 40007" in output.splitlines()) == (again is not None)
    assert again is None or f"requeued (restart 1 of at most 20): {again}" in output
    assert again is not None or status == 7
    (tmp_path / "calls").unlink()
    status, output = run_script(tmp_path, "recipe=demo", **JOB, RANKS="exit 0", SLURM_RESTART_COUNT="1")
    assert status == 0
    (ranks,) = [call for call in output.splitlines() if "recipes.train" in call]
    assert ranks.endswith("recipe=demo cluster.nodes=2 cluster.ranks=16 resume=true overwrite=false")
    assert list(tmp_path.glob("*.prepared")) == [], "the next job of this number starts from the beginning"


EXCLUDED = {"STATE": "RUNNING", "BAD": "node8", "EXCLUDE_BAD_NODES": "true"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (EXCLUDED, "requeued (restart 1 of at most 20): bad nodes node8 are excluded"),
        (EXCLUDED | {"EXCLUDE_BAD_NODES": "false"}, "not requeued: bad nodes node8; submit with --exclude=node8"),
    ],
    ids=["excluded", "named"],
)
def test_a_bad_node_is_named_and_where_wanted_excluded(environment: dict[str, str], told: str, tmp_path: Path) -> None:
    """tests/slurm does the first with a real Slurm."""
    status, output = run_script(tmp_path, "recipe=demo", **JOB, **environment)
    assert status != 0
    assert told in output
    assert "recipes.preflight" not in output, "nothing else starts"
    assert ("requeue 40007" in output.splitlines()) == (environment["EXCLUDE_BAD_NODES"] == "true")


def test_a_site_file_may_read_what_is_not_set_and_a_toolkit_of_the_site_is_not_seen(tmp_path: Path) -> None:
    """Module systems do not stand ``set -u``, and bring a CUDA with a cuDNN of its own."""
    site = tmp_path / "site.sh"
    site.write_text(
        'seen=$NOT_SET\nexport CUDA_HOME=/opt/cuda CUDA_PATH=/opt/cuda NODE_CHECK="node_check.driver=570"\n'
    )
    ranks = 'echo "toolkit ${CUDA_HOME:-none} ${CUDA_PATH:-none}" >> calls'
    status, output = run_script(tmp_path, "recipe=demo", **JOB, SITE_FILE=str(site), RANKS=ranks)
    assert status == 0, output
    assert "toolkit none none" in output.splitlines()
    (checked,) = [line for line in output.splitlines() if "recipes.node_check" in line]
    assert checked.endswith(" node_check.driver=570")


@pytest.mark.parametrize("name", ["infiniband", "aws_efa", "slingshot"])
def test_a_worked_site_file_reaches_the_ranks(name: str, tmp_path: Path) -> None:
    site = ROOT / "slurm" / "sites" / f"{name}.sh"
    wanted = re.findall(r"^export ((?:NCCL|GLOO|FI)_\w+)=", site.read_text(), re.MULTILINE)
    assert {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} < set(wanted)
    program(tmp_path / "bin" / "module", 'echo "modules: $*" >> calls')
    ranks = "env > environment"
    status, output = run_script(tmp_path, "recipe=demo", **JOB, SITE_FILE=str(site), RANKS=ranks, USER="somebody")
    assert status == 0, output
    environment = dict(
        line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line
    )
    assert all(environment.get(variable) for variable in wanted)
    assert not any(module in output for module in ("cuda", "cudnn", "nccl/")), "pip brings them"


def test_the_script_wants_the_number_of_tasks(tmp_path: Path) -> None:
    status, output = run_script(tmp_path, SLURM_JOB_ID="1")
    assert status != 0
    assert "give --ntasks-per-node (ranks per node) to sbatch" in output and "-m" not in output


def test_a_job_says_that_no_site_file_was_sourced(tmp_path: Path) -> None:
    said = "no site file: this cluster's network, disks and container are not set"
    for site, says in (("", True), ("/dev/null", False)):
        _, output = run_script(tmp_path, "recipe=demo", **JOB, SITE_FILE=site)
        assert (said in output) == says


def test_an_unknown_container_is_refused(tmp_path: Path) -> None:
    status, output = run_script(tmp_path, **JOB, CONTAINER="docker:x")
    assert status == 1
    assert "CONTAINER=docker:x: use apptainer:IMAGE" in output and "-m" not in output


def test_the_safework_scripts_differ_in_their_recipe_and_sizes_only() -> None:
    scripts = sorted((ROOT / "slurm").glob("safework_*.sh"))
    sizes = ("70b", "72b", "72b_async", "72b_long", "78b", "7b")
    assert [script.stem for script in scripts] == [f"safework_{size}" for size in sizes]
    shared = set()
    for script in scripts:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cluster = compose("config", [f"recipe={script.stem}"]).cluster
        nodes = cluster.nodes + cluster.engine_nodes
        text = script.read_text()
        if cluster.engine_nodes:
            assert f"cluster.engine_nodes={cluster.engine_nodes} " in text
            text = text.replace(f" cluster.engine_nodes={cluster.engine_nodes}", "")
        assert f"\n#SBATCH --nodes={nodes} " in text
        # The grace is longer where a step is.
        grace = 3600 if script.stem == "safework_72b_long" else 900
        assert text.count(f" --signal=B:USR1@{grace}\n") == 1
        text = text.replace(f"USR1@{grace}", "USR1@GRACE")
        text = text.replace(f"on {nodes} nodes", "on NODES nodes")
        lines = text.replace(script.stem, "RECIPE").splitlines()
        shared.add("\n".join(line for line in lines if not line.startswith("#SBATCH --nodes")))
    assert len(shared) == 1
