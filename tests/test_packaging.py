"""The pins, the extras, the installed environment and docs/dependencies.md say the same thing."""

import ast
import re
import runpy
import sys
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP: dict[str, Any] = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
PINS: dict[str, str] = SETUP["read_pins"](ROOT / "pins.txt")

# The registry's packages of these names are not the projects that the field means by them.
UNRELATED = {"apex", "nemo-rl", "slime"}


def canonical(name: str) -> str:
    """A distribution's name as the registry normalises it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_versions() -> dict[str, str]:
    """Name to version of what lies in this interpreter's site-packages."""
    distributions = metadata.distributions(path=[sysconfig.get_path("purelib")])
    return {canonical(distribution.name): distribution.version for distribution in distributions}


def direct_dependencies() -> set[str]:
    lists = [SETUP["COMMON"], *SETUP["EXTRAS"].values()]
    return {requirement.partition("[")[0] for requirements in lists for requirement in requirements}


def test_every_direct_dependency_is_pinned_exactly() -> None:
    for requirements in [SETUP["COMMON"], *SETUP["EXTRAS"].values()]:
        for requirement, pinned in zip(requirements, SETUP["pinned"](requirements, PINS), strict=True):
            assert pinned == f"{requirement}=={PINS[requirement.partition('[')[0]]}"


def test_a_requirement_without_a_pin_is_named() -> None:
    with pytest.raises(ValueError, match=r"no line for made-up-package; add `name==version`"):
        SETUP["pinned"](["torch", "made-up-package"], PINS)


def test_a_line_that_is_no_exact_pin_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text("# comment\n\ntorch==2.13.0\nnumpy>=2\n")
    with pytest.raises(ValueError, match=r"pins.txt: 'numpy>=2' is not `name==version`"):
        SETUP["read_pins"](path)


def test_pins_are_sorted_and_unique() -> None:
    lines = (ROOT / "pins.txt").read_text().splitlines()
    names = [line.partition("==")[0] for line in lines if not line.startswith("#")]
    assert names == sorted(set(names))
    assert names == [canonical(name) for name in names]


def test_versions_stand_in_pins_only() -> None:
    for name in ("setup.py", "setup_env.py", "pyproject.toml", "Makefile"):
        assert re.findall(r"[A-Za-z\]]==\d[^\s\"']*", (ROOT / name).read_text()) == [], name


def test_cuda_s_compilers_are_of_the_runtime_s_release() -> None:
    """Headers of another release (crt) beside the runtime's do not go together, and a driver that runs 13.0 refuses the
    PTX of a newer nvcc. The release is the one that torch asks for."""
    (wanted,) = [line for line in metadata.requires("torch") or [] if line.startswith("cuda-toolkit[")]
    release = re.search(r"==(\d+\.\d+)\.", wanted)
    assert release is not None
    names = ("runtime", "nvrtc", "cupti", "nvcc", "crt", "cccl")
    versions = {f"nvidia-cuda-{name}": PINS[f"nvidia-cuda-{name}"] for name in names}
    versions |= {name: PINS[name] for name in ("nvidia-nvvm", "nvidia-nvtx", "cuda-toolkit")}
    assert {name: version for name, version in versions.items() if not version.startswith(f"{release[1]}.")} == {}


def test_unrelated_packages_are_neither_pinned_nor_installed() -> None:
    assert not UNRELATED & set(PINS)
    assert not UNRELATED & set(installed_versions())


def test_the_environment_holds_the_pinned_versions() -> None:
    """Every installed distribution has its pin; pip comes with Python, the package is ours."""
    installed = installed_versions()
    for name in ("pip", "safework-recipes"):
        installed.pop(name, None)
    wrong = {name: (version, PINS.get(name)) for name, version in installed.items() if version != PINS.get(name)}
    assert wrong == {}, f"installed and pinned versions differ: {wrong}; make the environment again: make clean env"
    assert set(SETUP["COMMON"]) <= set(installed)


def test_the_documented_dependencies_are_the_real_ones() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| ([^ |]+) \|", (ROOT / "docs" / "dependencies.md").read_text(), re.MULTILINE)
    documented = dict(rows)
    assert len(rows) == len(documented), "a dependency stands twice in docs/dependencies.md"
    expected = {name: PINS[name] for name in direct_dependencies() | {"uv"}}
    assert documented == expected


def imported_modules(room: str) -> dict[str, str]:
    """Top-level modules that a room's files import, each with one file that does.

    But for the file that runs in the peers' environments, whose packages are in benchmarks/peers/*.txt.
    """
    files = {}
    for path in sorted({*(ROOT / room).rglob("*.py")} - {ROOT / "benchmarks/peers/exporter.py"}):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            files.update({name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return files


@pytest.mark.parametrize("room", ["recipes", "megatron_ext", "rollout", "rewards", "benchmarks", "tests"])
def test_what_is_imported_is_declared(room: str) -> None:
    """An import of a package that is only there because another one needs it breaks with that one's next release."""
    ours = {"recipes", "megatron_ext", "rollout", "rewards", "conf", "tests", "benchmarks", "setup_env"}
    providers = metadata.packages_distributions()
    declared = direct_dependencies()
    for module, path in imported_modules(room).items():
        if module in sys.stdlib_module_names or module in ours:
            continue
        names = {canonical(name) for name in providers.get(module, [])}
        # The CPU and the GPU build of vLLM give the same module; transformer-engine is there on a GPU machine only.
        if module == "transformer_engine":
            names = {"transformer-engine"}
        assert names & declared, (
            f"{path} imports {module} ({names or 'not installed'}): add it to setup.py and pins.txt"
        )
