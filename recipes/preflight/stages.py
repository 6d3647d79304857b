"""The stages that a command line launches: one, or those of a ladder; and the model that a later stage starts from."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig

from recipes.errors import ConfigError
from recipes.launch.pipeline import common_arguments, stage_launch

OWN = re.compile(r"\+*preflight[.=]")
# What one stage of a chain has and another has not.
OF_A_STAGE = ("stage=", "stage.after=", "stage.ladder=", "run_dir=")


def launches(raw: DictConfig, arguments: Sequence[str]) -> list[list[str]]:
    """The command line of each launch, without the preflight's own overrides.

    Args:
        raw: the composed configuration of ``arguments``.
        arguments: the overrides of the command line.
    """
    of_the_run = [argument for argument in arguments if not OWN.match(argument)]
    if not raw.stage.ladder:
        return [of_the_run]
    folder = Path(raw.run_dir)
    command_lines = []
    previous = None
    for name in raw.stage.ladder:
        try:
            stage_arguments, _ = stage_launch(name, of_the_run, folder, previous)
        except ConfigError:
            # Its own report says what is wrong.
            stage_arguments = common_arguments(name, of_the_run, folder)
        command_lines.append(stage_arguments)
        if compose("config", overrides=stage_arguments).stage.evaluates:
            previous = name
    return command_lines


def base_model(raw: DictConfig, arguments: Sequence[str]) -> str | None:
    """The model that the first of the stages before this one starts from; None if this stage has no predecessor.

    Args:
        raw: the composed configuration of ``arguments``.
        arguments: the overrides of the stage.
    """
    if raw.stage.after is None:
        return None
    common = [argument for argument in arguments if not argument.startswith(OF_A_STAGE)]
    seen = set()
    while raw.stage.after is not None and raw.stage.after not in seen:
        seen.add(raw.stage.after)
        raw = compose("config", overrides=[*common, f"stage={raw.stage.after}"])
    return os.path.normpath(str(raw.model.path))
