"""Tells which results are from the present code: ``make figures`` lists the files of ``benchmarks/results``.

Every file is written by the one command that it names. It carries digests of what the command depends on
(:func:`source`, :func:`write`): the modules that it can import, the configuration, and the data.

* If the command states which recipes it takes, the configuration is what they compose, and the data is the files that
  this configuration or the code names.
* Otherwise all configuration and all data count, except the bounds that ``recipes.check`` compares a finished run with.

A file is stale if any of these has changed since, however little, or if it has no digest. Comments and docstrings do
not count, because they do not change what a program does.
"""

import ast
import functools
import hashlib
import io
import itertools
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from recipes.run import records

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ROOMS = ("recipes", "megatron_ext", "rollout", "rewards", "conf", "benchmarks")
NOT_CODE = (".yaml", ".jsonl", ".parquet")  # configuration and data
PACKAGE_DIRECTIVE = re.compile(r"^# @package .*", re.MULTILINE)  # a comment that Hydra reads
BOUNDS = Path("conf/bounds")  # no run and no benchmark reads them
# A module's name, or a package's name with a dot, which an f-string completes to a module's name.
MODULE_NAME = re.compile(rf"({'|'.join(ROOMS)})(\.\w+)*\.?")
GPU_CHECKS = "gpu"  # the folder of files with an entry for each check. Each entry has its own digests
OF_RECIPES = "of_recipes"  # key for the recipes that a command takes, next to the rooms' digests
CURRENT = "current"
NO_DIGEST = "no digest"


def source(module: str | None, root: Path = ROOT, recipes: Sequence[str] = ()) -> dict[str, Any]:
    """Room → digest of what a program depends on: its code, configuration and data.

    ``module``: the program's name ("benchmarks.loop"). It depends on the files that it can import. None stands for a
    check on a GPU, which depends on all files of the rooms.
    ``recipes``: the recipes that the program takes, if it takes no other configuration. They are returned with the
    digests, as ``of_recipes``, for :func:`state`. Without recipes, all configuration and all data count.
    """
    present = {path for room in ROOMS for path in (root / room).rglob("*") if path.parent != root / BOUNDS}
    code = {path for path in present if path.suffix == ".py"} if module is None else importable(module, root)
    others = {path for path in present if path.suffix in NOT_CODE}
    digests = {room: hashlib.sha256() for room in ROOMS}
    if recipes:
        configuration = "\n".join(composed(recipe, root) for recipe in recipes)
        digests["conf"].update(configuration.encode())
        texts = [configuration, *(path.read_text() for path in code)]
        others = {
            path
            for path in others
            if root / "conf" not in path.parents and any(str(path.relative_to(root)) in text for text in texts)
        }
    for path in sorted(code | others):
        name = path.relative_to(root)
        digest = digests[name.parts[0]]
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(effective(path)).digest())
    by_room = {room: digest.hexdigest()[:16] for room, digest in digests.items()}
    return {**by_room, OF_RECIPES: list(recipes)} if recipes else by_room


def effective(path: Path) -> bytes:
    """The part of a file that has an effect: everything except comments and docstrings."""
    if path.suffix == ".py":
        return statements(path.read_text()).encode()
    if path.suffix == ".yaml":
        text = path.read_text()
        return repr((PACKAGE_DIRECTIVE.findall(text), yaml.safe_load(text))).encode()
    return path.read_bytes()


def statements(code: str) -> str:
    """The tokens of code, one per line, without comments, docstrings, and line breaks inside a statement."""
    passed_over = (tokenize.COMMENT, tokenize.NL)
    kept: list[tokenize.TokenInfo] = []
    docstring = False  # whether the last token was a docstring. Its end of line is skipped too
    for token, following in itertools.pairwise(tokenize.generate_tokens(io.StringIO(code).readline)):
        if token.type in passed_over or docstring:
            docstring = False
            continue
        begins = not kept or kept[-1].type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        docstring = begins and token.type == tokenize.STRING and following.type == tokenize.NEWLINE
        if not docstring:
            kept.append(token)
    return "\n".join(token.string for token in kept)


def composed(recipe: str, root: Path) -> str:
    """The configuration of a recipe, and of each stage of its ladder, as YAML."""
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        complete = compose("config", [f"recipe={recipe}"])
        stages = [compose("config", [f"recipe={recipe}", f"stage={stage}"]) for stage in complete.stage.ladder]
    return "\n".join(OmegaConf.to_yaml(config) for config in (complete, *stages))


def importable(module: str, root: Path) -> set[Path]:
    """The module's own file and the files of the rooms that it imports (also in a function) or names, recursively.

    A string with a module's name counts as an import, because another process may run it, or a setting may name it.
    """
    dependencies: set[Path] = set()
    to_read = files(module, root)
    while to_read:
        path = to_read.pop()
        if path not in dependencies:
            dependencies.add(path)
            to_read += [file for name in module_names(path.read_text()) for file in files(name, root)]
    return dependencies


@functools.cache
def module_names(code: str) -> tuple[str, ...]:
    """The modules of the rooms that code imports or names, and any other string in the form of such a name."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)
    return tuple(name for name in dict.fromkeys(names) if MODULE_NAME.fullmatch(name))


def files(name: str, root: Path) -> list[Path]:
    """The files that an import of ``name`` reads: those of the module and of its packages.

    If the end of a name is no module, it is an object of the module. "package." stands for all modules of the package.
    """
    if name.endswith("."):
        return sorted((root / name.replace(".", "/")).glob("*.py"))
    parts = name.split(".")
    places = [root.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    candidates = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return [file for file in candidates if file.is_file()]


def write(path: Path, command: str, made_by: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a file of results with its date and its command.

    ``command``: "python -m MODULE …".
    ``made_by``: what :func:`source` returned for the module when the command began.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    records.write_json(path, {"date": date, "command": command, "source": made_by, **result})


def state(path: Path, root: Path = ROOT) -> str:
    """``CURRENT``, ``NO_DIGEST``, or the rooms in which dependencies of the file have changed since it was written."""
    results = json.loads(path.read_text())
    parts = list(results.values()) if path.parent.name == GPU_CHECKS else [results]
    if any("source" not in part for part in parts):
        return NO_DIGEST
    changed: set[str] = set()
    for part in parts:
        module = program(part["command"]) if "command" in part else None
        present = source(module, root, part["source"].get(OF_RECIPES, ()))
        changed |= {room for room in ROOMS if part["source"].get(room) != present[room]}
    return f"changed since: {', '.join(room for room in ROOMS if room in changed)}" if changed else CURRENT


def program(command: str) -> str:
    """The module of "python -m MODULE …"."""
    words = command.split()
    return words[words.index("-m") + 1]


def with_interval(measure: Mapping[str, Any], digits: str = ".3f") -> str:
    """A measure's mean and interval for a table. ``digits``: a format specification, "+.2f" for a difference."""
    low, high = measure["interval"]
    return f"{measure['mean']:{digits}} [{low:{digits}}, {high:{digits}}]"


def main() -> None:
    table = Table("file", "date", "command", "code")
    stale = 0
    paths = sorted(RESULTS.rglob("*.json"))
    for path in paths:
        results = json.loads(path.read_text())
        code = state(path)
        stale += code != CURRENT
        table.add_row(str(path.relative_to(RESULTS)), results.get("date", "")[:10], results.get("command", ""), code)
    console = Console()
    console.print(table)
    console.print(f"{stale} of {len(paths)} files are stale: not, or not provably, of the present code")


if __name__ == "__main__":
    main()
