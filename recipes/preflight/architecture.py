"""The architecture of a model, from its folder's config.json or, for a published model, conf/model/architectures."""

import json
from pathlib import Path
from typing import Any

from recipes.errors import ConfigError

ARCHITECTURES = Path(__file__).resolve().parents[2] / "conf" / "model" / "architectures"


def config_file(model_path: str | Path) -> Path:
    """The file that describes the architecture of the model in ``model_path``.

    This is ``config.json`` of the folder or, without one, the file of the published model with the folder's name.
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
    """The path in conf/model/architectures for a model with this folder's name. The file need not exist."""
    return ARCHITECTURES / f"{Path(model_path).name}.json"


def published_config(model_path: str | Path) -> Any | None:
    """transformers' configuration of the published model with this folder's name, or None if it has no file."""
    from transformers import CONFIG_MAPPING

    file = published_file(model_path)
    if not file.is_file():
        return None
    fields = json.loads(file.read_text())
    return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)


def model_config(model_path: str | Path) -> Any:
    """transformers' configuration of the model in ``model_path``, read from :func:`config_file`.

    Raises ConfigError like ``config_file``, and ValueError for a model that is not supported.
    """
    from megatron_ext import hf_checkpoint

    if config_file(model_path) == published_file(model_path):
        return published_config(model_path)
    return hf_checkpoint.config(model_path)
