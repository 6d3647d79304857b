"""Compare the settings that a run was begun with and the settings that it is resumed with.

The declaration of a setting (``megatron_ext.settings.setting``) says whether a resumed run may change it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.settings import FREE, KEPT, RAISED, mappings, on_resume, unknown_field
from recipes.config.schema import Config
from recipes.errors import ConfigError

# Settings of a launch, not of the run.
COMMANDS = ("run_dir", "resume", "resume_accept", "overwrite")
# The value of a setting that one of the two versions of the code does not know.
ABSENT = "absent"


@dataclass(frozen=True)
class Difference:
    """A setting whose value differs from the stored one."""

    field: str
    stored: Any
    given: Any
    # Whether the run stays the same experiment with the new value.
    allowed: bool

    def __str__(self) -> str:
        return f"{self.field}: {_text(self.stored)} → {_text(self.given)}"


def differences(stored: Mapping[str, Any], config: Config) -> list[Difference]:
    """The settings in which ``config`` differs from ``stored``, the content of a run's config.yaml."""
    rules = on_resume(Config)
    every_difference = []
    for field, before, after in _differing("", stored, asdict(config)):
        rule = rules.get(_declared(field, rules), KEPT)
        raised = rule == RAISED and isinstance(before, int) and isinstance(after, int) and after > before
        every_difference.append(Difference(field, before, after, rule == FREE or raised))
    return [difference for difference in every_difference if difference.field not in COMMANDS]


def check_resume(stored: Mapping[str, Any], config: Config) -> list[Difference]:
    """The differences of a run that may be resumed with ``config``.

    Raises ConfigError if a difference would make it another experiment and ``resume_accept`` does not name the setting.
    """
    _check_names(config.resume_accept)
    changed = differences(stored, config)
    refused = [
        difference
        for difference in changed
        if not difference.allowed and not any(_is_in(difference.field, name) for name in config.resume_accept)
    ]
    if refused:
        names = ",".join([*config.resume_accept, *(difference.field for difference in refused)])
        raise ConfigError(
            f"resume=true: {config.run_dir} was begun with other settings, and would become another experiment:\n"
            + "".join(f"  {difference}\n" for difference in refused)
            + f"give the former values, begin in another run_dir, or accept them: 'resume_accept=[{names}]' (a group's "
            "name stands for all of its settings)"
        )
    return changed


def _check_names(names: list[str]) -> None:
    """Raises ConfigError for a name in ``resume_accept`` that no setting has."""
    known = on_resume(Config)
    for name in names:
        if name not in known and not any(_is_in(name, mapping) for mapping in mappings(Config)):
            raise ConfigError(f"resume_accept={names}: {name}: {unknown_field(Config, '', name)}")


def _differing(path: str, stored: Any, given: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted path, stored value, given value) of each difference.

    Mappings are compared key by key, lists as a whole.
    """
    if not isinstance(stored, Mapping) or not isinstance(given, Mapping):
        if stored != given:
            yield path, stored, given
        return
    for key in dict.fromkeys([*given, *stored]):
        below = f"{path}.{key}" if path else str(key)
        yield from _differing(below, stored.get(key, ABSENT), given.get(key, ABSENT))


def _declared(field: str, known: Mapping[str, str]) -> str:
    """The declared setting that ``field`` is, or that it is below.

    The settings of an entry of rewards.servers are declared as the defaults of all servers.
    """
    parts = field.split(".")
    if parts[:2] == ["rewards", "servers"] and len(parts) > 3:
        parts = ["rewards", "server", *parts[3:]]
    while ".".join(parts) not in known and len(parts) > 1:
        parts.pop()
    return ".".join(parts)


def _is_in(field: str, group: str) -> bool:
    return field == group or field.startswith(f"{group}.")


def _text(value: Any) -> str:
    return value if value == ABSENT else json.dumps(value, ensure_ascii=False, default=str)
