"""Whether a run has a checkpoint that is newer than a file: exit code 0 if so, else 1.

``python -m recipes.launch.has_new_checkpoint FILE recipe=… [overrides…]``. A job script calls it when a run has failed:
without a new checkpoint the run would fail at the same place again. It prints what NCCL or CUDA left in the logs.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from megatron_ext.checkpoint import COMPLETE, latest
from recipes.command_line import from_command_line
from recipes.config import parse
from recipes.run import failure
from recipes.training.stages import WARM_START


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    run_dir = Path(parse(raw).run_dir)
    if message := failure.from_logs(run_dir / "logs"):
        print(f"error: {message}", flush=True)
    newest = 0.0
    for folder in (run_dir, run_dir / WARM_START):
        checkpoint = latest(folder / "checkpoints")
        if checkpoint:
            newest = max(newest, (checkpoint / COMPLETE).stat().st_mtime)
    sys.exit(0 if newest > REFERENCE_FILE.stat().st_mtime else 1)


if __name__ == "__main__":
    REFERENCE_FILE = Path(sys.argv.pop(1))
    from_command_line(main)
