"""Prepare a run, once, before its ranks start: check the data, claim the run's folder, write the model's folder."""

import os
from pathlib import Path

from recipes.config import Config, generates
from recipes.errors import ConfigError
from recipes.launch.claim import check_folder, claimed
from recipes.launch.requirements import check_parts, check_servers, check_supervised
from recipes.run.logs import quiet


def prepare_run(config: Config) -> None:
    """Check everything, claim the run's folder, and convert the model if it is missing. Raises ConfigError."""
    check_run(config)
    with claimed(config):
        redirect_stderr(Path(config.run_dir))
        prepare_model(config)


def check_run(config: Config) -> None:
    """Check the run's folder, the data and the servers, without writing anything. Raises ConfigError."""
    check_folder(config)
    # Checking an algorithm's parts imports libraries that print warnings.
    with quiet():
        check_supervised(config)
        if generates(config):
            check_parts(config)
            check_servers(config)


def redirect_stderr(run_dir: Path) -> None:
    """Send standard error, with the warnings of libraries, to ``logs/launcher.log``. Errors go to standard output."""
    log = os.open(run_dir / "logs" / "launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.close(log)


def prepare_model(config: Config) -> None:
    """Convert the model if its folder is missing. Raises ConfigError if an earlier stage should have written it."""
    if (Path(config.model.path) / "config.json").is_file():
        return
    if config.stage.after is not None:
        raise ConfigError(
            f"model.path={config.model.path!r}: stage {config.stage.name} starts from what stage "
            f"{config.stage.after} leaves there; run that first, or give model.path"
        )
    # The model's libraries and the display take seconds to import.
    from recipes.launch.prepare_model import prepare
    from recipes.run.display import Display

    with Display() as display, display.stage(f"model: {config.model.path}"):
        prepare(config.model)
