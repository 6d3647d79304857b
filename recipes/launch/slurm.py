"""Set torchrun's environment variables from Slurm's, for ranks that ``srun`` has started."""

import os

from recipes.errors import ConfigError

# Slurm gives step numbers from this one on to batch scripts and interactive shells, which are not ranks.
FIRST_SPECIAL_STEP = 0xFFFFFFF0


def adopt_step() -> None:
    """In a task of a Slurm step, set torchrun's variables for ranks and nodes. The job script sets ``MASTER_ADDR``.

    Does nothing outside a step, under torchrun, and in a step of one task without ``MASTER_ADDR`` (``srun --pty
    bash``). Slurm sets SLURM_PROCID in batch scripts and shells too, so that variable alone does not identify a rank.
    Raises ConfigError if a step of several tasks has no ``MASTER_ADDR`` or ``MASTER_PORT``.
    """
    if "RANK" in os.environ or int(os.environ.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP)) >= FIRST_SPECIAL_STEP:
        return
    tasks = int(os.environ["SLURM_STEP_NUM_TASKS"])
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and tasks == 1:
        return
    if missing:
        raise ConfigError(
            f"{missing[0]} is not set in a Slurm step of {tasks} tasks: start it with sbatch slurm/train.sh, or export "
            "MASTER_ADDR (the step's first host) and MASTER_PORT before srun"
        )
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // int(os.environ["SLURM_STEP_NUM_NODES"])),
        "GROUP_RANK": os.environ["SLURM_NODEID"],
        "GROUP_WORLD_SIZE": os.environ["SLURM_STEP_NUM_NODES"],
    }
