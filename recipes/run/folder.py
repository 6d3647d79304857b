"""A run's folder: the mark that makes it one, what is a result in it, and how it is moved aside."""

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
# Reward servers write these into the folder before the launch that they are for.
OF_SERVERS = {"servers", "events.jsonl"}
# What a launch leaves that has not made a result yet: no answer, no step, no checkpoint. The next launch appends to
# these files, or keeps them under another name.
WITHOUT_RESULTS = {*OF_SERVERS, MARK, records.CONFIG, "environment.json", "logs", "tensorboard", "wandb"}
FORMER_CONFIG = re.compile(r"config\.\d+\.yaml")


def is_run(folder: Path) -> bool:
    """Whether a launch has made this folder a run's."""
    return (folder / MARK).is_file()


def run_id(folder: Path) -> str:
    """The identifier of the folder's run."""
    return json.loads((folder / MARK).read_text())["id"]


def mark(folder: Path) -> None:
    """Make the folder a run's."""
    began = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    records.write_json(folder / MARK, {"id": uuid.uuid4().hex, "began": began})


def write_settings(folder: Path, config: Config) -> None:
    """Write config.yaml, unless it has these settings already. The former one is kept as config.1.yaml, ….2.yaml, …"""
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
    """Names in a folder that is no run's which neither a launch nor its servers have put there."""
    return sorted(entry.name for entry in folder.iterdir() if not _is_lock(entry.name) and entry.name not in OF_SERVERS)


def results(folder: Path) -> list[str]:
    """Names of what a run's folder holds beyond ``WITHOUT_RESULTS``: answers, metrics, checkpoints, models, …"""
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
    """Rename the folder to the next free one of ``folder.1``, ``folder.2``, …; returns that.

    Where ``folder`` is a link, the folder that it leads to is renamed, beside itself.
    """
    real = folder.resolve()
    number = 1
    while True:
        target = real.with_name(f"{real.name}.{number}")
        try:
            target.mkdir()  # so that no other process takes the name
        except FileExistsError:
            number += 1
            continue
        try:
            os.rename(real, target)  # in place of the empty folder
        except OSError:
            target.rmdir()
            raise
        return target
