"""Finds a run's checkpoints and exports them as Hugging Face folders."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from megatron_ext import checkpoint_export, hf_checkpoint, scalar_head
from megatron_ext.checkpoint import COMPLETE
from megatron_ext.hf_checkpoint import Layout
from megatron_ext.precision import DTYPES
from megatron_ext.scalar_head import Head
from recipes.config.stages import learned_principles
from recipes.errors import ConfigError
from recipes.run import records


def find_checkpoint(folder: Path, step: str | None) -> Path:
    """The complete checkpoint of a run (or of a part of it) after ``step`` steps, by default the newest.

    Raises ConfigError where there is none. The error lists the steps of the complete checkpoints.
    """
    complete = complete_steps(folder)
    if not complete:
        parts = [part for part in sorted(folder.glob("*")) if complete_steps(part)]
        elsewhere = "".join(f"; run={part} has {_list(complete_steps(part))}" for part in parts)
        raise ConfigError(f"run={folder}: no complete checkpoint in {folder / 'checkpoints'}{elsewhere}")
    if step is None:
        return complete[max(complete)]
    if step.isdecimal() and int(step) in complete:
        return complete[int(step)]
    why = "no such checkpoint"
    if step.isdecimal() and (folder / "checkpoints" / f"step_{int(step):06d}").is_dir():
        why = "this checkpoint is not complete, its save was interrupted or is under way"
    raise ConfigError(f"step={step}: {why}; run={folder} has {_list(complete)}")


def complete_steps(folder: Path) -> dict[int, Path]:
    """Step → folder of the complete checkpoint, for a run or a part of it."""
    marks = sorted(folder.glob(f"checkpoints/step_*/{COMPLETE}"))
    return {int(mark.parent.name.removeprefix("step_")): mark.parent for mark in marks}


def default_target(checkpoint: Path) -> Path:
    """The default folder of a checkpoint's export: ``export/step_…`` in the folder of the run or its part."""
    return checkpoint.parents[1] / "export" / checkpoint.name


def export(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint of a run to the Hugging Face folder ``target``, which appears only when it is complete.

    Raises ConfigError when the target or the partial folder of an interrupted export exists, when the disk has too
    little space, or when the run's configuration or model folder is gone. Raises CheckpointError for a damaged
    checkpoint.
    """
    layout = layout_of(read_config(checkpoint.parents[1]))
    unfinished = target.with_name(f"{target.name}.partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"to={target}: is there already, and nothing is overwritten; give another folder")
    if unfinished.exists():
        raise ConfigError(f"to={target}: {unfinished} is there, of an export that was interrupted or runs; remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(hf_checkpoint.tensor_bytes(header) for header in layout.headers.values())
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise ConfigError(f"to={target}: needs {needed / 1e9:.2f} GB, free are {free / 1e9:.2f} GB; give another disk")
    unfinished.mkdir()
    try:
        checkpoint_export.export(checkpoint, layout, unfinished)
        # rename replaces an empty folder of this name.
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a run's ``config.yaml``. ``folder`` is that of the run or of a part of it.

    Raises ConfigError where there is no ``config.yaml``.
    """
    for run_dir in (folder, folder.parent):
        stored = run_dir / records.CONFIG
        if stored.is_file():
            return yaml.safe_load(stored.read_text())
    raise ConfigError(f"run={folder}: no config.yaml there; give the folder of a run, such as runs/demo")


def layout_of(config: dict[str, Any]) -> Layout:
    """The layout of an export of a run's checkpoints. ``config`` is the run's configuration.

    Raises ConfigError where the model folder that the run began with is gone.
    """
    dtype = getattr(torch, DTYPES[config["precision"]["name"]])
    try:
        return hf_checkpoint.export_layout(config["model"]["path"], dtype, trained_head(config["stage"]))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{error}; an export takes configuration, tokenizer and names of tensors from where the run began"
        ) from error


def trained_head(stage: Mapping[str, Any]) -> Head | None:
    """The scalar head that a stage (``stage`` of a configuration) trains, or None for a language model."""
    if "reward_model" in stage["trains"]:
        return scalar_head.REWARD
    if "value_model" in stage["trains"]:
        return scalar_head.value_head(list(learned_principles(stage["value_model"]["principles"])))
    return None


def _list(steps: dict[int, Path]) -> str:
    return f"step {', '.join(map(str, steps))}"
