"""What a machine without a GPU can say of the CUDA side: it is complete, its names exist, its checks are listed."""

import ast
import importlib.metadata
import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.preflight import calibrate

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = ROOT / "megatron_ext" / "platform"
RUNGS = ("gpu-check", "gpu-check-node", "gpu-check-two-nodes")
CUDA, CPU = (ast.parse((PLATFORM / f"{name}.py").read_text()) for name in ("cuda", "cpu"))
ATTENTION = ast.parse((PLATFORM / "cuda_attention.py").read_text())


def collect() -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def public_functions(tree: ast.Module) -> dict[str, str]:
    """Name → signature of each public function of a module."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return {f.name: f"({ast.unparse(f.args)}) -> {ast.unparse(f.returns) if f.returns else None}" for f in functions}


def constants(tree: ast.Module) -> dict[str, object]:
    nodes = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    return {ast.unparse(node.targets[0]): node.value.value for node in nodes}  # type: ignore[attr-defined]


def source_of(module: str) -> ast.Module:
    """A Megatron-Core module's source, found without importing it: the CUDA ones need Transformer Engine."""
    spec = importlib.util.find_spec("megatron.core")
    assert spec is not None and spec.submodule_search_locations
    path = Path(spec.submodule_search_locations[0], *module.split(".")[2:])
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
    assert file.is_file(), f"{module} is not in the installed Megatron-Core"
    return ast.parse(file.read_text())


def defined_names(tree: ast.Module) -> set[str]:
    kinds = ast.FunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def fields(module: str, name: str) -> set[str]:
    """Annotated fields of a dataclass in Megatron-Core."""
    (node,) = (n for n in source_of(module).body if isinstance(n, ast.ClassDef) and n.name == name)
    return {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}


def test_transformer_engine_finds_torch_s_cudnn_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the first libcudnn.so* below CUDNN_HOME, and only then looks into the site's toolkits."""
    from megatron_ext.platform import cuda

    monkeypatch.setenv("CUDNN_HOME", "/opt/site/cudnn")
    cuda._use_torch_s_cudnn()
    (cudnn,) = Path(os.environ["CUDNN_HOME"]).rglob("libcudnn.so*")
    files = importlib.metadata.files("nvidia-cudnn-cu13") or []
    assert cudnn.resolve() in [Path(str(file.locate())).resolve() for file in files]


