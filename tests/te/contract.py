"""Megatron-Core's calls into Transformer Engine, held against Transformer Engine's signatures.

Megatron-Core's sources are parsed. A call counts whose function begins with a name that its file imports from
Transformer Engine, and ``super().method`` in a class that derives from one of its classes. What such a name means is
looked up in the imported package, so this runs where ``fake_extension`` is installed. Branches for other versions of
Transformer Engine are left out.
"""

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = "transformer_engine"
VERSION_TESTS = ("is_te_min_version", "_is_te_min_version")


@dataclass(frozen=True)
class Call:
    """A call: where it is, what it calls, and what is wrong with it, if anything."""

    place: str
    target: str
    fault: str | None


@dataclass
class File:
    """A parsed file of Megatron-Core.

    Attributes:
        name: relative to megatron/core.
        tree: without branches for other versions.
        imports: local name → object of Transformer Engine.
        missing: what it imports that is not there, with the line.
    """

    name: str
    tree: ast.Module
    imports: dict[str, Any]
    missing: list[str]


def numbers(version: str) -> tuple[int, ...]:
    """2.20.2 → (2, 20, 2); 2.7.0.dev → (2, 7, 0)."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


class _ThisVersion(ast.NodeTransformer):
    """Keeps of ``if is_te_min_version("…")`` the branch that runs with the installed version."""

    def __init__(self, version: str) -> None:
        self.version = numbers(version)

    def holds(self, test: ast.expr) -> bool | None:
        """None if it depends on more than the version, and on Transformer Engine being there."""
        if isinstance(test, ast.Name) and test.id == "HAVE_TE":
            return True
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in VERSION_TESTS:
            return self.version >= numbers(ast.literal_eval(test.args[0]))
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            inner = self.holds(test.operand)
            return None if inner is None else not inner
        if isinstance(test, ast.BoolOp):
            values = [self.holds(value) for value in test.values]
            deciding = isinstance(test.op, ast.Or)
            if deciding in values:
                return deciding
            return None if None in values else not deciding
        return None

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        holds = self.holds(node.test)
        if holds is None:
            return node
        return (node.body if holds else node.orelse) or ast.Pass()


def parse(file: Path, root: Path, version: str) -> File:
    """A file below ``root`` (megatron/core)."""
    tree = _ThisVersion(version).visit(ast.parse(file.read_text()))
    imports: dict[str, Any] = {}
    missing = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] != PACKAGE:
                    continue
                module = importlib.import_module(alias.name)
                imports[alias.asname or PACKAGE] = module if alias.asname else importlib.import_module(PACKAGE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == PACKAGE:
            for alias in node.names:
                try:
                    imports[alias.asname or alias.name] = _member(str(node.module), alias.name)
                except (ImportError, AttributeError):
                    missing.append(f"{file.relative_to(root)}:{node.lineno} {node.module}.{alias.name}")
    return File(str(file.relative_to(root)), tree, imports, missing)


def _member(module: str, name: str) -> Any:
    imported = importlib.import_module(module)
    return getattr(imported, name) if hasattr(imported, name) else importlib.import_module(f"{module}.{name}")


def examine(root: Path, version: str) -> tuple[list[Call], list[str]]:
    """(all calls, imported names that are missing) of the files below ``root``."""
    calls: list[Call] = []
    missing: list[str] = []
    for path in sorted(root.rglob("*.py")):
        if PACKAGE not in path.read_text():
            continue
        file = parse(path, root, version)
        missing += file.missing
        calls += _calls(file)
    return calls, missing


def _calls(file: File) -> Iterator[Call]:
    parents = {child: node for node in ast.walk(file.tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        target, bound = _target(node.func, file, parents)
        if target is None:
            continue
        place = f"{file.name}:{node.lineno}"
        name = ast.unparse(node.func)
        if isinstance(target, AttributeError):
            yield Call(place, name, str(target))
            continue
        function = _enclosing(node, parents, ast.FunctionDef)
        fault = _misfit(node, target, bound, function) or _wrong_unpacking(node, target, parents)
        yield Call(place, f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', name)}", fault)


def _target(func: ast.expr, file: File, parents: dict[ast.AST, ast.AST]) -> tuple[Any, bool]:
    """(what is called, whether its first parameter is given by the call's form); None for what is not Transformer
    Engine's, an AttributeError for what it does not have."""
    if isinstance(func, ast.Attribute) and ast.unparse(func.value) == "super()":
        holder = _enclosing(func, parents, ast.ClassDef)
        bases = [_resolve(base, file) for base in holder.bases] if isinstance(holder, ast.ClassDef) else []
        for base in bases:
            if inspect.isclass(base) and base.__module__.startswith(PACKAGE):
                return getattr(base, func.attr, AttributeError(f"{base.__name__} has no {func.attr}")), True
        return None, False
    target = _resolve(func, file)
    return target, inspect.isclass(target) or inspect.ismethod(target)


def _resolve(expression: ast.expr, file: File) -> Any:
    if isinstance(expression, ast.Name):
        return file.imports.get(expression.id)
    if isinstance(expression, ast.Attribute):
        owner = _resolve(expression.value, file)
        if owner is None or isinstance(owner, AttributeError):
            return owner
        return getattr(owner, expression.attr, AttributeError(f"no {ast.unparse(expression)}"))
    return None


def _enclosing(node: ast.AST, parents: dict[ast.AST, ast.AST], kind: type[ast.AST]) -> Any:
    while node in parents:
        node = parents[node]
        if isinstance(node, kind):
            return node
    return None


def _misfit(call: ast.Call, target: Any, bound: bool, function: ast.FunctionDef | None) -> str | None:
    """Why the signature does not take the call's arguments. ``**names`` stand for the keywords that the enclosing
    function puts into ``names``."""
    code = target.__init__ if inspect.isclass(target) else target
    try:
        signature = inspect.signature(inspect.unwrap(code))
    except (TypeError, ValueError):
        return "no signature"
    if inspect.ismethod(code):
        bound = False
    parameters = list(signature.parameters.values())[1 if bound else 0 :]
    kinds = {parameter.kind for parameter in parameters}
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    given = [keyword.arg for keyword in call.keywords if keyword.arg is not None]
    for keyword in call.keywords:
        if keyword.arg is None and isinstance(keyword.value, ast.Name) and function is not None:
            given += _keys(keyword.value.id, function)
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        unknown = sorted({name for name in given if name not in names})
        if unknown:
            return f"takes no {', '.join(unknown)}"
    is_open = any(isinstance(argument, ast.Starred) for argument in call.args)
    if inspect.Parameter.VAR_POSITIONAL not in kinds and not is_open and len(call.args) > len(positional):
        return f"takes {len(positional)} positional arguments, not {len(call.args)}"
    if is_open or any(keyword.arg is None for keyword in call.keywords):
        return None
    needed = [p.name for p in positional[len(call.args) :] if p.default is p.empty]
    needed += [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    lacking = sorted(set(needed) - set(given))
    return f"lacks {', '.join(lacking)}" if lacking else None


def _keys(name: str, function: ast.FunctionDef) -> list[str]:
    """Constant keys that a function puts into the dictionary ``name``."""
    keys = []
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                if isinstance(target, ast.Subscript) and ast.unparse(target.value) == name:
                    keys += [target.slice.value] if isinstance(target.slice, ast.Constant) else []
                elif ast.unparse(target) == name and isinstance(node.value, ast.Dict):
                    keys += [key.value for key in node.value.keys if isinstance(key, ast.Constant)]
    return keys


def _wrong_unpacking(call: ast.Call, target: Any, parents: dict[ast.AST, ast.AST]) -> str | None:
    """Why ``a, b = call`` can't be: no ``return`` of the function gives as many values."""
    assignment = parents.get(call)
    if not isinstance(assignment, ast.Assign) or not isinstance(assignment.targets[0], ast.Tuple):
        return None
    wanted = len(assignment.targets[0].elts)
    sizes = returned_sizes(target)
    if sizes and wanted not in sizes:
        return f"returns {sorted(sizes)} values, not {wanted}"
    return None


def returned_sizes(function: Callable[..., Any]) -> set[int]:
    """How many values each ``return`` of a function gives, for those that write a tuple; empty if it has no source."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (TypeError, OSError):
        return set()
    returns = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
    return {len(value.elts) for value in returns if isinstance(value, ast.Tuple)}


def unguarded(place: str, root: Path) -> bool:
    """Whether the import at ``file:line`` is not within a ``try``."""
    match = re.match(r"(.+):(\d+) ", place)
    assert match is not None
    tree = ast.parse((root / match[1]).read_text())
    line = int(match[2])
    return not any(
        isinstance(node, ast.Try) and node.lineno <= line <= int(node.end_lineno or 0) for node in ast.walk(tree)
    )
