"""Settings: dataclass fields that carry their documentation and the values that they may have.

A settings class is in the package that uses it. The fields have no defaults in the code. The defaults are in conf/,
each in one file. ``recipes.config`` combines the classes. This module imports no library that takes long to import,
because it is imported before anything else.
"""

import dataclasses
import difflib
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

# Intervals that more than one class uses. Upper bounds without a reason of their own are far beyond any use. They catch
# a mistyped exponent.
COUNT = "[1, 1e9]"
TOKENS = "[1, 1e8]"
SECONDS = "(0, 1e7]"
COEFFICIENT = "[0, 1e6]"
FRACTION = "[0, 1]"

REFERENCE = "the fields are listed in docs/configuration.md"
METADATA = "setting"

# What a resumed run may do with a setting (recipes/config/resume.py). With another value of a kept setting the run
# would be another experiment.
ON_RESUME = KEPT, RAISED, FREE = "kept", "raised", "free"


@dataclass(frozen=True)
class Setting:
    """The description of a field."""

    # One line.
    doc: str
    # An interval like "(0, 1]".
    range: str | None = None
    unit: str | None = None
    # The values that the field may have. For a list, the values that its items may have.
    choices: tuple[Any, ...] | None = None
    # One of ``ON_RESUME``, or None for the rule of the group that the field is in.
    on_resume: str | None = None


def setting(
    doc: str,
    *,
    range: str | None = None,
    unit: str | None = None,
    choices: Iterable[Any] | None = None,
    on_resume: str | None = None,
) -> Any:
    """A dataclass field without a default that is described by a :class:`Setting`."""
    allowed = None if choices is None else tuple(choices)
    return dataclasses.field(metadata={METADATA: Setting(doc, range, unit, allowed, on_resume)})


def is_optional(hint: Any) -> bool:
    """Whether a field of this type may be null."""
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


def fields(schema: Any, path: str = "") -> Iterator[tuple[str, Any, Setting | None]]:
    """Yield dotted path, type and description of every field below a settings class. A class precedes its fields."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name = f"{path}.{field.name}" if path else field.name
        hint = hints[field.name]
        yield name, hint, field.metadata.get(METADATA)
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, name)


def on_resume(schema: Any) -> dict[str, str]:
    """What a resumed run may do with each field below a settings class: dotted path → one of ``ON_RESUME``.

    A field without a rule of its own has the rule of its group. Without a group it is kept.
    """
    rules: dict[str, str] = {}
    for name, _, described in fields(schema):
        own = described.on_resume if described is not None else None
        rules[name] = own or rules.get(name.rpartition(".")[0], KEPT)
    return rules


def mappings(schema: Any, path: str = "") -> list[str]:
    """Dotted paths of the free-form mappings below a settings class. The user chooses the keys of these mappings."""
    return [name for name, hint, _ in fields(schema, path) if get_origin(hint) is dict]


def read[T](schema: type[T], path: str, *values: Any) -> T:
    """Create an object of a settings class from mappings. A later mapping overrides an earlier one.

    Raises ValueError for an unknown field, a missing field and a value of another type. :func:`check` checks the
    ranges.
    """
    for value in values:
        if not isinstance(value, Mapping):
            raise ValueError(f"{path}={value!r}: give a mapping of fields, {{field: value, …}}")
        _check_booleans(schema, path, value)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), *values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        field = ".".join(part for part in (path, key) if part) or "configuration"
        if isinstance(error, ConfigKeyError):
            raise ValueError(f"{field}: {unknown_field(schema, path, field)}") from error
        raise ValueError(f"{field}: {str(error).splitlines()[0]}; {REFERENCE}") from error
    assert isinstance(settings, schema)
    return settings


def _check_booleans(schema: Any, path: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError for a number or a text in place of a boolean, which OmegaConf would accept (2 as true)."""
    for name, hint, _ in fields(schema):
        if hint is not bool:
            continue
        parent, _, key = name.rpartition(".")
        group: Any = values
        for part in filter(None, parent.split(".")):
            group = group.get(part) if isinstance(group, Mapping) else None
        value = group.get(key) if isinstance(group, Mapping) else None
        if value is not None and not isinstance(value, bool) and value != "???":
            raise ValueError(f"{'.'.join(filter(None, (path, name)))}={value!r}: use true or false")


def unknown_field(schema: Any, path: str, field: str) -> str:
    """The error message for a field that ``schema`` (at ``path``) does not have. It names the nearest field.

    The nearest field is a neighbour with a similar name, else a field with the same name elsewhere, else any field with
    a similar name.
    """
    names = {known: known.rpartition(".")[2] for known, _, _ in fields(schema, path)}
    parent, _, name = field.rpartition(".")
    neighbours = {names[known]: known for known in names if known.rpartition(".")[0] == parent}
    namesakes = [known for known in names if names[known] == name]
    similar = difflib.get_close_matches(name, names.values(), 1, 0.8)
    nearest = [neighbours[near] for near in difflib.get_close_matches(name, neighbours, 1, 0.6)]
    nearest = nearest or difflib.get_close_matches(field, namesakes, 1, 0.0)
    nearest = nearest or [known for known in names if names[known] in similar]
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    return f"no such field; {hint}{REFERENCE}"


def check(settings: Any, path: str = "") -> None:
    """Check the values of all fields, in nested settings too.

    Raises ValueError naming the first field whose value is outside its range or choices.
    """
    hints = get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        name = f"{path}.{field.name}" if path else field.name
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            check(value, name)
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                check(item, f"{name}[{i}]")
        elif METADATA in field.metadata:
            _check_value(name, value, field.metadata[METADATA], is_optional(hints[field.name]))


def _check_value(name: str, value: Any, described: Setting, optional: bool) -> None:
    if value is None:
        return
    if described.range is not None:
        remedy = outside(value, described.range)
        if remedy is not None:
            raise ValueError(f"{name}={value}: {remedy}" + (", or null for none" if optional else ""))
    if described.choices is not None:
        for item in value if isinstance(value, list) else [value]:
            if item not in described.choices:
                raise ValueError(f"{name}={item!r}: use one of {', '.join(map(str, described.choices))}")


def outside(value: float, interval: str) -> str | None:
    """Say what ``value`` has to be instead. Returns None if it lies in ``interval``. NaN lies in no interval."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if above and below:
        return None
    integer = isinstance(value, int)
    if high <= 1:
        return "use 0 or 1" if integer else f"must be in {interval}"
    if above:
        return f"must be {'below' if interval[-1] == ')' else 'at most'} {high:g}"
    if interval[0] == "(":
        return f"must be above {low:g}"
    if integer and low == 1:
        return "must be above 0"
    return f"use {low:g} or more"


def with_new_keys(arguments: Sequence[str], open_paths: Sequence[str]) -> list[str]:
    """A Hydra command line in which overrides at or below ``open_paths`` may name new keys.

    These overrides get the prefix ``++``.
    """
    return [f"++{argument}" if _is_below(argument, open_paths) else argument for argument in arguments]


def _is_below(argument: str, paths: Sequence[str]) -> bool:
    key, equals, _ = argument.partition("=")
    return bool(equals) and any(key == path or key.startswith(f"{path}.") for path in paths)
