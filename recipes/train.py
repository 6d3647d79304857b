"""Entry point: ``python -m recipes.train recipe=demo [overrides…]``.

Called plainly it checks the configuration, prepares the model and forks ``cluster.ranks`` ranks; under torchrun or srun
each process is one rank of the run.
"""

import contextlib
import gc
import os
import shutil
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from megatron_ext.processes import die_with
from recipes.config import Config, generates, parse
from recipes.errors import ConfigError
from recipes.launch import launcher
from recipes.launch.command_line import from_command_line
from recipes.launch.requirements import check_parts, check_servers, check_supervised
from recipes.launch.slurm import adopt_step
from recipes.run import preemption, records

RESULTS = (
    "metrics.jsonl",
    "samples.jsonl",
    "events.jsonl",
    "answers.json",
    "evaluation.json",
    "report.html",
    "reward_model.json",
    "judge.json",
    records.FINISHED,
)
FAILED = "failed"  # in logs/, once a rank has


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    preemption.listen()
    try:
        config = parse(raw)
        adopt_step()
        if config.stage.ladder:
            from recipes.launch.pipeline import run_pipeline

            run_pipeline(config, sys.argv[1:])
            return
        if "RANK" not in os.environ:
            launch(config)
    except ConfigError as error:
        print(f"error: {error}", flush=True)  # standard error may be a log file by now
        sys.exit(1)
    run(config)


def prepare_run(config: Config) -> None:
    """Check the data, make the model's folder, and empty the run's folder unless it is resumed. Raises ConfigError."""
    from recipes.launch.prepare_model import prepare
    from recipes.run.display import Display

    run_dir = Path(config.run_dir)
    if config.resume and (run_dir / records.FINISHED).is_file():
        raise ConfigError(
            f"resume=true: a ladder finished {run_dir} and kept no checkpoint; without resume it begins anew"
        )
    check_supervised(config)
    if generates(config):
        check_parts(config)
        check_servers(config)
    if not config.resume:
        for name in (*RESULTS, "checkpoints", "warm_start", "sft", "hf", "logs"):
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    log_to_file(run_dir)
    if not (Path(config.model.path) / "config.json").is_file():
        if config.stage.after is not None:
            raise ConfigError(
                f"model.path={config.model.path!r}: stage {config.stage.name} starts from what stage "
                f"{config.stage.after} leaves there; run that first, or give model.path"
            )
        with Display() as display, display.stage(f"model: {config.model.path}"):
            prepare(config.model)


def log_to_file(run_dir: Path) -> None:
    """Library warnings go to ``launcher.log``; failures are printed on standard output by ``run``."""
    log = os.open(run_dir / "logs" / "launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.close(log)


def launch(config: Config) -> None:
    """Prepare the run and fork ``cluster.ranks`` ranks, in each of which this returns; this process ends with them."""
    os.environ["OMP_NUM_THREADS"] = str(config.cluster.threads)  # before torch is imported
    launcher.in_a_child(partial(prepare_run, config))
    log_to_file(Path(config.run_dir))
    if config.cluster.platform == "cpu":  # CUDA, which imports may touch, bears no fork
        load(config)
    launcher.fork_ranks(config.cluster.ranks)


def load(config: Config) -> None:
    """Import what a rank needs, for the platform of its model."""
    from megatron_ext import platform

    platform.activate(config.cluster.platform)

    import recipes.training.stages  # noqa: F401

    gc.freeze()  # a garbage collection that goes through all that was imported stops every rank for most of a second


def run(config: Config) -> None:
    """One rank of the run. The first rank's failure is told in one line on standard output, tracebacks are in the logs.

    A run that is told to end by SIGUSR1 ends with ``preemption.EXIT_CODE`` when it has saved.
    """
    die_with(os.getppid())  # the launcher, torchrun or srun
    say_why_on_sigterm(config)
    if os.environ["RANK"] == "0":  # each launch begins here, under torchrun and srun too
        (Path(config.run_dir) / "logs" / FAILED).unlink(missing_ok=True)
    load(config)

    from recipes.training.session import open_session
    from recipes.training.stages import run_stage

    terminal = os.fdopen(os.dup(1), "w")  # open_session sends the output of all ranks but one to their logs
    try:
        with open_session(config) as session:
            run_stage(session)
    except preemption.Preempted as news:
        print(f"{news}; go on with resume=true", flush=True)
        sys.exit(preemption.EXIT_CODE if os.environ["RANK"] == "0" else 0)  # srun kills the others at the first 75
    except Exception as error:
        if fails_first(config):
            logs = f"(rank {os.environ.get('RANK', '?')}; logs in {config.run_dir}/logs)"
            print(f"error: {error}\n{logs}", file=terminal, flush=True)
        traceback.print_exc()  # last: the log may be on the disk that is full
        sys.exit(1)


def fails_first(config: Config) -> bool:
    """Whether no other rank has failed in this launch: most failures are all ranks', or follow from the first one."""
    try:
        (Path(config.run_dir) / "logs" / FAILED).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk, say
        pass
    return True


def say_why_on_sigterm(config: Config) -> None:
    """Ranks are ended with SIGTERM on Ctrl-C and when one of them dies (out of memory, say): tell so."""

    from recipes.run.records import event

    def handler(number: int, frame: object) -> None:
        print(
            f"error: stopped by SIGTERM (Ctrl-C, or another rank died); see {config.run_dir}/logs/launcher.log",
            flush=True,
        )
        with contextlib.suppress(OSError):
            event(Path(config.run_dir), "stop", why="SIGTERM")
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    if os.environ.get("RANK") == "0":
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    from_command_line(main)