@pytest.mark.parametrize("absent", ["nvidia", "nvidia.cudnn"])
def test_where_torch_brings_no_cudnn_the_sites_own_is_found(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that has it elsewhere."""
    from megatron_ext.platform import cuda, features

    monkeypatch.setenv("CUDNN_HOME", "/opt/site/cudnn")
    monkeypatch.delitem(sys.modules, "nvidia.cudnn", raising=False)
    monkeypatch.setitem(sys.modules, absent, None)  # type: ignore[arg-type]
    assert features.cudnn_folder() is None
    cuda._use_torch_s_cudnn()
    assert os.environ["CUDNN_HOME"] == "/opt/site/cudnn"


def test_torch_rounds_all_pinned_memory_that_it_keeps() -> None:
    """Else torch 2.13 gives a kept block to a request that is larger than the block."""
    import torch

    from megatron_ext.platform import cuda

    torch._C._accelerator_setAllocatorSettings(cuda.ALLOCATOR_SETTING)
    settings = dict(part.split(":") for part in torch._C._accelerator_getAllocatorSettings().split(","))
    assert settings.keys() == {"pinned_max_cached_size_mb"}, "by default all that is kept is rounded"


def test_both_platforms_have_the_same_functions() -> None:
    assert public_functions(CUDA) == public_functions(CPU)
    assert constants(CUDA).keys() >= {"name", "backend"}
    assert (constants(CUDA)["name"], constants(CUDA)["backend"]) == ("cuda", "nccl")
    assert (constants(CPU)["name"], constants(CPU)["backend"]) == ("cpu", "gloo")


def test_the_platform_documentation_names_every_function() -> None:
    documentation = ast.get_docstring(ast.parse((PLATFORM / "__init__.py").read_text())) or ""
    named = set(re.findall(r"``(\w+)", documentation))
    assert named == {*public_functions(CUDA), "name", "backend"}


def test_what_the_cuda_side_takes_from_megatron_core_is_there() -> None:
    taken = [
        (node.module, alias.name)
        for node in itertools.chain(ast.walk(CUDA), ast.walk(ATTENTION))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron.core")
        for alias in node.names
    ]
    assert len(taken) >= 3
    assert [f"{module}.{name}" for module, name in taken if name not in defined_names(source_of(module))] == []


def test_the_transformer_engine_spec_takes_the_arguments_that_it_is_given() -> None:
    """The function takes ``*args, **kwargs`` and hands them on to the one whose signature counts."""
    tree = source_of("megatron.core.models.gpt.gpt_layer_specs")
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    spec = functions["get_gpt_layer_with_transformer_engine_spec"]
    inner = "get_gpt_layer_with_transformer_engine_submodules"
    assert any(isinstance(node, ast.Name) and node.id == inner for node in ast.walk(spec))
    given = [
        keyword.arg
        for node in ast.walk(CUDA)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == spec.name
        for keyword in node.keywords
    ]
    assert given and set(given) <= {argument.arg for argument in functions[inner].args.args}


@pytest.mark.parametrize("tree", [CUDA, CPU], ids=["cuda", "cpu"])
def test_config_options_are_fields_of_the_transformer_config(tree: ast.Module) -> None:
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "config_options")
    (options,) = (n for n in ast.walk(function) if isinstance(n, ast.Dict))
    names = {key.value for key in options.keys if isinstance(key, ast.Constant)}
    known = fields("megatron.core.transformer.transformer_config", "TransformerConfig")
    known |= fields("megatron.core.model_parallel_config", "ModelParallelConfig")
    assert names and names <= known


def test_the_gpu_checks_import_and_are_listed_in_the_documentation() -> None:
    """Each test function of tests/gpu has its row in docs/gpu_checks.md, and no row names one that is gone."""
    done = collect()
    assert done.returncode == 0, done.stdout + done.stderr
    collected = set(re.findall(r"^tests/gpu/(test_\w+\.py::test_\w+)", done.stdout, re.MULTILINE))
    assert len(collected) >= 10
    listed = re.findall(r"`(test_\w+\.py::test_\w+)`", (ROOT / "docs" / "gpu_checks.md").read_text())
    assert sorted(listed) == sorted(collected)

    # Each figure that calibrate reads is of one of them, and each file of checks is of a rung's command.
    taken: set[str] = set()

    def measured(check: str, figure: str) -> float:
        taken.add(check.partition("[")[0])
        return 1.0

    for estimate in itertools.chain(*calibrate.RUNGS.values()):
        estimate.measured(measured)
    assert taken and taken <= collected
    commands = [subprocess.run(["make", "-n", rung], cwd=ROOT, capture_output=True, text=True).stdout for rung in RUNGS]
    words = re.findall(r"\w+", " ".join(commands))
    assert {check.partition(".py")[0].removeprefix("test_") for check in collected} <= {
        word.removeprefix("test_") for word in words
    }


def test_without_gpus_the_checks_of_each_rung_fail_with_one_clear_message() -> None:
    files = [f"tests/gpu/test_{name}.py" for name in ("recipe", "node_recipe", "two_nodes")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": "/nowhere"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "passed" not in done.stdout.splitlines()[-1] and "skipped" not in done.stdout.splitlines()[-1]
    for message in (
        "no CUDA device is visible: these checks need one NVIDIA GPU and `make gpu-check EXTRA=gpu`",
        "0 CUDA devices are visible: these checks need 8 of one node and `make gpu-check-node EXTRA=gpu`",
        "no sbatch: these checks are started on a cluster's login node, `make gpu-check-two-nodes EXTRA=gpu`",
    ):
        assert message in done.stdout
