"""Where a run's metrics go beside metrics.jsonl: wandb and TensorBoard, each by the configuration."""

import netrc
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.config import Config

# Takes a row of metrics.jsonl and, for a part of a run with steps of its own, the part's name with a slash behind it.
type Logger = Callable[[Mapping[str, Any], str], None]


def open_loggers(config: Config, run_dir: Path, run_id: str, stack: ExitStack) -> list[Logger]:
    """Those that ``logger`` asks for; ``stack`` closes them."""
    loggers: list[Logger] = []
    if config.logger.wandb_project:
        loggers.append(_open_wandb(config, run_dir, run_id, stack))
    if config.logger.tensorboard:
        loggers.append(_open_tensorboard(run_dir / "tensorboard", stack))
    return loggers


def _open_wandb(config: Config, run_dir: Path, run_id: str, stack: ExitStack) -> Logger:
    """Offline without a key, unless WANDB_MODE says what to do."""
    import wandb

    mode = None if "WANDB_MODE" in os.environ or _has_wandb_key() else "offline"
    run = wandb.init(
        project=config.logger.wandb_project,
        name=config.recipe.name,
        dir=run_dir,
        config=asdict(config),
        mode=mode,
        id=run_id,
        resume="allow",
    )
    stack.callback(run.finish)
    seen: set[str] = set()

    def log(row: Mapping[str, Any], part: str) -> None:
        if part not in seen:  # wandb's own steps only rise; a part begins with 1 again
            seen.add(part)
            run.define_metric(f"{part}*", step_metric=f"{part}step")
        run.log({f"{part}{key}": value for key, value in row.items()})

    return log


def _open_tensorboard(folder: Path, stack: ExitStack) -> Logger:
    """An event file of scalars for each launch of the run."""
    from tensorboardX import SummaryWriter

    writer = stack.enter_context(SummaryWriter(str(folder)))

    def log(row: Mapping[str, Any], part: str) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                writer.add_scalar(f"{part}{key}", value, row["step"])
        writer.flush()

    return log


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
