"""How a configuration names where rows come from."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# NAME of the hub, then what `datasets` has beside it: org/name/subset@revision:split.
HUB = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?:(?P<split>[\w.\[\]%:+-]+)"
)
FORMS = (
    "a file of JSON lines, a .parquet file, a folder saved by `datasets`, or a hub's org/name[/subset][@revision]:split"
)


@dataclass(frozen=True)
class Specification:
    """``name`` as it is written; ``weight`` is its share beside others that have rows of the same kind."""

    name: str
    weight: int
    form: Literal["jsonl", "parquet", "folder", "hub"]


def read(value: Any) -> list[Specification]:
    """A name, or a list of names and of {source, weight}.

    Raises ValueError for anything else, and for files that are not there.
    """
    if isinstance(value, str):
        return [Specification(value, 1, _form(value))]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{value!r}: give {FORMS}, or a list of such, with {{source: …, weight: …}} where the weight is not 1"
        )
    found = []
    for entry in value:
        if isinstance(entry, str):
            entry = {"source": entry, "weight": 1}
        if not isinstance(entry, Mapping) or set(entry) != {"source", "weight"}:
            raise ValueError(f"{entry!r}: an entry of the list is a name, or has `source` and `weight`")
        weight, name = entry["weight"], entry["source"]
        if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
            raise ValueError(f"{entry!r}: weight is a whole number, at least 1")
        if not isinstance(name, str):
            raise ValueError(f"{entry!r}: source is a name: {FORMS}")
        found.append(Specification(name, weight, _form(name)))
    names = [each.name for each in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{twice[0]!r}: occurs twice; give it once, with the sum of its weights")
    return found


def shown(value: Any) -> str:
    """The names, for messages."""
    return ", ".join(each.name for each in read(value))


def _form(name: str) -> Literal["jsonl", "parquet", "folder", "hub"]:
    path = Path(name)
    if path.is_dir():
        return "folder"
    if path.is_file():
        return "parquet" if path.suffix == ".parquet" else "jsonl"
    if HUB.fullmatch(name):
        return "hub"
    raise ValueError(f"{name!r}: no such file in {os.getcwd()}; give {FORMS}")


def phases(data: Any) -> list[tuple[int, dict[str, int]]]:
    """The first step of each phase of the configuration's ``data``, and the phase's mix without empty shares."""
    found = [(phase.from_step, phase.mix) for phase in data.curriculum] or [(0, data.mix)]
    return [(from_step, {kind: share for kind, share in mix.items() if share}) for from_step, mix in found]
