"""The project's job scripts on a real Slurm of four nodes with fake GPUs; stand_in.py is in the place of Python."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from recipes.preflight import calibrate
from tests.slurm.cluster import CPUS, MEMORY_MIB, Cluster

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("safety", "value", "knowledge")
SECONDS = 600  # on a busy machine
# What a job runs, in this order.
MODULES = (
    "recipes.node_check",
    "recipes.node_check.links",
    "recipes.preflight",
    "recipes.launch.claim",
    "rewards.serve",
)
MODULES += ("recipes.prepare", "recipes.train", "stopped")


@pytest.fixture
def project(folder: Path) -> Path:
    """The scripts and the configuration, with a stand-in for Python."""
    for name in ("slurm", "conf", "rewards"):
        (folder / name).symlink_to(ROOT / name)
    servers = OmegaConf.load(ROOT / "conf" / "rewards" / "safework.yaml").servers
    (folder / "ports.json").write_text(json.dumps({name: servers[name].port for name in SERVERS}))
    stand_in = folder / ".venv" / "bin" / "python"
    stand_in.parent.mkdir(parents=True)
    stand_in.write_text(f"#!{sys.executable} -IS\n" + (ROOT / "tests" / "slurm" / "stand_in.py").read_text())
    stand_in.chmod(0o755)
    return folder


def submit(slurm: Cluster, folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return slurm.run(*command, folder=folder, STAND_IN_PYTHON=sys.executable, **environment)


def sbatch(slurm: Cluster, folder: Path, *arguments: str, **environment: str) -> str:
    """The job's number."""
    done = submit(slurm, folder, "sbatch", "--parsable", *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def calls(folder: Path) -> list[dict[str, Any]]:
    path = folder / "calls.jsonl"
    if not path.exists():
        return []
    # The last line may be under way.
    complete_lines, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete_lines.splitlines()]


def log(folder: Path, job: str) -> str:
    path = folder / f"slurm-{job}.log"
    return path.read_text() if path.exists() else ""


def test_the_heterogeneous_job_serves_its_judges_and_trains_on_every_gpu(slurm: Cluster, project: Path) -> None:
    """One node of ranks, two of judges; each is checked. Overrides reach every program, the preflight's own it alone;
    the trainer gets the addresses of the judges, a judge's node the name of its model; both sides have the same token;
    the judges are stopped in order after the training."""
    job = sbatch(
        slurm, project, "--nodes=1", ":", "--nodes=2", "slurm/safework_72b.sh", "algorithm=cpgd", "preflight=h200"
    )
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), log(project, job)
    # All of each node: its other CPUs, and all of its memory.
    whole = [f"cpu={nodes * CPUS},mem={nodes * MEMORY_MIB}M," for nodes in (1, 2)]
    assert [whole[i] in component["AllocTRES"] for i, component in enumerate(slurm.components(job))] == [True, True]
    all_calls = calls(project)
    common = ["recipe=safework_72b", "algorithm=cpgd", "cluster.nodes=1", "cluster.ranks=8"]
    checked = [call for call in all_calls if call["module"] == "recipes.node_check"]
    assert sorted(call["host"] for call in checked) == ["node1", "node2", "node3"]
    of_judges = [call for call in checked if call["host"] != "node1"]
    assert {(call["MASTER_ADDR"], call["arguments"][-1]) for call in of_judges} == {("node2", "node_check.gpus=8")}
    links = [call for call in all_calls if call["module"] == "recipes.node_check.links"]
    assert sorted(int(call["SLURM_PROCID"]) for call in links) == list(range(8))
    by_module = {module: [call for call in all_calls if call["module"] == module] for module in MODULES}
    assert [call["arguments"] for call in by_module["recipes.preflight"]] == [[*common, "preflight=h200"]]
    order = list(dict.fromkeys(call["module"] for call in all_calls))
    assert order == list(by_module), "in this order"

    serving = by_module["rewards.serve"]
    assert sorted(call["host"] for call in serving) == ["node2", "node3"]
    ours = {
        name: call["host"]
        for call in serving
        for name in SERVERS
        if f"++rewards.servers.{name}.host=0.0.0.0" in call["arguments"]
    }
    assert len(ours) == 3 and ours["value"] == ours["safety"] != ours["knowledge"], "4 + 1 and 8 GPUs on nodes of 8"
    ports = json.loads((project / "ports.json").read_text())
    addresses = [
        word
        for name in SERVERS
        for word in (
            f"++rewards.servers.{name}.endpoints=['http://{ours[name]}:{ports[name]}']",
            f"++rewards.servers.{name}.key_variable=REWARDS_TOKEN",
        )
    ]
    for module in ("recipes.prepare", "recipes.train"):
        assert all(call["arguments"] == [*common, *addresses] for call in by_module[module])
    training = by_module["recipes.train"]
    assert sorted(int(call["SLURM_PROCID"]) for call in training) == list(range(8))
    assert {call["host"] for call in training} == {call["MASTER_ADDR"] for call in training} == {"node1"}
    assert {call["OMP_NUM_THREADS"] for call in training} == {"8"}
    assert {call["token"] for call in (*serving, *training)} == {64}
    assert sorted(name for call in by_module["stopped"] for name in call["servers"]) == sorted(SERVERS)


