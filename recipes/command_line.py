"""A Hydra command line that reports an error in one line."""

import itertools
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException

from megatron_ext.settings import mappings, unknown_field, with_new_keys
from recipes.config import Config

APPEND = "To append to your config use +"
MERGING = "Error merging override "
# Fields whose values are not printed.
SECRET = re.compile("key|token|secret|password", re.IGNORECASE)
CONF = Path(__file__).resolve().parents[1] / "conf"
# Groups of a run's settings, in the order in which the help lists them.
GROUPS = (
    "recipe",
    "model",
    "algorithm",
    "stage",
    "data",
    "rewards",
    "parallel",
    "precision",
    "rollout",
    "cluster",
    "logger",
)


def one_line(error: HydraException) -> str:
    """The message of a Hydra error on one line.

    Hydra's advice to add unknown keys with + is left out, since ``parse`` refuses such keys.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    unknown = [line for line in lines if line.startswith(APPEND)]
    if unknown:
        override = unknown[0].removeprefix(APPEND)
        field = override.partition("=")[0]
        shown = field if SECRET.search(field) else override
        return f"{shown}: {unknown_field(Config, '', field)}"
    if isinstance(error, OverrideParseException):
        field, _, value = error.override.partition("=")
        shown = "VALUE" if SECRET.search(field) else value
        return f'{field}: {lines[0]}: quote the value, for the shell too: "{field}={quoted(shown)}"'
    if lines[0].startswith(MERGING):
        why = str(error.__cause__).splitlines()[0]
        return f"{lines[0].removeprefix(MERGING)}: {why}; the fields are listed in docs/configuration.md"
    return " ".join(itertools.takewhile(lambda line: not line.startswith("Config search path"), lines))


def quoted(text: str) -> str:
    """A text, quoted as the value of an override. It may have any characters."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def from_command_line(hydra_main: Callable[[], None]) -> None:
    """Call a Hydra main function. An error of the command line is printed in one line, with exit code 1.

    Overrides in free-form mappings may name new keys. ``--help`` prints the program's docstring and the choices of each
    group. Hydra's own help is not used, since it would need a recipe first.
    """
    if not {"-h", "--help"}.isdisjoint(sys.argv[1:]):
        print(help_text(sys.modules["__main__"].__doc__ or ""))
        return
    sys.argv[1:] = with_new_keys(sys.argv[1:], mappings(Config))
    # Hydra then raises instead of printing several lines.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra_main()
    except HydraException as error:
        print(f"error: {one_line(error)}", flush=True)
        sys.exit(1)


def help_text(program: str) -> str:
    """The text of ``--help``. ``program`` describes what the program does and how it is called."""
    choices = []
    for group in GROUPS:
        names = sorted(file.stem for file in (CONF / group).glob("*.yaml") if file.stem != "base")
        choices.append(f"  {group}={'|'.join(names)}")
    return "\n".join(
        [
            program.strip(),
            "",
            "Choices:",
            *choices,
            "",
            "Every setting is in docs/configuration.md. --cfg job after a recipe prints its settings.",
        ]
    )


def with_group(arguments: Sequence[str], group: str, default: str) -> list[str]:
    """Add a Hydra group that the configuration of a run does not have to the arguments.

    The group's file is the one that ``group=FILE`` among the arguments names, or else ``default``.
    """
    if any(argument.startswith(f"{group}=") for argument in arguments):
        return [f"+{argument}" if argument.startswith(f"{group}=") else argument for argument in arguments]
    overrides = (i for i, argument in enumerate(arguments) if "=" in argument and not argument.startswith("-"))
    # Hydra requires that all overrides are next to each other.
    at = next(overrides, len(arguments))
    return [*arguments[:at], f"+{group}={default}", *arguments[at:]]


def split_arguments(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Split the arguments into the ``name=value`` arguments with these names, and the others in their order."""
    own = {}
    others = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in names:
            own[name] = value
        else:
            others.append(argument)
    return own, others
