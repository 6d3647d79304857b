"""The faults of ``tests.former_faults`` are of the present code, and of every row of the table that they are about."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.former_faults import FAULTS, NOT_TRIED, Fault

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "verification.md").read_text()
SECTION = PAGE.partition("## First contact with GPUs\n")[2].partition("\n## ")[0]
_, *ROWS = re.findall(r"^\| (.*) \| .* \| (.*) \|$", SECTION, re.MULTILINE)


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def named_tests(cell: str) -> list[str]:
    """A file, or a file and a function."""
    return re.findall(r"`(tests/\w+/\w+\.py(?:::\w+)?|tests/\w+\.py(?:::\w+)?)`", cell)


def is_named(test: str, named: list[str]) -> bool:
    file, _, function = test.partition("[")[0].partition("::")
    return file in named or f"{file}::{function}" in named


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_is_of_the_present_code_and_its_test_exists(fault: Fault) -> None:
    assert (ROOT / fault.file).read_text().count(fault.text) == 1
    assert fault.text not in fault.former or fault.former.count(fault.text) == 1 < len(fault.former)
    file, _, name = fault.test.partition("::")
    function = functions(file)[name.partition("[")[0]]
    assert "[" not in name or any("parametrize" in ast.unparse(decorator) for decorator in function.decorator_list)
    (cell,) = [cell for finding, cell in ROWS if finding.startswith(fault.finding)]
    assert is_named(fault.test, named_tests(cell))


def test_every_test_of_the_table_has_a_fault_or_a_reason_why_not() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    without = []
    for finding, cell in ROWS:
        tried = [fault.test for fault in FAULTS if finding.startswith(fault.finding)]
        without += [test for test in named_tests(cell) if not any(is_named(one, [test]) for one in tried)]
        if not tried:
            without.append(finding)
    assert sorted(set(without)) == sorted(NOT_TRIED)


def test_the_page_says_of_how_many_rows_a_test_was_seen_to_fail() -> None:
    rows = [finding for finding, _ in ROWS if any(finding.startswith(fault.finding) for fault in FAULTS)]
    assert f"Of {len(rows)} of the {len(ROWS)} rows a test was seen to fail" in SECTION