@pytest.mark.parametrize(("module", "code"), [("recipes.preflight", 1), ("recipes.train", 7)])
def test_the_job_fails_with_the_code_of_what_failed(slurm: Cluster, project: Path, module: str, code: int) -> None:
    script = ("--nodes=1", "--ntasks-per-node=1", ":", "--nodes=2", "slurm/safework_7b.sh")
    job = sbatch(slurm, project, *script, STAND_IN_EXIT=f"{module}={code}")
    assert slurm.wait_for_end(job, SECONDS) == ("FAILED", f"{code}:0"), log(project, job)
    modules = [call["module"] for call in calls(project)]
    assert modules.count("stopped") == modules.count("rewards.serve"), "no server is left"
    assert ("recipes.prepare" in modules) == (module == "recipes.train"), "nothing runs after a preflight that fails"
    assert modules.count("recipes.train") in (0, 1), "it is not requeued"
    assert f"not requeued: it failed with code {code} without a checkpoint" in log(project, job)


def test_servers_without_room_are_refused(slurm: Cluster, project: Path) -> None:
    job = sbatch(slurm, project, "--nodes=1", ":", "--nodes=1", "slurm/safework_7b.sh")
    assert slurm.wait_for_end(job, SECONDS) == ("FAILED", "1:0"), log(project, job)
    assert "give the servers 2 nodes" in log(project, job)
    assert "recipes.train" not in [call["module"] for call in calls(project)]


def test_nodes_for_servers_that_are_not_needed_are_refused(slurm: Cluster, project: Path) -> None:
    job = sbatch(slurm, project, "--nodes=1", ":", "--nodes=1", "slurm/safework_7b.sh", "rewards=rules")
    assert slurm.wait_for_end(job, SECONDS) == ("FAILED", "1:0"), log(project, job)
    assert "this run starts no reward servers" in log(project, job)
    assert "recipes.train" not in [call["module"] for call in calls(project)]


def test_a_server_that_ends_in_the_middle_ends_the_job(slurm: Cluster, project: Path) -> None:
    script = ("--nodes=1", ":", "--nodes=2", "slurm/safework_7b.sh")
    job = sbatch(slurm, project, *script, STAND_IN_EXIT="rewards.serve=4")
    assert slurm.wait_for_end(job, SECONDS) == ("FAILED", "1:0"), log(project, job)
    assert "a reward server ended with code 4 in the middle of the run" in log(project, job)


def test_on_one_component_the_judges_share_the_nodes(slurm: Cluster, project: Path) -> None:
    """``rewards.supervisor.first_device``: the ranks have the GPUs before it; the default leaves the judges none."""
    options = ["--nodes=3", "--ntasks-per-node=4", "--gpus-per-node=8", "slurm/train.sh", "recipe=safework_7b"]
    small = "rewards.servers.knowledge.tensor=4"
    refused = sbatch(slurm, project, *options, small)
    job = sbatch(slurm, project, *options, small, "rewards.supervisor.first_device=4")
    assert slurm.wait_for_end(refused, SECONDS) == ("FAILED", "1:0")
    assert "rewards.supervisor.first_device=0: the trainer's ranks have the GPUs below 4" in log(project, refused)
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), log(project, job)
    all_calls = calls(project)
    assert {call["host"] for call in all_calls if call["module"] == "rewards.serve"} == {"node1", "node2", "node3"}
    assert sum(call["module"] == "recipes.train" for call in all_calls) == 12


