"""Two nodes of eight GPUs, by sbatch from a login node: weights between nodes, one checkpoint folder, a requeue."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from recipes.run import records
from tests.gpu import small_run
from tests.recipes import tiny
from tests.settings import CONF

ROOT = Path(__file__).resolve().parents[2]
GPUS = 0  # of the login node
NODES, GPUS_OF_NODE = 2, 8
SBATCH = [f"--nodes={NODES}", f"--ntasks-per-node={GPUS_OF_NODE}", f"--gpus-per-node={GPUS_OF_NODE}"]
SBATCH += ["--cpus-per-task=8", "--exclusive", "--mem=0", "--time=01:00:00"]
# A node is a pipeline stage and an engine: every engine needs the weights of the other node's stage.
LAYOUT = ("parallel.tensor=8", "parallel.pipeline=2", "rollout.engines=2", "rollout.tensor=8")
# More than are made before the signal arrives.
STEPS = 40
STEP_SECONDS = 1800  # in the queue and until the first step
END_SECONDS = 3600
FLOORS = OmegaConf.load(CONF / "node_check" / "h100.yaml")


@dataclass(frozen=True)
class Job:
    """A job that has ended: its run's folder and the text of its log."""

    run_dir: Path
    log: str


def run_job(folder: Path, run_dir: Path, options: Sequence[str], overrides: Sequence[str]) -> Job:
    """Submit, ask for preemption after the first step as Slurm does (SIGUSR1), and wait for the end of the job.

    ``folder`` gets the log. Fails with the end of the log when the job ends before its first step or takes too long.
    """
    command = ["sbatch", "--parsable", *options, str(ROOT / "slurm" / "train.sh"), *overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip().partition(";")[0]
    log = folder / f"slurm-{job}.log"

    def tail() -> str:
        return log.read_text()[-4000:] if log.exists() else f"job {job} has no log in {folder}"

    def is_listed() -> bool:
        listed = subprocess.run(
            ["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True
        )
        if listed.returncode and "Invalid job id" not in listed.stderr:
            return True  # the controller is busy
        return listed.stdout.strip() not in ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    wait_for(lambda: bool(small_run.rows(run_dir)) or not is_listed(), STEP_SECONDS, tail)
    assert small_run.rows(run_dir), f"the job ended before its first step:\n{tail()}"
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    wait_for(lambda: not is_listed(), END_SECONDS, tail)
    return Job(run_dir, log.read_text())


def wait_for(happened: Callable[[], bool], seconds: float, tail: Callable[[], str]) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s:\n{tail()}"
        time.sleep(1)


@pytest.fixture(scope="module")
def job() -> Job:
    """The repository is on a file system that the nodes share, so the model and the run are in its runs/."""
    if shutil.which("sbatch") is None:
        pytest.fail(
            "no sbatch: these checks are started on a cluster's login node, `make gpu-check-two-nodes EXTRA=gpu`"
        )
    folder = ROOT / "runs" / f"gpu_check-{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True)
    tiny.make(folder, **small_run.MODEL)
    run_dir = folder / "run"
    return run_job(folder, run_dir, SBATCH, small_run.overrides(folder, run_dir, STEPS, *LAYOUT))


@pytest.fixture(autouse=True)
def environment(job: Job, record_property: Callable[[str, object], None]) -> dict[str, Any]:
    """The machine and versions of the run, which are recorded in the place of the login node's."""
    environment: dict[str, Any] = json.loads((job.run_dir / "environment.json").read_text())
    record_property("environment", environment)
    return environment


def test_weights_cross_between_the_nodes(job: Job, environment: dict[str, Any]) -> None:
    """Every sync's checksums are compared, and trainer and engines agree."""
    assert environment["machine"]["processes"] == NODES * GPUS_OF_NODE
    small_run.assert_sound(small_run.rows(job.run_dir), STEPS)


def test_the_job_is_requeued_and_goes_on_from_its_checkpoint(job: Job) -> None:
    """Once, and no step is lost or repeated: a checkpoint of both nodes' ranks is one folder."""
    assert re.findall(r"requeued \(restart (\d+) of", job.log) == ["1"]
    events = records.read_events(job.run_dir / "events.jsonl")
    assert [event["kind"] for event in events if event["kind"] in ("start", "resume", "finish")] == [
        "start",
        "resume",
        "finish",
    ]
    saved = [event["step"] for event in events if event["kind"] == "checkpoint"]
    assert len(saved) == 2 and 1 <= saved[0] < saved[1] == STEPS


def test_the_links_between_the_nodes_hold_their_floor(job: Job, record_property: Callable[[str, object], None]) -> None:
    """What the job's own check of the links has measured, of its last start."""
    within, between = small_run.links(job.log)[-1]
    record_property("within_gb_s", within)
    record_property("network_gb_s", between)
    record_property("seconds_of_the_last_step", small_run.seconds(small_run.rows(job.run_dir)[-1]))
    assert within > FLOORS.node_gb_s
    assert between > FLOORS.neighbour_gb_s


def test_the_export_of_two_nodes_loads_in_transformers(job: Job) -> None:
    trained = AutoModelForCausalLM.from_pretrained(job.run_dir / "hf")
    assert trained.config.num_key_value_heads == small_run.MODEL["kv_heads"]
