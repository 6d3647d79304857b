"""``python -m recipes.prepare recipe=… [overrides…]``: prepare a run before its ranks start.

``recipes.train`` prepares the run itself before it forks the ranks. A Slurm script calls this program before ``srun``.
"""

import sys

import hydra
from omegaconf import DictConfig

from recipes.command_line import from_command_line
from recipes.config import parse
from recipes.errors import ConfigError
from recipes.launch.prepare_run import prepare_run


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        prepare_run(parse(raw))
    except ConfigError as error:
        # Standard error may be a log file by now.
        print(f"error: {error}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    from_command_line(main)