def test_other_nodes_by_hydra_are_other_nodes_of_slurm(slurm: Cluster, project: Path) -> None:
    """``cluster.nodes`` in the plain command line: the job is submitted again with as many, and its first form is
    cancelled, so that what waits for its success does not start."""
    job = sbatch(slurm, project, "--nodes=1", "--ntasks-per-node=2", "slurm/train.sh", "recipe=demo", "cluster.nodes=2")
    assert slurm.wait_for_end(job, SECONDS)[0] == "CANCELLED", log(project, job)
    again = log(project, job).rsplit("Submitted batch job ", 1)[1].split()[0]
    assert slurm.wait_for_end(again, SECONDS) == ("COMPLETED", "0:0"), log(project, again)
    training = [call for call in calls(project) if call["module"] == "recipes.train"]
    assert len({call["host"] for call in training}) == 2
    assert training[0]["arguments"] == ["recipe=demo", "cluster.nodes=2", f"cluster.ranks={len(training)}"]


def test_the_ladder_is_a_job_a_stage_and_ends_with_one_that_fails(slurm: Cluster, project: Path) -> None:
    """Each job has a node for the trainer, as the command line says, and one for an engine, as the script does."""
    script = project / "small.sh"
    script.write_text(
        "#!/bin/bash\n#SBATCH --nodes=1 --ntasks-per-node=1 --output=slurm-%j.log\n"
        "[[ $1 == stage=rl_general ]] && export STAND_IN_EXIT=recipes.prepare=3\n"
        'source slurm/library.sh\nrun_job recipe=ladder_demo cluster.engine_nodes=1 "$@"\n'
    )
    given = ("seed=5", "model.path=a/base", "cluster.nodes=1")
    elsewhere = submit(slurm, project, "bash", "slurm/ladder.sh", "small.sh", *given, "run_dir=runs/mine")
    assert (elsewhere.returncode, elsewhere.stdout) == (1, "")
    assert "run_dir=runs/mine: a ladder's stages have the folders runs/RECIPE/STAGE" in elsewhere.stderr
    done = submit(slurm, project, "bash", "slurm/ladder.sh", "small.sh", *given)
    assert done.returncode == 0, done.stderr
    jobs = [line.split(": job ") for line in done.stdout.splitlines()]
    *jobs, (last, report) = jobs
    assert [stage for stage, _ in jobs] == ["sft", "rl_general", "rl_safety", "rl_efficient", "rl_search"]
    ends = [slurm.wait_for_end(job, SECONDS) for _, job in jobs]
    assert ends[:2] == [("COMPLETED", "0:0"), ("FAILED", "3:0")]
    assert {state for state, _ in ends[2:]} == {"CANCELLED"}
    assert slurm.wait_for_end(report, SECONDS) == ("COMPLETED", "0:0"), log(project, report)
    reported = [call["arguments"] for call in calls(project) if call["module"] == "recipes.launch.pipeline"]
    assert (last, reported) == ("report", [["runs/ladder_demo"]])
    trained = [call["arguments"] for call in calls(project) if call["module"] == "recipes.train"]
    assert trained[0][:5] == [
        "recipe=ladder_demo",
        "cluster.engine_nodes=1",
        "stage=sft",
        "seed=5",
        "model.path=a/base",
    ]
    # A later stage starts from what the stage before it leaves, whatever model the recipe or the command line names.
    (second,) = (
        call["arguments"]
        for call in calls(project)
        if call["module"] == "recipes.prepare" and "stage=rl_general" in call["arguments"]
    )
    assert "model.path=a/base" not in second
    assert {"stage.after=sft", "model.path=runs/ladder_demo/sft/hf"} <= set(second)
    nodes = {argument for call in trained for argument in call if "nodes" in argument}
    assert nodes == {"cluster.nodes=1", "cluster.engine_nodes=1"}


