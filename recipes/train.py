"""Entry point: ``python -m recipes.train recipe=demo [overrides…]``.

Without a launcher, the program prepares the run and forks its ranks (``cluster.ranks``, and those of the engines'
nodes). Under torchrun or srun each process is already one rank of the run, which ``recipes.prepare`` has prepared.
"""

import contextlib
import gc
import os
import signal
import socket
import sys
import traceback
from functools import partial
from pathlib import Path

import hydra
from omegaconf import DictConfig

from megatron_ext.platform import capabilities
from megatron_ext.processes import die_with
from recipes.command_line import from_command_line
from recipes.config import Config, job_processes, parse
from recipes.errors import ConfigError
from recipes.launch import launcher
from recipes.launch.claim import claimed, held_by_rank, wait_for_mark
from recipes.launch.prepare_run import check_run, prepare_model, redirect_stderr
from recipes.launch.slurm import adopt_step
from recipes.run import failure, preemption, records, watchdog
from recipes.run.lock import release


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Run the pipeline of stages, or a single stage. A single stage runs with all its ranks, or as one of its ranks."""
    preemption.listen()
    try:
        config = parse(raw)
        adopt_step()
        if config.stage.ladder:
            # Imported here, since single stages do not need it.
            from recipes.launch.pipeline import run_pipeline

            run_pipeline(config, sys.argv[1:])
            return
        with contextlib.ExitStack() as stack:
            lock = None
            check_processes(config)
            if "RANK" not in os.environ:
                launch(config)
            elif os.environ["RANK"] == "0":
                lock = stack.enter_context(held_by_rank(config))
            else:
                wait_for_mark(config)
            run(config, lock)
    except ConfigError as error:
        # Standard error may be a log file by now.
        print(f"error: {error}", flush=True)
        sys.exit(1)


def launch(config: Config) -> None:
    """Prepare the run and fork its ranks.

    Returns in each rank. The launching process holds the lock of the run's folder until the ranks have ended, and then
    exits.
    """
    # torch reads this variable when it is imported.
    os.environ["OMP_NUM_THREADS"] = str(config.cluster.threads)
    launcher.run_in_child(partial(check_run, config))
    with claimed(config):
        redirect_stderr(Path(config.run_dir))
        launcher.run_in_child(partial(prepare_model, config))
        if capabilities(config.cluster.platform).can_fork_after_imports:
            load(config)
        try:
            nodes = 1
            if config.cluster.engine_nodes:
                # All ranks are on this machine, but are numbered as if the job had its nodes.
                nodes = config.cluster.nodes + config.cluster.engine_nodes
            launcher.fork_ranks(job_processes(config), nodes)
        except SystemExit as ended:
            # Only the launcher gets here, after the ranks have ended.
            message = failure.from_logs(Path(config.run_dir) / "logs") if ended.code else None
            if message is not None:
                print(f"error: {message}", flush=True)
            raise


def check_processes(config: Config) -> None:
    """Raises ConfigError where the job's nodes or processes do not match the settings with ``cluster.engine_nodes``."""
    engine_nodes = config.cluster.engine_nodes
    if not engine_nodes:
        return
    wanted = (config.cluster.nodes + engine_nodes, job_processes(config))
    if "RANK" not in os.environ:
        if capabilities(config.cluster.platform).has_gpus:
            raise ConfigError(
                f"cluster.engine_nodes={engine_nodes}: on GPUs engines' nodes are machines of their own: start the job "
                "with sbatch or torchrun, or use cluster.engine_nodes=0"
            )
        return
    rank = int(os.environ["RANK"])
    node = int(os.environ["GROUP_RANK"])
    if rank // int(os.environ["LOCAL_WORLD_SIZE"]) != node:
        raise ConfigError(
            f"cluster.engine_nodes={engine_nodes}: rank {rank} is on node {node}, but the trainer's ranks have to be "
            "on the first nodes, in order; use srun --distribution=block (SLURM_DISTRIBUTION)"
        )
    given = (int(os.environ["GROUP_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"]))
    if given != wanted:
        raise ConfigError(
            f"cluster.nodes={config.cluster.nodes}, cluster.engine_nodes={engine_nodes}, cluster.ranks="
            f"{config.cluster.ranks}: these are {wanted[1]} processes on {wanted[0]} nodes, the job has {given[1]} on "
            f"{given[0]}; give cluster.engine_nodes to the job script as an argument, so that it counts the trainer's"
        )


def load(config: Config) -> None:
    """Activate the platform and import what a rank needs."""
    from megatron_ext import platform

    platform.activate(config.cluster.platform)

    import recipes.training.stages  # noqa: F401

    # Without this, a garbage collection scans all imported modules, which takes most of a second on each rank.
    gc.freeze()


def run(config: Config, lock: Path | None = None) -> None:
    """Run one rank. The first rank to fail prints its error to standard output. Tracebacks go to the logs.

    ``lock`` is the lock of the run's folder, where this rank holds it instead of a launcher. After a preemption
    request, rank 0 exits with ``preemption.EXIT_CODE`` once the run has saved its checkpoint.
    """
    # The parent is the launcher, torchrun or srun.
    die_with(os.getppid())
    is_first = os.environ["RANK"] == "0"
    if is_first:
        report_sigterm(config, lock)
        # An earlier launch may have left this file. It is removed here, since srun and torchrun do not call launch().
        (Path(config.run_dir) / "logs" / failure.FAILED).unlink(missing_ok=True)
    load(config)

    from recipes.training import engine_node
    from recipes.training.setup import open_training
    from recipes.training.stages import run_stage

    # The output of all ranks but one is redirected to their logs; errors go to the terminal.
    terminal = os.fdopen(os.dup(1), "w")
    try:
        if int(os.environ["RANK"]) >= config.cluster.ranks:
            engine_node.serve(config)
            return
        with open_training(config) as training:
            run_stage(training)
    except preemption.Preempted as preempted:
        print(f"{preempted}; go on with resume=true", flush=True)
        # srun would kill the other ranks as soon as one of them ended with an error.
        sys.exit(preemption.EXIT_CODE if is_first else 0)
    except Exception as error:
        if fails_first(config):
            place = failure.Place(int(os.environ["RANK"]), socket.gethostname(), watchdog.phase())
            text = failure.explain(str(error), place) or str(error)
            print(f"error: {text}\n(rank {place.rank}; logs in {config.run_dir}/logs)", file=terminal, flush=True)
        # Last, since the log may be on a full disk.
        traceback.print_exc()
        sys.exit(1)


def fails_first(config: Config) -> bool:
    """Whether no other rank of this launch has failed before. Only the first rank to fail prints its error.

    Most failures hit all ranks, or follow from the first failure.
    """
    try:
        (Path(config.run_dir) / "logs" / failure.FAILED).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        # On a full disk nobody can tell, so each rank prints its error.
        return True
    return True


def report_sigterm(config: Config, lock: Path | None = None) -> None:
    """On SIGTERM, print an error, record an event and release the ``lock``.

    Ranks get SIGTERM after Ctrl-C or the death of another rank.
    """

    def handler(number: int, frame: object) -> None:
        log = f"{config.run_dir}/logs/launcher.log"
        print(f"error: stopped by SIGTERM (Ctrl-C, or another rank died); see {log}", flush=True)
        with contextlib.suppress(OSError):
            records.event(Path(config.run_dir), "stop", why="SIGTERM")
        if lock is not None:
            release(lock)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    from_command_line(main)
