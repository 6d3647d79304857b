"""The house rules that a program can check: import flow, the loop's shape, and nothing of one machine in the files."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ["recipes", "megatron_ext", "rollout", "rewards"]
MAX_POSITIONAL = 4  # arguments of a function of the loop

# What a room must not import: the flow is recipes -> rollout, rewards -> megatron_ext, and never back.
FORBIDDEN = {
    "megatron_ext": {"recipes", "rollout", "rewards", "tests", "benchmarks"},
    "rollout": {"recipes", "tests", "benchmarks"},
    "rewards": {"recipes", "tests", "benchmarks"},
    "recipes": {"tests", "benchmarks"},
}

# Where CPU and CUDA may be told apart, and how that is written.
PLATFORM_PLACES = ("megatron_ext/platform/", "rollout/vllm_platform.py")
PLATFORM_NAMES = ("cpu", "cuda")
PLATFORM_QUESTIONS = ("is_cuda", "is_cpu", "is_cuda_alike")

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


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def import_graph() -> dict[str, set[str]]:
    """Module of a room → the rooms' modules that it imports anywhere: in functions and under TYPE_CHECKING too."""
    paths = {module_name(path): path for path in python_files() if path.relative_to(ROOT).parts[0] in ROOMS}
    graph = {}
    for name, path in paths.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{relative(path)}:{node.lineno}: a relative import; write the full name"
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    imported.add(submodule if submodule in paths else str(node.module))
        graph[name] = (imported & paths.keys()) - {name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle in their order, the first again at the end; empty where there is none."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for imported in sorted(graph[module]):
            if circle := visit(imported, [*path, module]):
                return circle
        finished.add(module)
        return []

    for module in sorted(graph):
        if circle := visit(module, []):
            return circle
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(import_graph()) == []


def test_a_circle_of_imports_is_detected() -> None:
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"b"}}) == ["b", "d", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def platform_branches(source: str) -> list[int]:
    """Lines where a value is compared with a platform's name, selected by it, or a library is asked for the platform.

    A device is named freely, as in ``torch.device("cpu")``: that is no branch.
    """
    lines = []
    for node in ast.walk(ast.parse(source)):
        operands: list[ast.expr | None] = []
        if isinstance(node, ast.Compare):
            for side in (node.left, *node.comparators):
                operands += side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side]
        elif isinstance(node, ast.Dict):
            operands += node.keys
        elif isinstance(node, ast.MatchValue):
            operands.append(node.value)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".startswith"):
            operands += node.args
        compared = any(isinstance(operand, ast.Constant) and operand.value in PLATFORM_NAMES for operand in operands)
        asked = isinstance(node, ast.Attribute) and (
            node.attr in PLATFORM_QUESTIONS or ast.unparse(node) == "torch.cuda.is_available"
        )
        if compared or asked:
            lines.append(node.lineno if not isinstance(node, ast.MatchValue) else node.value.lineno)
    return sorted(set(lines))


def test_platforms_differ_in_one_place() -> None:
    """Elsewhere the code asks ``platform.capabilities`` or calls a function that both platforms have."""
    elsewhere = [
        f"{relative(path)}:{line}"
        for path in python_files()
        if path.relative_to(ROOT).parts[0] in ROOMS and not relative(path).startswith(PLATFORM_PLACES)
        for line in platform_branches(path.read_text())
    ]
    assert elsewhere == []


@pytest.mark.parametrize(
    ("line", "is_branch"),
    [
        ('size = 1 if platform == "cpu" else 2', True),
        ('if config.cluster.platform not in ("cuda",): pass', True),
        ('sizes = {"cpu": 1, "cuda": 2}', True),
        ("if torch.cuda.is_available(): pass", True),
        ("if current_platform.is_cpu(): pass", True),
        ("if tensor.is_cuda: pass", True),
        ('tensor = tensor.to("cpu", copy=True)', False),
        ("if capabilities(config.cluster.platform).has_fp8: pass", False),
    ],
)
def test_branches_on_the_platform_are_detected(line: str, is_branch: bool) -> None:
    assert bool(platform_branches(line)) == is_branch


def loop_functions() -> dict[str, ast.FunctionDef]:
    """The functions of the RL loop's file, by name."""
    tree = ast.parse((ROOT / "recipes" / "training" / "rl.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_loop_reads_as_the_algorithm() -> None:
    """Each step of ``rl.fit`` calls generate, score, advantages and update by these names, in this order."""
    (loop,) = [node for node in ast.walk(loop_functions()["fit"]) if isinstance(node, ast.For)]
    calls = [node for node in ast.walk(loop) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    steps = ["sync", "generate", "score", "compute_advantages", "update", "record"]
    assert [names.index(step) for step in steps] == sorted(names.index(step) for step in steps)


def test_functions_of_the_loop_take_few_arguments_by_position() -> None:
    many = {
        name: len(node.args.args) for name, node in loop_functions().items() if len(node.args.args) > MAX_POSITIONAL
    }
    assert many == {}


def test_no_file_names_a_machine_or_a_registry() -> None:
    lines = []
    for path in project_files():
        if path == Path(__file__).resolve():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture or another binary file
        for number, line in enumerate(text.splitlines(), start=1):
            if any(pattern.search(line) for pattern in MACHINE_PATTERNS):
                lines.append(f"{relative(path)}:{number}: {line.strip()[:120]}")
    assert lines == []


@pytest.mark.parametrize(
    "line",
    ["cd /work/trainer", 'open("/root/x")', "/home/ann/model", "https://pypi.example/simple", "pip --index-url x"],
)
def test_the_machine_patterns_match(line: str) -> None:
    assert any(pattern.search(line) for pattern in MACHINE_PATTERNS)
