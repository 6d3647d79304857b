"""Megatron-Core and Transformer Engine fit each other: every call, in sources of the pinned versions."""

import ast
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.te import contract
from tests.te.contract import File

# Calls that do not fit and are never made here, by target.
UNUSED = {
    "transformer_engine.pytorch.cpp_extensions.gemm.general_gemm": "workspace: set for older versions alone",
    "transformer_engine.pytorch.ep.ep_bootstrap": "experts",
}


def test_every_call_into_transformer_engine_fits_its_signature(examined: dict[str, Any]) -> None:
    """Names, positional arguments, keywords, also those collected in a dictionary, and how many values come back."""
    calls = examined["calls"]["calls"]
    assert {target for _, target, fault in calls if fault is not None} == set(UNUSED)
    called = {target for _, target, _ in calls}
    needed = ("Linear.__init__", "LayerNormLinear.__init__", "DotProductAttention.__init__")
    assert [name for name in needed if not any(target.endswith(name) for target in called)] == []
    assert len(calls) > 100


def test_every_name_that_is_imported_without_an_alternative_is_there(examined: dict[str, Any]) -> None:
    assert examined["calls"]["unguarded"] == []


def library(a: int, b: int = 0, *, c: int = 0) -> tuple[int, int]:
    return a + b, c


def fault(call: str) -> str | None:
    tree = ast.parse(f"def f(options):\n    options['c'] = 1\n    options['d'] = 1\n    {call}")
    file = File("f.py", tree, {"te": SimpleNamespace(library=library)}, [])
    (te_call,) = contract._calls(file)
    return te_call.fault


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("x, y = te.library(1, 2, c=3)", None),
        ("te.library(1, 2, 3)", "takes 2 positional arguments, not 3"),
        ("te.library(1, d=2)", "takes no d"),
        ("te.library(1, **options)", "takes no d"),
        ("te.library(b=2)", "lacks a"),
        ("x, y, z = te.library(1)", "returns [2] values, not 3"),
        ("te.librarian(1)", "no te.librarian"),
    ],
)
def test_a_call_that_does_not_fit_is_found(call: str, expected: str | None) -> None:
    assert fault(call) == expected


def test_branches_for_other_versions_are_left_out(tmp_path: Path) -> None:
    source = (
        "if is_te_min_version('2.0'):\n    new()\nelse:\n    old()\nif not is_te_min_version('3.0') and x:\n    y()\n"
    )
    (tmp_path / "f.py").write_text(source)
    tree = contract.parse(tmp_path / "f.py", tmp_path, "2.20.2").tree
    assert ast.unparse(tree).split() == "new() if not is_te_min_version('3.0') and x: y()".split()
