"""The shape of a model: from its folder's config.json, or from conf/model/architectures for a published model."""

import json
from pathlib import Path
from typing import Any

from recipes.errors import ConfigError

ARCHITECTURES = Path(__file__).resolve().parents[2] / "conf" / "model" / "architectures"


def config_file(model_path: str | Path) -> Path:
    """The file that describes the model of ``model.path``: ``config.json`` of its folder, or the published model's.

    Raises ConfigError when there is neither.
    """
    in_folder = Path(model_path) / "config.json"
    if in_folder.is_file():
        return in_folder
    published = published_file(model_path)
    if published.is_file():
        return published
    raise ConfigError(
        f"model.path={str(model_path)!r}: no config.json there, and no {published.name} in conf/model/architectures to "
        "stand in for it: give a Hugging Face folder"
    )


def published_file(model_path: str | Path) -> Path:
    """Where conf/model/architectures would keep a model with this folder's name; the file need not exist."""
    return ARCHITECTURES / f"{Path(model_path).name}.json"


def published_config(model_path: str | Path) -> Any | None:
    """transformers' configuration of the published model with this folder's name, None if it is not kept."""
    from transformers import CONFIG_MAPPING

    file = published_file(model_path)
    if not file.is_file():
        return None
    fields = json.loads(file.read_text())
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def model_config(model_path: str | Path) -> Any:
    """transformers' configuration of the model of ``model.path``, read from :func:`config_file`.

    Raises ConfigError as ``config_file``, and ValueError for a model that is not supported.
    """
    from megatron_ext import hf_checkpoint

    if config_file(model_path) == published_file(model_path):
        return published_config(model_path)
    return hf_checkpoint.config(model_path)
