"""The visual demo's data and model: what their builders write, and no image or row in two files."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from recipes.data.rows import load_rows
from recipes.data.vqa import model
from recipes.data.vqa.build import FOLDER, SPLITS, build
from recipes.errors import ConfigError
from rewards.registry import find_rule

ROOT = Path(__file__).resolve().parents[2]


def load(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


FILES = {split: load(split) for split in SPLITS}


def test_files_are_what_the_generator_writes() -> None:
    assert build() == FILES


def test_the_model_s_folder_is_what_its_generator_writes(tmp_path: Path) -> None:
    model.main(tmp_path)
    folder = ROOT / model.FOLDER
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in tmp_path.iterdir())
    for file in tmp_path.iterdir():
        assert file.read_text() == (folder / file.name).read_text(), file.name
    shape = folder.parent / "architectures" / "vqa_tiny.json"
    assert shape.read_text() == (folder / "config.json").read_text(), "what the preflight reads before the first run"


def test_no_image_is_in_two_rows() -> None:
    """A question about the image of a training row would be answered from memory."""
    images = Counter(row["images"][0] for rows in FILES.values() for row in rows)
    assert max(images.values()) == 1


def test_rows_can_be_loaded_and_their_answers_are_right() -> None:
    for split in SPLITS:
        rows = load_rows(str(FOLDER / f"{split}.jsonl"))
        assert len(rows) == len(FILES[split])
        for row in rows:
            assert Path(row["images"][0]).is_file()
            assert find_rule("exact")(row, row["answer"]).score == 1


def test_no_answer_is_right_for_much_more_than_its_kind_s_share() -> None:
    """Within a kind the answers are even, so that a constant one earns little."""
    of_kind: dict[str, Counter[str]] = {}
    for row in FILES["test"]:
        of_kind.setdefault(row["kind"], Counter())[row["answer"]] += 1
    for kind, counts in of_kind.items():
        assert max(counts.values()) < 1.35 * counts.total() / len(counts), kind


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    row = FILES["test"][0] | {"images": ["package:no_such_package/a.png"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match="package 'no_such_package' is not installed"):
        load_rows(str(tmp_path / "rows.jsonl"))[0]
