"""The command that submits a run to Slurm, and whether Slurm would take it.

A run whose judges need nodes of their own is submitted by its recipe's script, which asks for them. Any other run is
submitted by ``slurm/train.sh``, because a job in which a component stands idle is ended.
"""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.platform import capabilities
from recipes.config import Config, generates
from recipes.errors import ConfigError
from recipes.preflight import alternatives
from recipes.preflight.report import NotChecked
from rewards import placement
from rewards.settings import COLOCATED

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_JUDGES = "slurm/train.sh"
LADDER = "slurm/ladder.sh"
SIZE_LINE = "#SBATCH --nodes=N --ntasks-per-node=N --gpus-per-node=N"
# The first match in a script is for the trainer's nodes, the second for the judges'. ``others``: more options.
SIZE = re.compile(
    r"^#SBATCH --nodes=(?P<nodes>\d+) --ntasks-per-node=(?P<ranks>\d+) --gpus-per-node=(?:\w+:)?(?P<gpus>\d+)"
    r"(?P<others>.*)$",
    re.MULTILINE,
)
SIGNAL = re.compile(r"^#SBATCH .*(--signal=\S+)", re.MULTILINE)
# The arguments of a script to its run.
RUN_JOB = re.compile(r'^run_job (.*)"\$@"$', re.MULTILINE)
# Overrides that the scripts make from Slurm's variables.
FROM_SLURM = ("cluster.nodes=", "cluster.ranks=")
# The preflight's overrides that do not concern the preflight of the job.
OF_THIS_CALL = ("preflight.output=", "preflight.files=", "preflight.nodes=")
DEVICE_OF_JOBS = "preflight=h100"
ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Submission:
    """A command of sbatch.

    Attributes:
        options: sbatch's options, which stand before the script.
        script: relative to the repository.
        overrides: Hydra's, which stand after the script.
    """

    options: tuple[str, ...]
    script: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        """The command for a shell."""
        return shlex.join(("sbatch", *self.options, self.script, *self.overrides))


def in_job() -> bool:
    """Whether this process is in a job of Slurm."""
    return "SLURM_JOB_ID" in os.environ


def needs_slurm(config: Config) -> bool:
    """Whether the run needs GPUs, and is not already in a job."""
    return capabilities(config.cluster.platform).has_gpus and not in_job()


def submission(config: Config, recipe: str, arguments: Sequence[str]) -> Submission:
    """The command that submits a run.

    Args:
        config: of the run.
        recipe: its name.
        arguments: the overrides of the preflight's command line.

    Raises ConfigError if judges need nodes and the recipe has no script that asks for them, or if servers that share
    the trainer's nodes do not fit there.
    """
    given = [argument.lstrip("+") if argument.startswith("+preflight") else argument for argument in arguments]
    left_out = (*FROM_SLURM, *OF_THIS_CALL, DEVICE_OF_JOBS)
    overrides = [argument for argument in given if not argument.startswith(left_out)]
    judges = alternatives.judge_nodes(config)
    nodes = config.cluster.nodes + config.cluster.engine_nodes
    ranks = config.cluster.ranks // config.cluster.nodes
    script = f"slurm/{recipe}.sh"
    if not (ROOT / script).is_file():
        if judges:
            raise ConfigError(f"no {script}: copy slurm/safework_72b.sh, with recipe={recipe} in its last line")
        check_shared_nodes(config, ranks, gpus=ranks)
        size = options_of_size(nodes, ranks, ranks)
        cores = f"--cpus-per-task={config.cluster.threads}"
        return Submission((*size, cores, "--exclusive", "--mem=0"), WITHOUT_JUDGES, tuple(overrides))

    text = (ROOT / script).read_text()
    of_trainer, of_judges = sizes_of_script(script, text)
    if judges and of_judges is None:
        raise ConfigError(f"{script} asks for no judges' nodes, and this run needs {judges}: see slurm/safework_72b.sh")
    # With first_device, servers have the GPUs of a node that no rank has.
    gpus = int(of_trainer["gpus"]) if config.rewards.supervisor.first_device else ranks
    size = options_of_size(nodes, ranks, gpus)
    if not judges:
        check_shared_nodes(config, ranks, gpus)
    if of_judges is not None and not judges:
        others = [*of_trainer["others"].split(), *SIGNAL.findall(text)[:1]]
        return Submission((*size, *others), WITHOUT_JUDGES, with_those_of_script(script, text, overrides))
    for_judges = []
    if of_judges is not None and str(judges) != of_judges["nodes"]:
        for_judges.append(f"--nodes={judges}")
    if of_judges is not None and str(ranks) != of_judges["gpus"]:
        for_judges.append(f"--gpus-per-node={ranks}")
    size_of_script = options_of_size(of_trainer["nodes"], of_trainer["ranks"], of_trainer["gpus"])
    options: list[str] = []
    if for_judges or size != size_of_script:
        options = [*size]
        # The options of the second component, the judges' nodes, stand after the colon.
        if of_judges is not None:
            options += [":", *for_judges]
    return Submission(tuple(options), script, tuple(word for word in overrides if word != f"recipe={recipe}"))


