"""A run's folder: the file that marks it as a run's, which of its entries are results, and moving it aside."""

import json
import os
import re
import shutil
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import yaml

from recipes.config import Config
from recipes.config.resume import differences
from recipes.run import lock, records

MARK = "run.json"
# Reward servers write these into the folder before the launch that they serve.
OF_SERVERS = {"servers", "events.jsonl"}
# The entries that a launch leaves before it has a result, that is before an answer, a step or a checkpoint. The next
# launch appends to these files, or keeps them under another name.
WITHOUT_RESULTS = {*OF_SERVERS, MARK, records.CONFIG, "environment.json", "logs", "tensorboard", "wandb"}
FORMER_CONFIG = re.compile(r"config\.\d+\.yaml")


def is_run(folder: Path) -> bool:
    """Whether a launch has marked this folder as a run's."""
    return (folder / MARK).is_file()


def run_id(folder: Path) -> str:
    """The identifier of the folder's run."""
    return json.loads((folder / MARK).read_text())["id"]


def mark(folder: Path) -> None:
    """Mark the folder as a run's."""
    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    records.write_json(folder / MARK, {"id": uuid.uuid4().hex, "began": began})


def write_settings(folder: Path, config: Config) -> None:
    """Write config.yaml, unless it has these settings already.

    The previous file is kept as config.1.yaml, config.2.yaml, …
    """
    path = folder / records.CONFIG
    if path.is_file():
        if not differences(yaml.safe_load(path.read_text()), config):
            return
        number = 1
        while path.with_name(f"config.{number}.yaml").exists():
            number += 1
        shutil.copy2(path, path.with_name(f"config.{number}.yaml"))
    records.write_text(path, yaml.safe_dump(asdict(config), sort_keys=False))


def foreign(folder: Path) -> list[str]:
    """The names of entries that neither a launch nor its servers have put into a folder. The folder is not a run's."""
    return sorted(entry.name for entry in folder.iterdir() if not _is_lock(entry.name) and entry.name not in OF_SERVERS)


def results(folder: Path) -> list[str]:
    """The names of results in a run's folder: answers, metrics, checkpoints, models, … (not ``WITHOUT_RESULTS``)."""
    return sorted(entry.name for entry in folder.iterdir() if _is_result(entry))


def _is_result(entry: Path) -> bool:
    if entry.name in WITHOUT_RESULTS or _is_lock(entry.name) or FORMER_CONFIG.fullmatch(entry.name):
        return False
    if not entry.is_dir():
        return True
    if is_run(entry):  # a pipeline's stage
        return bool(results(entry))
    return any(below.is_file() for below in entry.rglob("*"))


def _is_lock(name: str) -> bool:
    return name.lstrip(".").startswith(lock.PREFIX)


def move_aside(folder: Path) -> Path:
    """Rename the folder to the first free name of ``folder.1``, ``folder.2``, … and return the new path.

    Where ``folder`` is a symbolic link, its target is renamed and stays in the target's parent folder.
    """
    real = folder.resolve()
    number = 1
    while True:
        target = real.with_name(f"{real.name}.{number}")
        try:
            # An empty folder reserves the name, so that no other process takes it.
            target.mkdir()
        except FileExistsError:
            number += 1
            continue
        try:
            os.rename(real, target)  # replaces the empty folder
        except OSError:
            target.rmdir()
            raise
        return target
