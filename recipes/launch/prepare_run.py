"""What a run needs once, before its ranks start: data that fits, the model's folder, an empty run folder."""

import os
import shutil
from pathlib import Path

from recipes.config import Config, generates
from recipes.errors import ConfigError
from recipes.launch.requirements import check_parts, check_servers, check_supervised
from recipes.run import records

# What a run writes into its folder. A run that is not resumed removes it first.
RESULT_FILES = (
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
RESULT_FOLDERS = ("checkpoints", "warm_start", "sft", "hf", "logs")


def prepare_run(config: Config) -> None:
    """Check the data, empty the run's folder unless the run is resumed, and convert the model if it is missing.

    Raises ConfigError.
    """
    run_dir = Path(config.run_dir)
    if config.resume and (run_dir / records.FINISHED).is_file():
        raise ConfigError(
            f"resume=true: {run_dir} is a finished stage of a pipeline, which kept no checkpoint; without resume it "
            "starts over"
        )
    check_supervised(config)
    if generates(config):
        check_parts(config)
        check_servers(config)
    if not config.resume:
        remove_results(run_dir)
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    redirect_stderr(run_dir)
    prepare_model(config)


def remove_results(run_dir: Path) -> None:
    """Remove the files and folders that an earlier run left."""
    for name in RESULT_FILES:
        (run_dir / name).unlink(missing_ok=True)
    for name in RESULT_FOLDERS:
        if (run_dir / name).is_dir():
            shutil.rmtree(run_dir / name)


def redirect_stderr(run_dir: Path) -> None:
    """Send standard error, with the warnings of libraries, to ``logs/launcher.log``. Errors go to standard output."""
    log = os.open(run_dir / "logs" / "launcher.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.close(log)


def prepare_model(config: Config) -> None:
    """Convert the model if its folder is missing. Raises ConfigError when an earlier stage should have written it."""
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
