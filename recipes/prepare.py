"""``python -m recipes.prepare recipe=… [overrides…]``: what a run needs once, before its ranks start.

``recipes.train`` does this itself before it becomes torchrun; a Slurm script calls it before ``srun``.
"""

import os
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig

from recipes.config import ConfigError, parse
from recipes.train import one_line, prepare_run


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        prepare_run(parse(raw))
    except ConfigError as error:
        print(f"error: {error}", flush=True)  # standard error may be a log file by now
        sys.exit(1)


if __name__ == "__main__":
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines
    try:
        main()
    except HydraException as error:
        print(f"error: {one_line(error)}", flush=True)
        sys.exit(1)