def options_of_size(nodes: int | str, ranks: int | str, gpus: int | str) -> tuple[str, str, str]:
    """sbatch's options for a number of nodes with so many ranks and GPUs each."""
    return f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={gpus}"


def sizes_of_script(script: str, text: str) -> tuple[dict[str, str], dict[str, str] | None]:
    """The groups of ``SIZE`` for the trainer's nodes and for the judges' nodes, None if the script asks for none."""
    sizes = [match.groupdict() for match in SIZE.finditer(text)]
    if not sizes:
        raise ConfigError(f"{script} has no line of the form {SIZE_LINE}: give it one, as slurm/safework_72b.sh has")
    return sizes[0], sizes[1] if len(sizes) > 1 else None


def with_those_of_script(script: str, text: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that a script gives its run, and after them the others of ``overrides``."""
    lines = RUN_JOB.findall(text)
    if not lines:
        raise ConfigError(f'{script} has no line of the form run_job recipe=NAME "$@": see slurm/safework_72b.sh')
    of_script = shlex.split(lines[0])
    return (*of_script, *(override for override in overrides if override not in of_script))


def check_shared_nodes(config: Config, ranks: int, gpus: int) -> None:
    """Check that the servers fit on the trainer's nodes, as ``rewards.placement`` will in the job.

    Args:
        config: of the run.
        ranks: number of ranks on a node.
        gpus: number of GPUs on a node.
    """
    rewards = config.rewards
    servers = placement.servers_to_start(rewards) if generates(config) else []
    if not servers or rewards.placement == COLOCATED:
        return
    first = rewards.supervisor.first_device
    if first < ranks:
        raise ConfigError(
            f"rewards.supervisor.first_device={first}: the {ranks} ranks of a node have the GPUs below {ranks}; use "
            f"{ranks} or more, or 0 for judges on nodes of their own"
        )
    hosts = [f"node {number}" for number in range(config.cluster.nodes)]
    try:
        placement.place(servers, hosts, gpus - first)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def ladder_command(command: Submission, recipe: str, arguments: Sequence[str]) -> str:
    """The command that submits all stages of a ladder.

    Args:
        command: that of one of its stages.
        recipe: its name.
        arguments: the overrides of the preflight's command line.

    Raises ConfigError for an override that ``slurm/ladder.sh`` does not take, and NotChecked for a ladder without
    judges' nodes, whose script the user has to make.
    """
    script = f"slurm/{recipe}.sh"
    if command.script != script:
        raise NotChecked(f"give {LADDER} a copy of {script} without the line #SBATCH hetjob and the one after it")
    for argument in arguments:
        if argument.startswith("run_dir="):
            raise ConfigError(f"{argument}: {LADDER} writes to runs/RECIPE/STAGE; leave run_dir out")
        if argument.startswith("stage.ladder="):
            raise ConfigError(f'{argument}: {LADDER} takes the stages from the variable STAGES, "sft rl_safety"')
    of_all = tuple(argument for argument in command.overrides if argument != "stage=ladder")
    nodes = [argument for argument in arguments if argument.startswith("cluster.nodes=")]
    return shlex.join((LADDER, script, *nodes, *of_all))


def ask_slurm(command: Submission) -> str:
    """Check that Slurm would take the command. Nothing is submitted.

    Raises ConfigError if Slurm refuses, and NotChecked if no Slurm answers.
    """
    if shutil.which("sbatch") is None:
        raise NotChecked("this machine has no sbatch; run the preflight on a login node")
    try:
        answer = subprocess.run(
            ["sbatch", "--test-only", *command.options, command.script],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=ANSWER_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise NotChecked(f"sbatch --test-only does not answer within {ANSWER_SECONDS} s; see sinfo") from error
    said = "; ".join(line.removeprefix("sbatch: ") for line in answer.stderr.splitlines())
    if answer.returncode:
        raise ConfigError(f"sbatch refuses this: {said}; options before the script change what the job asks for")
    without_site = "" if "SITE_FILE" in os.environ else "; no site file is sourced in this shell (docs/slurm.md)"
    return said + without_site
