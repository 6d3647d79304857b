"""Load objects that a setting names by their dotted path."""

import importlib
from typing import Any


def load(path: str) -> Any:
    """The object at ``package.module.attribute``.

    Raises ValueError when ``path`` has no module, or the module does not exist or has no such attribute. An import that
    fails inside the module raises its own error.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{path!r} is not a dotted path")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # The module exists, and something that it imports does not.
        raise ValueError(str(error)) from error
    if not hasattr(module, attribute):
        raise ValueError(f"module {module_name!r} has no attribute {attribute!r}")
    return getattr(module, attribute)
