"""wandb and TensorBoard loggers, which get the rows of metrics.jsonl when the settings ``logger`` enable them."""

import netrc
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.config import Config

# Takes a row of metrics.jsonl and a prefix of its keys. The prefix is empty, or "warm_start/" for the SFT before RL,
# whose steps are counted separately.
type Logger = Callable[[Mapping[str, Any], str], None]


def open_loggers(config: Config, run_dir: Path, run_id: str, stack: ExitStack) -> list[Logger]:
    """Open the loggers that the configuration enables. ``stack`` closes them."""
    loggers: list[Logger] = []
    if config.logger.wandb_project:
        loggers.append(_open_wandb(config, run_dir, run_id, stack))
    if config.logger.tensorboard:
        loggers.append(_open_tensorboard(run_dir / "tensorboard", stack))
    return loggers


def _open_wandb(config: Config, run_dir: Path, run_id: str, stack: ExitStack) -> Logger:
    """Open a wandb run. Without an API key it writes offline, unless WANDB_MODE is set."""
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
    prefixes: set[str] = set()

    def log(row: Mapping[str, Any], prefix: str) -> None:
        # wandb's step counter only rises, but the steps of each prefix begin with 1. So each prefix has its own step
        # metric.
        if prefix not in prefixes:
            prefixes.add(prefix)
            run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")
        run.log({f"{prefix}{key}": value for key, value in row.items()})

    return log


def _open_tensorboard(folder: Path, stack: ExitStack) -> Logger:
    """Open TensorBoard. Each launch of the run writes one event file of scalars."""
    from tensorboardX import SummaryWriter

    writer = stack.enter_context(SummaryWriter(str(folder)))

    def log(row: Mapping[str, Any], prefix: str) -> None:
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)):
                writer.add_scalar(f"{prefix}{key}", value, row["step"])
        writer.flush()

    return log


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
