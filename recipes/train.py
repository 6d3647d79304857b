"""Entry point: ``python -m recipes.train recipe=demo [overrides…]``.

Called plainly it checks the configuration, prepares the model and becomes ``torchrun`` with ``cluster.ranks`` processes of
itself; under torchrun or srun each process is one rank of the run.
"""

import os
import shutil
import sys
import traceback
from pathlib import Path

import hydra
from omegaconf import DictConfig

from recipes.config import Config, ConfigError, parse

RESULTS = ("metrics.jsonl", "samples.jsonl", "answers.json", "evaluation.json", "report.html", "sft.json")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        config = parse(raw)
        if "RANK" not in os.environ and "SLURM_PROCID" not in os.environ:
            launch(config)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    run(config)


def launch(config: Config) -> None:
    """Become torchrun: same arguments, ``cluster.ranks`` processes. Never returns."""
    from recipes.data.prompts import load_rows, mixed
    from recipes.display import Display
    from recipes.prepare_model import prepare

    load_rows(config.data.evaluation)
    mixed(load_rows(config.data.prompts), config.data.mix, 0, config.algorithm.prompts_per_step, config.seed)
    run_dir = Path(config.run_dir)
    if not config.resume:
        for name in (*RESULTS, "checkpoints", "sft", "hf", "logs"):
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    # Library warnings go to a file; failures are printed on standard output by ``run``.
    log = os.open(run_dir / "logs" / "launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    if not (Path(config.model.path) / "config.json").is_file():
        with Display() as display, display.stage(f"model: {config.model.path}"):
            prepare(config.model)
    os.environ["OMP_NUM_THREADS"] = str(config.cluster.threads)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(config.cluster.ranks)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "recipes.train", *sys.argv[1:]])


def run(config: Config) -> None:
    """One rank of the run. A failure is told in one line on standard output; its traceback is in the rank's log."""
    from megatron_ext import platform

    platform.activate(config.cluster.platform)

    from recipes.session import open_session
    from recipes.stages import run_stages

    try:
        with open_session(config) as session:
            run_stages(session)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}\n(rank {os.environ.get('RANK', '?')}; logs in {config.run_dir}/logs)", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
