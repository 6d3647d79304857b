"""A fake of ``transformer_engine_torch``, the compiled part of Transformer Engine: its names, and no kernels.

Functions and enumerations are those that the sources of the pinned version bind. A function raises when it is called,
unless ``fake_kernels`` computes it.
"""

import enum
import importlib.machinery
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.te import packages

NAME = "transformer_engine_torch"
EXPORT = "transformer_engine.pytorch.onnx_extensions"
EXPORTED = (
    "torch_onnx_gemm_inf_op",
    "onnx_quantize_fp8_op",
    "onnx_dequantize_fp8_op",
    "onnx_quantize_mxfp8_op",
    "onnx_dequantize_mxfp8_op",
    "onnx_layernorm",
    "onnx_attention_mask_func",
    "onnx_gemm",
    "te_translation_table",
)
BINDINGS = ("csrc/extensions/pybind.cpp", "common_headers/common/util/pybind_helper.h")
DTYPES = "common_headers/common/include/transformer_engine/transformer_engine.h"
CUDNN = 92000  # 9.20.0, see pins.txt


def bindings(sources: Path) -> str:
    """The text that binds the extension, lines joined that a backslash continues."""
    return "".join((sources / file).read_text() for file in BINDINGS).replace("\\\n", "\n")


def functions(text: str) -> list[str]:
    """Names of the bound functions."""
    return re.findall(r'\bm\.def\(\s*"(\w+)"', text)


def classes(text: str) -> list[str]:
    """Names of the bound classes."""
    return re.findall(r'\bclass_<[^;]*?>\s*\(\s*m,\s*"(\w+)"', text)


def enumerations(text: str, dtypes: dict[str, int]) -> dict[str, dict[str, int]]:
    """Enumeration → member → value. Members count from 0 in C++, but for those of ``dtypes``."""
    by_name = {}
    for declared in re.finditer(r'\benum_<[^>]+>\s*\(\s*m, "(\w+)"[^;]*;', text):
        members = re.findall(r'\.value\(\s*"(\w+)"', declared.group())
        by_name[declared[1]] = {member: dtypes.get(member, place) for place, member in enumerate(members)}
    return by_name


def dtype_values(sources: Path) -> dict[str, int]:
    """``kByte`` and so on → value."""
    text = (sources / DTYPES).read_text()
    return {f"k{name}": int(value) for name, value in re.findall(r"\bkNVTE(\w+) = (\d+)", text)}


def _not_computed(name: str, module: str = NAME) -> Callable[..., Any]:
    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{module}.{name}: no kernel without a GPU, and no fake of it")

    function.__name__ = name
    return function


def build() -> types.ModuleType:
    """The fake module."""
    sources = packages.sources()
    text = bindings(sources)
    module = types.ModuleType(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    for name in functions(text):
        setattr(module, name, _not_computed(name))
    for name in classes(text):
        setattr(module, name, type(name, (), {}))
    for name, members in enumerations(text, dtype_values(sources)).items():
        setattr(module, name, enum.IntEnum(name, members))
    module.get_cudnn_version = lambda: CUDNN  # type: ignore[attr-defined]
    return module


def install() -> types.ModuleType:
    """Make ``import transformer_engine.pytorch`` work in this process; returns the fake module.

    Neither the core library nor CUDA's libraries are loaded: Transformer Engine leaves them out while it is built. Its
    export to ONNX needs packages that nothing here does, so that there is none.
    """
    sys.path.insert(0, str(packages.site()))
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    sys.modules[NAME] = module = build()
    sys.modules[EXPORT] = export = types.ModuleType(EXPORT)
    for name in EXPORTED:
        setattr(export, name, _not_computed(name, EXPORT))
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    return module
