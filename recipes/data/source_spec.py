"""Parse the data sources that a configuration names (``data.sft``, ``data.prompts``, ``data.evaluation``)."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# A data set of the Hugging Face hub: org/name/subset@revision:split. Subset and revision may be left out.
HUB_NAME = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(?:/(?P<subset>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?:(?P<split>[\w.\[\]%:+-]+)"
)
ACCEPTED = (
    "a file of JSON lines, a folder of .jsonl files, a .parquet file, a folder saved by `datasets`, or a hub's "
    "org/name[/subset][@revision]:split"
)

type SourceFormat = Literal["jsonl", "jsonl_folder", "parquet", "folder", "hub"]


@dataclass(frozen=True)
class SourceSpec:
    """One source of rows."""

    name: str  # as in the configuration
    # The source's share of the draws, among all sources that have rows of the same kind.
    weight: int
    format: SourceFormat


def parse_sources(value: Any) -> list[SourceSpec]:
    """Parse a configuration's sources. ``value`` is a name, or a list of names and of mappings {source, weight}.

    Raises ValueError for any other value, for a source that occurs twice, and for a file that does not exist.
    """
    if isinstance(value, str):
        return [SourceSpec(value, 1, _format_of(value))]
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{value!r}: give {ACCEPTED}, or a list of such, with {{source: …, weight: …}} where the weight is not 1"
        )
    specs = [_parse_entry(entry) for entry in value]
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise ValueError(f"{name!r}: occurs twice; give it once, with the sum of its weights")
    return specs


def _parse_entry(entry: Any) -> SourceSpec:
    if isinstance(entry, str):
        return SourceSpec(entry, 1, _format_of(entry))
    if not isinstance(entry, Mapping) or set(entry) != {"source", "weight"}:
        raise ValueError(f"{entry!r}: an entry of the list is a name, or has `source` and `weight`")
    weight = entry["weight"]
    if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
        raise ValueError(f"{entry!r}: weight is a whole number, at least 1")
    name = entry["source"]
    if not isinstance(name, str):
        raise ValueError(f"{entry!r}: source is a name: {ACCEPTED}")
    return SourceSpec(name, weight, _format_of(name))


def source_names(value: Any) -> str:
    """The names of the sources, for messages. ``value`` as for :func:`parse_sources`."""
    return ", ".join(spec.name for spec in parse_sources(value))


def _format_of(name: str) -> SourceFormat:
    if not name.strip():
        raise ValueError(f"{name!r}: is empty; give {ACCEPTED}")
    path = Path(name)
    try:
        if path.is_dir():
            return "jsonl_folder" if any(path.glob("*.jsonl")) else "folder"
        if path.is_file():
            return "parquet" if path.suffix == ".parquet" else "jsonl"
    except OSError as error:  # e.g. a parent folder without search permission, or a name that is too long
        raise ValueError(f"{name!r}: can't be looked at ({error}); give a path that can be read") from error
    if HUB_NAME.fullmatch(name):
        return "hub"
    raise ValueError(f"{name!r}: no such file in {os.getcwd()}; give {ACCEPTED}")
