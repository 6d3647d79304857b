"""Take a run's folder for a launch, without deleting or overwriting anything.

``python -m recipes.launch.claim recipe=… [overrides…]``: what a job script does before it starts the reward servers,
whose logs go into the folder.
"""

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hydra
import yaml
from omegaconf import DictConfig

from recipes.command_line import from_command_line
from recipes.config import Config, parse
from recipes.config.resume import Difference, check_resume
from recipes.errors import ConfigError
from recipes.run import folder as run_folder
from recipes.run import lock, records

MARK_SECONDS = 60.0  # a shared file system may show a new file to other hosts later


@contextmanager
def claimed(config: Config) -> Iterator[None]:
    """Create, mark and lock the run's folder, and hold the lock during the block.

    With ``overwrite`` the folder of another run is moved aside. Raises ConfigError if the folder can't be used.
    """
    folder = Path(config.run_dir)
    check_folder(config)
    with _errors_of_the_disk(config):
        folder.mkdir(parents=True, exist_ok=True)
        own = lock.take(folder)
    try:
        # Another launch may have used it in the meantime.
        changes = check_folder(config, own)
        with _errors_of_the_disk(config):
            if run_folder.is_run(folder) and not _may_begin(folder, config):
                own = _make_room(folder, own)
            if not run_folder.is_run(folder):
                run_folder.mark(folder)
            (folder / "logs").mkdir(exist_ok=True)
        for change in changes:
            print(f"resume: {change}", flush=True)
        yield
    finally:
        lock.release(own)


@contextmanager
def held_by_rank(config: Config) -> Iterator[Path]:
    """Lock the run's folder in rank 0, if no launcher holds it, and yield the lock.

    ``recipes.prepare`` must have claimed the folder before. Raises ConfigError if it has not.
    """
    folder = Path(config.run_dir)
    with _errors_of_the_disk(config):
        if not run_folder.is_run(folder) or not _may_begin(folder, config):
            raise ConfigError(
                f"run_dir={config.run_dir!r}: is not prepared for this launch; before srun or torchrun call once "
                "`python -m recipes.prepare` with the same overrides"
            )
        own = lock.take(folder)
    try:
        check_folder(config, own)
        yield own
    finally:
        lock.release(own)


def wait_for_mark(config: Config) -> None:
    """Wait until this host sees the mark in the run's folder.

    This is for the ranks other than 0, which write logs into the folder. Raises ConfigError if the mark does not appear
    within ``MARK_SECONDS``. Exits if rank 0 refuses the folder.
    """
    folder = Path(config.run_dir)
    deadline = time.monotonic() + MARK_SECONDS
    while not run_folder.is_run(folder):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"run_dir={str(folder)!r}: {socket.gethostname()} sees no run there; it must be on a file system that "
                "all nodes share, and prepared by `python -m recipes.prepare`"
            )
        time.sleep(0.2)
    if not _may_begin(folder, config):
        sys.exit(1)  # rank 0 says why


def _may_begin(folder: Path, config: Config) -> bool:
    """Whether a launch may begin in a run's folder without moving anything aside."""
    return config.resume or not run_folder.results(folder)


def check_folder(config: Config, own: Path | None = None) -> list[Difference]:
    """Check that the launch, whose lock is ``own``, can use the run's folder. Writes nothing to it.

    Returns the settings in which a resumed run differs from its stored configuration. Raises ConfigError if the launch
    can't use the folder.
    """
    folder = Path(config.run_dir)
    where = f"run_dir={config.run_dir!r}"
    with _errors_of_the_disk(config):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{where}: is a file; give a folder, which is made where it does not exist")
        empty = not folder.is_dir() or not any(folder.iterdir())
        if empty or not run_folder.is_run(folder):
            others = [] if empty else run_folder.foreign(folder)
            if others:
                raise ConfigError(
                    f"{where}: holds {_some(others)}, but no {run_folder.MARK}, by which a run's folder is known; "
                    "give a new or an empty folder"
                )
            if config.resume:
                raise ConfigError(
                    f"resume=true: {where} holds no run; start it without resume=true, or correct run_dir"
                )
            return []
        lock.check(folder, own)
        if config.resume:
            return _check_resumed(folder, config)
        results = run_folder.results(folder)
    if results and not config.overwrite:
        raise ConfigError(
            f"{where}: holds a run with results ({_some(results)}). resume=true goes on with it, run_dir=OTHER leaves "
            f"it alone, overwrite=true renames it ({folder.name}.1, or the next free number) and begins anew"
        )
    return []


def _check_resumed(folder: Path, config: Config) -> list[Difference]:
    if (folder / records.FINISHED).is_file():
        raise ConfigError(
            f"resume=true: {folder} is a finished stage of a pipeline, which kept no checkpoint; overwrite=true moves "
            "it aside and starts over"
        )
    return changes_of(folder, config)


def changes_of(folder: Path, config: Config) -> list[Difference]:
    """The settings in which ``config`` differs from the configuration that the folder's run stored.

    Empty for a run that ended before it wrote its configuration. Raises ConfigError if the differences would make the
    run another experiment.
    """
    stored = folder / records.CONFIG
    return check_resume(yaml.safe_load(stored.read_text()), config) if stored.is_file() else []


def _make_room(folder: Path, own: Path) -> Path:
    """Move a run's folder aside, with the lock ``own`` in it. Return the lock of a new folder in its place."""
    target = run_folder.move_aside(folder)
    print(f"overwrite=true: the former {folder} is {target} now", flush=True)
    lock.release(target / own.name)
    folder.resolve().mkdir(parents=True, exist_ok=True)
    return lock.take(folder)


@contextmanager
def _errors_of_the_disk(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or config.run_dir
        raise ConfigError(
            f"run_dir={config.run_dir!r}: can't be used: {place}: {error.strerror}; give a folder that you may write to"
        ) from error


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


@hydra.main(version_base="1.3", config_path="../../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        with claimed(parse(raw)):
            pass
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    from_command_line(main)
