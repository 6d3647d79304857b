"""``python -m recipes.launch.has_new_checkpoint FILE recipe=… [overrides…]``: exit code 0 where
 the run has a checkpoint newer than FILE.

A job script asks so when a run has failed: without new progress it would fail at the same place again.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from megatron_ext.checkpoint import COMPLETE, latest
from recipes.config import parse
from recipes.launch.command_line import from_command_line
from recipes.training.stages import WARM_START


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    run_dir = Path(parse(raw).run_dir)
    found = [latest(folder / "checkpoints") for folder in (run_dir, run_dir / WARM_START)]
    written = [(checkpoint / COMPLETE).stat().st_mtime for checkpoint in found if checkpoint]
    sys.exit(int(max(written, default=0.0) <= BEGAN.stat().st_mtime))


if __name__ == "__main__":
    BEGAN = Path(sys.argv.pop(1))
    from_command_line(main)
