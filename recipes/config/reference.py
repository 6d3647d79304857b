"""``python -m recipes.config.reference`` writes docs/configuration.md: every setting of the schema and its default."""

import dataclasses
import inspect
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_ext.settings import KEPT, Setting, fields, is_optional, on_resume
from recipes.config.schema import Config
from recipes.page.settings import PageConfig
from rewards.settings import NOTHING, VerifierConfig
from rollout.deliberation.settings import AskConfig, DeliberationConfig
from rollout.guidance.settings import CalibrateConfig, FitRouterConfig, GuidanceConfig

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
PAGE = ROOT / "docs" / "configuration.md"
MISSING = object()
# Settings that are not part of a run: those of the commands of rollout.guidance (conf/guidance.yaml),
# rollout.deliberation (conf/deliberation.yaml) and recipes.serve (conf/serve.yaml).
NO_RUN: dict[str, Any] = {
    "guidance": GuidanceConfig,
    "calibrate": CalibrateConfig,
    "fit_router": FitRouterConfig,
    "deliberation": DeliberationConfig,
    "ask": AskConfig,
    "page": PageConfig,
}

INTRODUCTION = """# Configuration

Written by `python -m recipes.config.reference` from the schema and from `conf/`; do not edit.

A run's configuration consists of one file of each group of `conf/` (`recipe=demo`, `algorithm=gspo`, …) and overrides
of single values (`algorithm.learning_rate=2e-6`). A default stands in one file of `conf/`. Where it says *each file*,
every file of the group sets a value of its own; where it says *required*, the recipe, the stage or the command line
sets it.

An unknown field is an error that names the nearest known one. New keys of free-form mappings are overrides like others:

    data.mix.poetry=1
    'rewards.mix={safety: {my_reward.brief: 1.0}}'
    'rewards.servers.safety.arguments=[--max-model-len, "20000"]'
    'data.scores={brief: [chat]}'

A mapping is merged into the one that is there; `~rewards.mix.safety` removes a key.

*Resume* says whether a run that goes on (`resume=true`) may have another value: *free*, or *raised* only. Any other
setting belongs to the experiment, and a change has to be named in `resume_accept`.
"""


def page() -> str:
    """The text of docs/configuration.md."""
    hints = get_type_hints(Config)
    described = {path: (hint, setting) for path, hint, setting in fields(Config)}
    sections = [INTRODUCTION]
    top = [name for name in hints if not dataclasses.is_dataclass(hints[name])]
    sections.append("## The run\n\n" + table((name, *described[name]) for name in top))
    for group in (name for name in hints if name not in top):
        below = [(path, *described[path]) for path in described if path.startswith(f"{group}.")]
        rows = [row for row in below if not dataclasses.is_dataclass(row[1])]
        heading = f"## {group}\n\n{paragraph(hints[group])}"
        if (CONF / group).is_dir():
            names = sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")
            heading += f" Files of `conf/{group}/`: {', '.join(f'`{name}`' for name in names)}."
        sections.append(f"{heading}\n\n{table(rows)}")
        if group == "rewards":
            entry = fields(VerifierConfig, "rewards.verifiers.NAME")
            sections.append(f"{paragraph(VerifierConfig)}\n\n{table(entry)}")
    for name, schema in NO_RUN.items():
        rows = [row for row in fields(schema, name) if not dataclasses.is_dataclass(row[1])]
        sections.append(f"## {name}\n\n{paragraph(schema)}\n\n{table(rows)}")
    return "\n".join(sections)


def paragraph(schema: Any) -> str:
    """The docstring of a settings class in one line."""
    return " ".join((inspect.getdoc(schema) or "").split()).replace("``", "`")


def table(rows: Any) -> str:
    lines = ["| Setting | Type | Default | Values | Resume | Meaning |", "|---|---|---|---|---|---|"]
    rules = on_resume(Config)
    for path, hint, setting in rows:
        rule = rules.get(path, KEPT)
        cells = [f"`{path}`", type_name(hint), default(path), values(setting), "" if rule == KEPT else rule]
        cells.append(meaning(setting))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def type_name(hint: Any) -> str:
    """The name of a type for a reader of YAML."""
    if is_optional(hint):
        (given,) = (argument for argument in get_args(hint) if argument is not types.NoneType)
        return f"{type_name(given)} or null"
    if get_origin(hint) is list:
        return f"list of {type_name(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in get_args(hint))
    if hint is Any:
        return "any"
    return {"str": "text", "dict": "mapping", "PhaseConfig": "mapping"}.get(hint.__name__, hint.__name__)


def values(setting: Setting | None) -> str:
    assert setting is not None
    if setting.choices is not None:
        return ", ".join(f"`{choice}`" for choice in setting.choices)
    if setting.range is not None:
        return setting.range + (f" {setting.unit}" if setting.unit else "")
    return setting.unit or ""


def meaning(setting: Setting | None) -> str:
    assert setting is not None
    return setting.doc


def default(path: str) -> str:
    """The default of a setting as JSON, from the one file of conf/ that has it.

    *each file* if not exactly one of the files of :func:`roots` has it, *required* if the value must be given.
    """
    if path.startswith("rewards.verifiers.NAME."):
        return f"`{json.dumps(NOTHING[path.rpartition('.')[2]])}`"
    candidates = [lookup(content, path) for content in roots(path.partition(".")[0])]
    defaults = [value for value in candidates if value is not MISSING]
    if len(defaults) != 1:
        return "*each file*"
    if defaults[0] == "???":
        return "*required*"
    return f"`{json.dumps(defaults[0], ensure_ascii=False)}`"


def roots(group: str) -> Iterator[dict[str, Any]]:
    """The contents of the root files and of the group's files that do not derive from another one."""
    for name in ("config.yaml", "guidance.yaml", "deliberation.yaml", "serve.yaml"):
        yield yaml.safe_load((CONF / name).read_text())
    for path in sorted((CONF / group).glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if "defaults" not in content:
            yield {group: content}


def lookup(content: dict[str, Any], path: str) -> Any:
    value: Any = content
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            return MISSING
        value = value[key]
    return value


if __name__ == "__main__":
    PAGE.write_text(page())
