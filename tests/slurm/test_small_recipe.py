"""The job scripts on the real Slurm with the real programs: Megatron-Core, vLLM's engines and a judge on its nodes."""

import os
import re
import signal
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest

from recipes.run import records, sample_files
from tests.recipes import tiny
from tests.recipes.kill_check import timeless
from tests.slurm.cluster import Cluster
from tests.slurm.test_scripts import log, sbatch

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 900
SFT_STEPS = 60
RL_STEPS = 4
# The first start of the RL job makes the steps 1 and 2, the second 3 and 4.
HELD = ("algorithm.advantage=tests.slurm.held.grpo", "checkpoint.every_steps=100")
SFT = (
    "stage=sft",
    "stage.sft.epochs=null",
    f"stage.sft.steps={SFT_STEPS}",
    "stage.evaluates=false",
    "parallel=tp2_sp",
    "checkpoint.every_steps=5",
)
RL = ("stage=rl_safety", "stage.evaluates=false", "parallel=tp2_sp", "rollout.engines=2", f"algorithm.steps={RL_STEPS}")
JUDGE = "a_judge"


@pytest.fixture
def project(folder: Path) -> Path:
    """Like a user's clone, with the tiny recipe and a judge, which decides nothing, in it."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    twin = folder / "twin"
    twin.mkdir()
    tiny.make(twin)
    make_judge(twin)
    return folder


def make_judge(twin: Path) -> None:
    """A reward model of the tiny one, and ``rewards=judged``: ``rewards=letters`` with its scores at weight 0."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(twin / "model", num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(twin / "judge")
    AutoTokenizer.from_pretrained(twin / "model").save_pretrained(twin / "judge")
    server = {"model": str(twin / "judge"), "runner": "pooling"}
    judged = {
        "defaults": ["letters"],
        "mix": {"safety": {JUDGE: 0.0}},
        "verifiers": {JUDGE: {"template": "scalar", "server": "judge"}},
        "servers": {"judge": {**server, "arguments": ["--max-model-len", "128"]}},
    }
    records.write_json(twin / "conf" / "rewards" / "judged.yaml", judged)


def rl_after(sft: Path, run_dir: Path, *more: str) -> list[str]:
    given = tiny.overrides(sft.parent, run_dir, *RL, f"stage.after={sft.name}", *more)
    return [argument for argument in given if not argument.startswith("model.path=")]


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics without clocks and the judge."""
    kept_rows = timeless(list(records.read_rows(folder / "metrics.jsonl")))
    return [
        {key: value for key, value in row.items() if JUDGE not in key and not key.startswith("servers/")}
        for row in kept_rows
    ]


def samples(folder: Path) -> list[dict[str, Any]]:
    """The responses without the judge's verdicts, in the order of the prompts."""
    kept_rows = sorted(sample_files.read(folder), key=itemgetter("step", "prompt_id", "sample_index"))
    for row in kept_rows:
        row["verdicts"].pop(JUDGE, None)
    return kept_rows


def checkpoint_steps(folder: Path) -> list[int]:
    return [event["step"] for event in records.read_events(folder / "events.jsonl") if event["kind"] == "checkpoint"]


def stop_a_rank(slurm: Cluster, job: str, folder: Path, restarts: int) -> int:
    """Stop rank 1 of this start of the job in the middle of a step, after the start's first checkpoint; its pid."""

    def rank() -> int | None:
        processes = slurm.processes_with("\0SLURM_PROCID=1\0")
        return min((pid for pid, command in processes.items() if "recipes.train" in command), default=None)

    slurm.wait_for("the start", lambda: slurm.field(job, "Restarts") == str(restarts), SECONDS)
    before = len(checkpoint_steps(folder))
    pid = slurm.wait_for("rank 1", rank, SECONDS)
    slurm.wait_for("a checkpoint", lambda: len(checkpoint_steps(folder)) > before, SECONDS)
    os.kill(pid, signal.SIGSTOP)
    return pid


