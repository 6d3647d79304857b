"""The launches of a command line: a single stage, or the stages of a ladder one after the other.

The module also finds the base model of a stage that continues from an earlier stage.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra import compose
from omegaconf import DictConfig

from recipes.errors import ConfigError
from recipes.launch.pipeline import common_arguments, stage_launch
from recipes.run import records
from recipes.run.folder import is_run

OWN = re.compile(r"\+*preflight[.=]")
# Overrides that differ between the stages of a chain.
OF_A_STAGE = ("stage=", "stage.after=", "stage.ladder=", "run_dir=")


def of_the_run(arguments: Sequence[str]) -> list[str]:
    """The overrides without the preflight's own."""
    return [argument for argument in arguments if not OWN.match(argument)]


def launches(raw: DictConfig, arguments: Sequence[str]) -> list[list[str]]:
    """The command line of each launch, without the preflight's own overrides.

    Finished stages of a resumed ladder are not launched.

    Args:
        raw: the composed configuration of ``arguments``.
        arguments: the overrides of the command line.
    """
    run_arguments = of_the_run(arguments)
    if not raw.stage.ladder:
        return [run_arguments]
    folder = Path(raw.run_dir)
    stage_launches = []
    previous = None
    for name in raw.stage.ladder:
        begun = raw.resume and is_run(folder / name)
        finished = raw.resume and (folder / name / records.FINISHED).is_file()
        given = [*run_arguments, f"resume={begun}"]
        try:
            stage_arguments, _ = stage_launch(name, given, folder, previous)
        except ConfigError:
            # The report of this stage will say what is wrong.
            stage_arguments = common_arguments(name, given, folder)
        # With overwrite=true, the launch moves the ladder's folder aside, and with it the folders of its stages.
        stage_arguments.append(f"overwrite={raw.overwrite}")
        if not finished:
            stage_launches.append(stage_arguments)
        if compose("config", overrides=stage_arguments).stage.evaluates:
            previous = name
    return stage_launches


def base_model(raw: DictConfig, arguments: Sequence[str]) -> str | None:
    """The model that the first stage of this stage's chain starts from. None if this stage has no predecessor.

    Args:
        raw: the composed configuration of the stage.
        arguments: the overrides of the command line. Their ``model.path`` is the model of the first stage.
    """
    if raw.stage.after is None:
        return None
    common = [argument for argument in of_the_run(arguments) if not argument.startswith(OF_A_STAGE)]
    seen = set()
    while raw.stage.after is not None and raw.stage.after not in seen:
        seen.add(raw.stage.after)
        raw = compose("config", overrides=[*common, f"stage={raw.stage.after}"])
    return os.path.normpath(str(raw.model.path))
