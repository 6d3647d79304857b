"""``benchmarks.figures``: a file of results is of the present code, or says what has changed since it was made."""

import json
from pathlib import Path

import pytest

from benchmarks import figures

CHANGES = (
    ("recipes/a.py", "1"),
    ("recipes/a.py", "2"),
    ("conf/b.yaml", "1"),
    ("rewards/data/c.jsonl", "1"),
    ("benchmarks/d.py", "1"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in (*(f"{room}/__init__.py" for room in figures.ROOMS), "rewards/data/rows.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize(("name", "content"), CHANGES)
def test_code_configuration_and_data_change_the_digest_of_their_room_alone(root: Path, name: str, content: str) -> None:
    before = figures.source(root)
    (root / name).write_text(content)
    after = figures.source(root)
    assert [room for room in figures.ROOMS if after[room] != before[room]] == [name.partition("/")[0]]


def test_a_file_that_moves_changes_the_digest_and_text_or_results_do_not(root: Path) -> None:
    before = figures.source(root)
    (root / "benchmarks" / "results").mkdir()
    (root / "benchmarks" / "results" / "x.json").write_text("{}")
    (root / "conf" / "README.md").write_text("text")
    (root / "recipes" / "a.pyc").write_text("cache")
    assert figures.source(root) == before
    (root / "rewards" / "data" / "rows.jsonl").rename(root / "rewards" / "rows.jsonl")
    assert figures.source(root) != before


def test_a_result_is_current_until_the_code_changes(root: Path) -> None:
    made_by = figures.source(root)
    path = root / "benchmarks" / "results" / "x.json"
    figures.write(path, "python -m benchmarks.x", made_by, {"seconds": 1.5})
    written = json.loads(path.read_text())
    assert (written["command"], written["source"], written["seconds"]) == ("python -m benchmarks.x", made_by, 1.5)
    assert figures.state(path, figures.source(root)) == figures.CURRENT
    (root / "conf" / "a.yaml").write_text("a: 1")
    (root / "rollout" / "a.py").write_text("a = 1")
    assert figures.state(path, figures.source(root)) == "changed since: rollout, conf"


def test_a_file_without_a_digest_says_so_and_one_of_gpu_checks_has_one_for_each(root: Path) -> None:
    made_by = figures.source(root)
    path = root / "gpu" / "one_gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"first": {"source": made_by}, "second": {"source": made_by}}))
    assert figures.state(path, made_by) == figures.CURRENT
    path.write_text(json.dumps({"first": {"source": made_by}, "second": {"source": {**made_by, "conf": "other"}}}))
    assert figures.state(path, made_by) == "changed since: conf"
    path.write_text(json.dumps({"first": {"source": made_by}, "second": {}}))
    assert figures.state(path, made_by) == figures.NO_DIGEST
    path = root / "old.json"
    path.write_text(json.dumps({"date": "2026-11-24", "seconds": 1.5}))
    assert figures.state(path, made_by) == figures.NO_DIGEST


def test_the_list_has_every_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(figures, "RESULTS", root)
    figures.write(root / "new.json", "python -m benchmarks.new", figures.source(), {})
    (root / "old.json").write_text("{}")
    figures.main()
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "new.json" in line)
    assert "python -m benchmarks.new" in line and figures.CURRENT in line
    (line,) = (line for line in shown.splitlines() if "old.json" in line)
    assert figures.NO_DIGEST in line
    assert "1 of 2 files are stale" in shown