def starts(folder: Path, job: str) -> list[tuple[int, bool, list[str]]]:
    """Of each start of the job that has trained: its number, whether it resumes, and the ranks' hosts."""
    training = [call for call in calls(folder) if call["module"] == "recipes.train" and call["job"] == job]
    return [
        (
            start,
            any("resume=true" in call["arguments"] for call in training if call["start"] == start),
            sorted(call["host"] for call in training if call["start"] == start),
        )
        for start in sorted({call["start"] for call in training})
    ]


def trains(folder: Path, job: str, ranks: int) -> bool:
    return sum(len(hosts) for _, _, hosts in starts(folder, job)) == ranks


def test_a_bad_node_is_left_out_and_jobs_may_be_submitted_from_any_folder(slurm: Cluster, project: Path) -> None:
    """The log is in that folder, all else in the repository. The job has the nodes' memory, as it asks for."""
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    options = ("--nodes=2", "--ntasks-per-node=1", "--exclude=node1", "--exclusive", "--mem=0")
    script = str(project / "slurm" / "train.sh")
    bad = {"STAND_IN_BAD_NODE": "node2", "EXCLUDE_BAD_NODES": "true"}
    job = sbatch(slurm, elsewhere, *options, script, "recipe=demo", **bad)
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), log(elsewhere, job)
    assert [(start, hosts) for start, _, hosts in starts(project, job)] == [(1, ["node3", "node4"])]
    assert "requeued (restart 1 of at most 20): bad nodes node2 are excluded" in log(elsewhere, job)
    assert slurm.field(job, "ExcNodeList") == "node1,node2"
    assert "mem=40000M" in slurm.field(job, "AllocTRES")


def test_a_preempted_job_that_asked_for_no_signal_begins_again(slurm: Cluster, project: Path) -> None:
    """Its ranks get SIGTERM. What jobs with a signal do is in test_small_recipe.py."""
    without, script = project / "own" / "without.sh", (ROOT / "slurm" / "train.sh").read_text()
    assert script.count(" --signal=B:USR1@900") == 1
    without.parent.mkdir()
    without.write_text(script.replace(" --signal=B:USR1@900", ""))
    size = ("--nodes=2", "--ntasks-per-node=1")
    job = sbatch(slurm, project, *size, "own/without.sh", "recipe=demo", STAND_IN_STARTS="hangs,0")
    slurm.wait_for("ranks", lambda: trains(project, job, 2), SECONDS)
    urgent = sbatch(slurm, project, "--partition=urgent", "--nodes=4", "--output=/dev/null", "--wrap=true")
    assert slurm.wait_for_end(urgent, SECONDS) == ("COMPLETED", "0:0"), log(project, job)
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), log(project, job)
    assert [(start, resumes) for start, resumes, _ in starts(project, job)] == [(0, False), (1, True)]
    assert [call["start"] for call in calls(project) if call["module"] == "recipes.preflight"] == [0]
    assert "requeued (restart 1 of at most 20): it is preempted" in log(project, job)


def test_a_run_that_fails_begins_again_while_it_saves_and_not_more_often_than_it_may(
    slurm: Cluster, project: Path
) -> None:
    """The rank that is left is ended, and its code is the job's."""
    options = ("--nodes=1", "--ntasks-per-node=2", "slurm/train.sh", "recipe=demo")
    saving = sbatch(slurm, project, *options, STAND_IN_STARTS="saves", MAX_RESTARTS="1")
    assert slurm.wait_for_end(saving, SECONDS) == ("FAILED", "143:0"), log(project, saving)
    assert [(start, resumes) for start, resumes, _ in starts(project, saving)] == [(0, False), (1, True)]
    why = "it failed with code 143 after a new checkpoint"
    assert f"requeued (restart 1 of at most 1): {why}" in log(project, saving)
    assert f"not requeued although {why}: MAX_RESTARTS=1" in log(project, saving)


def test_a_job_that_is_cancelled_does_not_begin_again(slurm: Cluster, project: Path) -> None:
    """Though its ranks had saved."""
    options = ("--nodes=1", "--ntasks-per-node=1", "slurm/train.sh", "recipe=demo")
    job = sbatch(slurm, project, *options, STAND_IN_STARTS="hangs")
    slurm.wait_for("a rank", lambda: trains(project, job, 1), SECONDS)
    (project / f"checkpoint-{job}").touch()
    slurm.call("scancel", job)
    assert slurm.wait_for_end(job, SECONDS)[0] == "CANCELLED", log(project, job)
    assert slurm.field(job, "Restarts") == "0"


