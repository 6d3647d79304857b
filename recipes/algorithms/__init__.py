"""RL algorithms, one module each: ``advantages`` and ``token_loss``, pure functions; chosen by ``algorithm.name``."""

import importlib
from types import ModuleType

from recipes.config import ConfigError


def algorithm(name: str) -> ModuleType:
    """``recipes.algorithms.<name>``, or a module by dotted path. Raises ConfigError naming an unknown one."""
    path = name if "." in name else f"recipes.algorithms.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"algorithm.name={name!r}: no module {path}; use grpo or the dotted path of your own"
        ) from error