def meet_the_time_limit(slurm: Cluster, project: Path, job: str, stopped: int) -> None:
    """It is as near as the job script's --signal says. Slurm looks at limits every 30 s."""
    slurm.run("scontrol", "update", f"JobId={job}", "EndTime=now+15minutes").check_returncode()
    slurm.wait_for("the signal", lambda: "preemption requested by Slurm" in log(project, job), SECONDS)
    os.kill(stopped, signal.SIGCONT)
    next_limit = ("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # refused while the job is completing
    slurm.wait_for("the next start's limit", lambda: slurm.run(*next_limit).returncode == 0, SECONDS)


def preempt(slurm: Cluster, project: Path, job: str) -> None:
    """A job of a higher priority needs the nodes."""
    urgent = sbatch(slurm, project, "--partition=urgent", "--nodes=4", "--output=/dev/null", "--wrap=true")
    assert slurm.wait_for_end(urgent, SECONDS) == ("COMPLETED", "0:0"), log(project, job)


@pytest.mark.timeout(3 * SECONDS)
def test_a_ladder_whose_jobs_meet_a_limit_lose_a_node_and_are_preempted_equals_plain_launches(
    slurm: Cluster, project: Path
) -> None:
    """SFT has two nodes, whose ranks are one tensor-parallel group. After it, RL has the same with an engine on
    each node, and a third node for the judge. In the middle of a step the SFT meets its time limit, and later
    loses a node; the RL is preempted. The jobs go on by themselves: from the step in whose middle they were, or,
    without a node, from the former checkpoint. What waits for their end goes on waiting. Metrics, samples and
    weights are those of one machine that was never disturbed, bit for bit."""
    twin = project / "twin"
    sft, rl = twin / "sft", twin / "rl"
    two_nodes, train = ("--nodes=2", "--ntasks-per-node=1"), "slurm/train.sh"
    # Shorter than the default, for the lost node. Long enough for rank 0 to end after rank 1 on a busy machine: srun
    # kills what is left then.
    first = sbatch(slurm, project, *two_nodes, train, *tiny.overrides(twin, sft, *SFT), SLURM_WAIT="20")
    after_sft = (f"--dependency=afterok:{first}", "--kill-on-invalid-dep=yes")
    job = sbatch(
        slurm, project, *after_sft, *two_nodes, ":", *after_sft, "--nodes=1", "--ntasks-per-node=1", train,
        *rl_after(sft, rl, "rewards=judged", *HELD),
    )  # fmt: skip
    after_rl = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    last = sbatch(slurm, project, *after_rl, "--nodes=1", "--output=/dev/null", "--wrap=touch last")

    meet_the_time_limit(slurm, project, first, stop_a_rank(slurm, first, sft, restarts=0))
    stop_a_rank(slurm, first, sft, restarts=1)
    _, lost = slurm.call("scontrol", "show", "hostnames", slurm.field(first, "NodeList")).split()
    try:
        slurm.lose_node(lost)
        slurm.notice(lost)
        assert slurm.wait_for_end(first, SECONDS) == ("COMPLETED", "0:0"), log(project, first)
    finally:
        slurm.start_node(lost)
    assert slurm.field(first, "Restarts") == "2"

    slurm.wait_for_file(job, project / "held", SECONDS)
    preempt(slurm, project, job)
    assert not (project / "last").exists()
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), log(project, job)
    assert slurm.field(job, "Restarts") == "1"
    assert slurm.wait_for_end(last, SECONDS) == ("COMPLETED", "0:0")
    slurm.wait_for_nodes()
    assert checkpoint_steps(rl) == [2, RL_STEPS]
    for number in (first, job):
        printed = log(project, number)
        assert printed.count("Exited with exit code 75") == 1, printed
        requeued = re.findall(r"requeued \(restart (\d) of at most 20\): (.*)", printed)
        assert requeued == [("1", "preemption was requested")], "Slurm itself requeues after it lost a node"
    assert list(project.glob("*.prepared")) == []

    tiny.complete(tiny.overrides(twin, twin / "plain_sft", *SFT, "cluster.ranks=2"))
    tiny.complete(rl_after(twin / "plain_sft", twin / "plain_rl", "cluster.ranks=2"))
    for stage in ("sft", "rl"):
        plain = twin / f"plain_{stage}"
        assert rows(twin / stage) == rows(plain)
        weights = [folder / "hf" / "model.safetensors" for folder in (twin / stage, plain)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert samples(rl) == samples(twin / "plain_rl")
    judged = [
        (row["response"], row["verdicts"][JUDGE]["score"])
        for row in sample_files.read(rl)
        if "safety" in row["verdicts"]
    ]
    assert len(judged) == RL_STEPS * 12
    assert all(0 < score < 1 if response.strip() else score == 0 for response, score in judged)  # no answer: not asked