def test_the_rung_of_two_nodes_submits_signals_judges_and_records(slurm: Cluster, project: Path) -> None:
    """Rung 3 of docs/gpu_checks.md as its command runs it, but for what the ranks compute: both starts have a rank on
    each of 16 GPUs, all that the job writes is where the checks look, and the record is one that calibrate takes."""
    record = project / "two_nodes.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.slurm.two_nodes"]
    environment = {"TWO_NODES_ROOT": str(project), "STAND_IN_STARTS": "runs"}
    checks = (f"--gpu-record={record}", "tests/gpu/test_two_nodes.py")
    done = slurm.run(*command, *checks, folder=ROOT, **environment)
    (folder,) = (project / "runs").glob("gpu_check-*")
    (job,) = {call["job"] for call in calls(project)}
    assert done.returncode == 0, done.stdout[-4000:] + log(folder, job)
    assert [(start, resumes, len(hosts), len(set(hosts))) for start, resumes, hosts in starts(project, job)] == [
        (0, False, 16, 2),
        (1, True, 16, 2),
    ]
    (training, *_) = [call["arguments"] for call in calls(project) if call["module"] == "recipes.train"]
    assert {"cluster.nodes=2", "cluster.ranks=16", "parallel.tensor=8", "parallel.pipeline=2"} <= set(training)
    checked = {call["host"] for call in calls(project) if call["module"] == "recipes.node_check"}
    assert len(checked) == 2
    entries = json.loads(record.read_text())
    assert {entry["outcome"] for entry in entries.values()} == {"passed"} and len(entries) == 4
    assert {entry["machine"]["processes"] for entry in entries.values()} == {16}, "of the run, not of the login node"
    conf = project / "calibrated"
    shutil.copytree(ROOT / "conf", conf)
    assert calibrate.calibrate(record, conf) == ["conf/simulate/h100.yaml: network_gb_s 45 -> 46.1"]


def test_jobs_that_lose_a_node_begin_again_on_others(slurm: Cluster, project: Path) -> None:
    """Where Slurm notices it first, and where the other ranks do and fail. srun waits some time for the lost ones."""
    options = ("--nodes=2", "--ntasks-per-node=1", "slurm/train.sh", "recipe=demo")
    _, with_rank = jobs = [
        sbatch(slurm, project, *options, STAND_IN_STARTS=f"{does},0", SLURM_WAIT="1") for does in ("hangs", "notices")
    ]
    lost = []
    for job, node in zip(jobs, (0, 1), strict=True):
        slurm.wait_for("ranks", lambda job=job: trains(project, job, 2), SECONDS)
        lost.append(starts(project, job)[0][2][node])
    try:
        for node in lost:
            slurm.lose_node(node)
        slurm.notice(lost[0])
        (project / f"lost-{with_rank}").touch()
        slurm.wait_for("the script's notice", lambda: "a node does not respond" in log(project, with_rank), SECONDS)
        slurm.notice(lost[1])
        for job in jobs:
            assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), log(project, job)
    finally:
        for node in lost:
            slurm.start_node(node)
        slurm.wait_for_nodes()
    for job in jobs:
        first, second = starts(project, job)
        assert first[:2] == (0, False) and second[:2] == (1, True), log(project, job)
        assert not set(lost) & set(second[2])
    assert [log(project, job).count("requeued (restart") for job in jobs] == [0, 1]


ASK_SLURM = """
import sys
from hydra import compose, initialize_config_dir
from recipes.config import parse
from recipes.preflight import submission
with initialize_config_dir(sys.argv[1], version_base="1.3"):
    config = parse(compose("config", sys.argv[2:]))
command = submission.submission(config, "safework_7b", sys.argv[2:])
print(command)
print(submission.ask_slurm(command))
"""


