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
from recipes.config import Config
from recipes.errors import ConfigError
from recipes.preflight import alternatives
from recipes.preflight.report import NotChecked

ROOT = Path(__file__).resolve().parents[2]
SIZE_LINE = "#SBATCH --nodes=N --ntasks-per-node=N --gpus-per-node=N OTHERS"
# The first match in a script is for the trainer's nodes, the second for the judges'.
SIZE = re.compile(
    r"^#SBATCH --nodes=(?P<nodes>\d+) --ntasks-per-node=(?P<ranks>\d+) --gpus-per-node=(?P<gpus>\d+) (?P<others>.+)$",
    re.MULTILINE,
)
# The arguments of a script to its run.
RUN_JOB = re.compile(r'^run_job (.*) "\$@"$', re.MULTILINE)
# Overrides that the scripts make from Slurm's variables.
FROM_SLURM = ("cluster.nodes=", "cluster.ranks=")
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


def needs_slurm(config: Config) -> bool:
    """Whether the run needs GPUs, and is not already in a job."""
    return capabilities(config.cluster.platform).has_gpus and "SLURM_JOB_ID" not in os.environ


def submission(config: Config, recipe: str, arguments: Sequence[str]) -> Submission:
    """The command that submits a run.

    Args:
        config: of the run.
        recipe: its name.
        arguments: the overrides of its command line.

    Raises ConfigError if the recipe has no script.
    """
    script = f"slurm/{recipe}.sh"
    if not (ROOT / script).is_file():
        raise ConfigError(f"{script} does not exist: copy slurm/safework_72b.sh, with recipe={recipe} in its last line")
    text = (ROOT / script).read_text()
    sizes = [match.groupdict() for match in SIZE.finditer(text)]
    if not sizes:
        raise ConfigError(f"{script} has no line of the form {SIZE_LINE}: give it one, as slurm/safework_72b.sh has")
    of_trainer, *of_judges = sizes
    judges = alternatives.judge_nodes(config)
    if judges and not of_judges:
        raise ConfigError(
            f"{script} asks for no nodes for the judges, this run needs {judges}: see slurm/safework_72b.sh"
        )
    nodes = str(config.cluster.nodes + config.cluster.engine_nodes)
    ranks = str(config.cluster.ranks // config.cluster.nodes)
    # With first_device, servers have the node's other GPUs.
    gpus = of_trainer["gpus"] if config.rewards.supervisor.first_device else ranks
    size = (f"--nodes={nodes}", f"--ntasks-per-node={ranks}", f"--gpus-per-node={gpus}")
    overrides = [argument for argument in arguments if not argument.startswith(FROM_SLURM)]
    if of_judges and not judges:
        options = (*size, *of_trainer["others"].split())
        return Submission(options, "slurm/train.sh", with_those_of_script(text, overrides))
    changed = (nodes, ranks, gpus) != (of_trainer["nodes"], of_trainer["ranks"], of_trainer["gpus"])
    options = size if changed else ()
    if of_judges and str(judges) != of_judges[0]["nodes"]:
        options = (*size, ":", f"--nodes={judges}")
    elif of_judges and changed:
        options = (*size, ":")
    return Submission(options, script, tuple(word for word in overrides if word != f"recipe={recipe}"))


def with_those_of_script(text: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The overrides that a script gives its run, and after them the others of ``overrides``."""
    of_script = RUN_JOB.findall(text)[0].split()
    return (*of_script, *(override for override in overrides if override not in of_script))


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
    return said
