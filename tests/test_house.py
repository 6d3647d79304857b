"""The house rules that a program can check: the rooms' import flow, sizes, and nothing of one machine in the files."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["recipes", "megatron_ext", "rollout", "rewards"]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 120

# What a room must not import: the flow is recipes -> rollout, rewards -> megatron_ext, and never back.
FORBIDDEN = {
    "megatron_ext": {"recipes", "rollout", "rewards", "tests", "benchmarks"},
    "rollout": {"recipes", "tests", "benchmarks"},
    "rewards": {"recipes", "tests", "benchmarks"},
    "recipes": {"tests", "benchmarks"},
}

MACHINE_PATTERNS = [
    re.compile(r"(?<![\w.*])/(?:work|root)/"),
    re.compile(r"(?<![\w.*])/home/\w+/"),
    re.compile(r"https?://[^/\s]*(?:pypi|pythonhosted|npmjs|debian)"),
    re.compile(r"--(?:extra-)?index-url|--find-links"),
]


def project_files() -> Iterator[Path]:
    """Every file of the project that .gitignore, a list of plain names, does not exclude."""
    patterns = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line] + [".git"]

    def ignored(path: Path) -> bool:
        return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)

    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if ignored(path):
                continue
            if path.is_dir():
                folders.append(path)
            else:
                yield path


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and length in lines, decorators included, of each function in a file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first + 1


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level package and line of each import in a room's file; relative ones stay in the room."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.partition(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            assert node.level <= len(package), f"{relative(path)}:{node.lineno} imports from above its room"
            if node.level == 0 and node.module:
                yield node.module.partition(".")[0], node.lineno


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_one_way(room: str) -> None:
    files = [path for path in python_files() if path.relative_to(ROOT).parts[0] == room]
    assert files, f"{room}/ has no Python file"
    back = [
        f"{relative(path)}:{line} imports {package}"
        for path in files
        for package, line in imports(path)
        if package in FORBIDDEN[room]
    ]
    assert back == []


def test_files_are_short() -> None:
    long = {
        relative(path): lines for path in python_files() if (lines := path.read_text().count("\n")) > MAX_FILE_LINES
    }
    assert long == {}, f"more than {MAX_FILE_LINES} lines: {long}"


def test_functions_are_short() -> None:
    long = {
        f"{relative(path)}:{name}": lines
        for path in python_files()
        for name, lines in functions(path)
        if lines > MAX_FUNCTION_LINES
    }
    assert long == {}, f"more than {MAX_FUNCTION_LINES} lines: {long}"


def test_the_loop_reads_as_one_function() -> None:
    """The RL loop is one function: the longest of recipes/training/rl.py, within the limit and with the loop in it."""
    path = ROOT / "recipes" / "rl.py"
    name, lines = max(functions(path), key=lambda item: item[1])
    tree = ast.parse(path.read_text())
    loop = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    assert lines <= MAX_FUNCTION_LINES
    assert any(isinstance(node, ast.For | ast.While) for node in ast.walk(loop)), f"{name} has no loop"


def test_no_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in project_files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture or another binary file
        for number, line in enumerate(text.splitlines(), start=1):
            if any(pattern.search(line) for pattern in MACHINE_PATTERNS):
                found.append(f"{relative(path)}:{number}: {line.strip()[:120]}")
    assert found == []


@pytest.mark.parametrize(
    "line",
    ["cd /work/trainer", 'open("/root/x")', "/home/ann/model", "https://pypi.example/simple", "pip --index-url x"],
)
def test_the_machine_patterns_match(line: str) -> None:
    assert any(pattern.search(line) for pattern in MACHINE_PATTERNS)