@pytest.mark.parametrize(
    ("overrides", "options", "script"),
    [
        ((), "--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 :", "slurm/safework_7b.sh"),
        (
            ("rewards=rules",),
            "--nodes=1 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --exclusive --mem=0 --signal=B:USR1@900",
            "slurm/train.sh recipe=safework_7b rewards=rules",
        ),
    ],
)
def test_the_preflight_asks_slurm_for_the_nodes_of_the_run(
    overrides: tuple[str, ...], options: str, script: str, slurm: Cluster
) -> None:
    """A run on one node fits this cluster of four, judges included. One on eight nodes does not."""

    def ask(nodes: int) -> subprocess.CompletedProcess[str]:
        size = (f"cluster.nodes={nodes}", f"cluster.ranks={8 * nodes}")
        arguments = (str(ROOT / "conf"), "recipe=safework_7b", *size, *overrides)
        return slurm.run(sys.executable, "-c", ASK_SLURM, *arguments, folder=ROOT)

    fits = ask(nodes=1)
    assert fits.returncode == 0, fits.stderr
    command, said = fits.stdout.splitlines()
    assert command == f"sbatch {options} {script}"
    assert said.startswith("Job ") and " to start at " in said
    too_large = ask(nodes=8)
    assert too_large.returncode == 1 and "ConfigError: sbatch refuses this" in too_large.stderr


def test_a_site_file_reaches_submission_and_job(slurm: Cluster, project: Path) -> None:
    site = project / "site.sh"
    template = (ROOT / "slurm" / "sites" / "template.sh").read_text()
    site.write_text(template.replace("SBATCH_PARTITION=gpu", "SBATCH_PARTITION=tests"))
    module = 'module() { echo "modules: $*"; }; export -f module; '
    command = "sbatch --parsable --nodes=1 --ntasks-per-node=1 slurm/train.sh recipe=demo"
    done = submit(slurm, project, "bash", "-c", f"{module} source site.sh; {command}", USER="somebody")
    job = done.stdout.strip()
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), done.stderr + log(project, job)
    assert "modules: load gcc/13" in log(project, job)
    assert slurm.field(job, "TimeLimit") == "1-00:00:00" and slurm.field(job, "Account") == "my-project"


def test_a_site_with_four_gpus_a_node_submits_as_its_file_says(slurm: Cluster, project: Path) -> None:
    """The two command lines in slingshot.sh, with one node of ranks in the place of 16: the judges' sizes fit three
    nodes of four GPUs, and the check of the nodes gets the network's floor."""
    text = (ROOT / "slurm" / "sites" / "slingshot.sh").read_text()
    comment = " ".join(line.removeprefix("#").strip(" \\") for line in text.splitlines() if line.startswith("#   "))
    (arguments,) = re.findall('ARGS="(.*?)"', comment)
    overrides = [word for word in arguments.split() if not word.startswith("cluster.")]
    (options,) = re.findall("sbatch (.*?) slurm/safework_72b.sh", comment)
    assert "cluster.nodes=16 cluster.ranks=64 " in arguments and options.startswith("--nodes=16 --ntasks-per-node=4 ")
    (project / "site.sh").write_text(text.replace("SBATCH_PARTITION=gpu", "SBATCH_PARTITION=tests"))
    command = " ".join(["sbatch --parsable", options.replace("16", "1", 1), "slurm/safework_72b.sh", *overrides])
    module = "module() { :; }; export -f module; "
    done = submit(slurm, project, "bash", "-c", f"{module} source site.sh; {command}", USER="somebody")
    job = done.stdout.strip()
    assert slurm.wait_for_end(job, SECONDS) == ("COMPLETED", "0:0"), done.stderr + log(project, job)
    all_calls = calls(project)
    by_module = {module: [call for call in all_calls if call["module"] == module] for module in MODULES}
    for module, count in (("recipes.node_check.links", 4), ("recipes.train", 4), ("rewards.serve", 3)):
        assert len(by_module[module]) == count, module
    given = ["recipe=safework_72b", *overrides, "cluster.nodes=1", "cluster.ranks=4"]
    assert [call["arguments"] for call in by_module["recipes.preflight"]] == [given]
    for call in by_module["recipes.node_check"]:
        assert "node_check.neighbour_gb_s=10" in call["arguments"]
    judges = [call for call in by_module["recipes.node_check"] if "node_check.gpus=4" in call["arguments"]]
    assert len(judges) == 3


@pytest.mark.usefixtures("slurm")  # which brings shellcheck
def test_shellcheck_finds_nothing() -> None:
    scripts = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "slurm").rglob("*.sh"))]
    done = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(ROOT / "slurm" / "train.sh", os.X_OK)
