"""RL algorithms, one module each: ``advantages`` and ``token_loss``, pure functions; chosen by ``algorithm.name``."""

import importlib
import importlib.util
from types import ModuleType

from recipes.config import ConfigError


def algorithm(name: str) -> ModuleType:
    """``recipes.algorithms.<name>``, or a module by dotted path. Raises ConfigError naming an unknown one."""
    return importlib.import_module(module_path(name))


def module_path(name: str) -> str:
    """The module that ``name`` means, found but not imported. Raises ConfigError when there is none."""
    path = name if "." in name else f"recipes.algorithms.{name}"
    try:
        found = importlib.util.find_spec(path)
    except ModuleNotFoundError:  # a parent package is missing
        found = None
    if found is None:
        raise ConfigError(f"algorithm.name={name!r}: no module {path}; use grpo or the dotted path of your own")
    return path
