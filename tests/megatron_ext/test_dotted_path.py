"""An object by its dotted path, and what is refused."""

from pathlib import Path

import pytest

from megatron_ext import dotted_path


def test_an_attribute_of_a_module_is_loaded() -> None:
    assert dotted_path.load("megatron_ext.dotted_path.load") is dotted_path.load


@pytest.mark.parametrize("path", ["", "load", "no_such_package.function", "megatron_ext.no_such.load", "json.no_such"])
def test_a_path_without_an_object_is_refused(path: str) -> None:
    with pytest.raises(ValueError):
        dotted_path.load(path)


def test_an_import_that_fails_inside_the_module_keeps_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "has_a_missing_import.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        dotted_path.load("has_a_missing_import.function")
