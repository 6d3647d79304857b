"""``benchmarks.figures``: a file of results is of the present code, or says what has changed since it was made."""

import json
from pathlib import Path

import pytest

from benchmarks import figures

PROGRAM = "recipes.program"
FILES = {
    **{f"{room}/__init__.py": "" for room in figures.ROOMS if room != "conf"},
    "recipes/program.py": """
import recipes.at_the_top
PROCESS = ["-m", "rollout.server"]
def later(name):
    from rewards.judges.judge import verdict
    return importlib.import_module(f"megatron_ext.models.{name}")
""",
    "recipes/at_the_top.py": "from recipes import further\nfrom rewards import judges",
    "recipes/further.py": "import recipes.at_the_top",  # a circle ends
    "recipes/other.py": "import recipes.program",
    "rollout/server.py": "",
    "rewards/judges/__init__.py": "",
    "rewards/judges/judge.py": "def verdict(): return 1",
    "rewards/judges/other.py": "",
    "megatron_ext/models/one.py": "",
    "rewards/data/rows.jsonl": "",
    "conf/a.yaml": "",
}
DEPENDED_ON = [
    "recipes/__init__.py", "recipes/program.py", "recipes/at_the_top.py", "recipes/further.py", "rollout/server.py",
    "rewards/judges/__init__.py", "rewards/judges/judge.py", "megatron_ext/models/one.py", "rewards/data/rows.jsonl",
    "conf/a.yaml",
]  # fmt: skip
OTHERS = ["recipes/other.py", "rewards/judges/other.py"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize("name", DEPENDED_ON)
def test_a_change_of_what_a_program_depends_on_changes_the_digest_of_its_room_alone(root: Path, name: str) -> None:
    before = figures.source(PROGRAM, root)
    added = {".py": "\na = 1\n", ".yaml": "\na: 1\n", ".jsonl": "\n"}[Path(name).suffix]
    (root / name).write_text((root / name).read_text() + added)
    after = figures.source(PROGRAM, root)
    assert [room for room in figures.ROOMS if after[room] != before[room]] == [name.partition("/")[0]]


CODE = """
def total(
    values: list[int],
) -> int:
    name = "#"
    return sum(values)
"""
SAME = [
    '"""A module."""\n' + CODE,
    CODE.replace("    name", '    """A docstring."""\n    name'),
    CODE.replace("sum(values)", "sum(values)  # a comment\n# another\n"),
    CODE.replace("(\n    values: list[int],\n)", "(values: list[int],)"),
]
OTHER = [
    CODE.replace('"#"', '"# "'),
    CODE.replace("sum", "max"),
    CODE.replace("    return", "return"),
    CODE.replace('    name = "#"\n', '    """#"""\n'),
]


@pytest.mark.parametrize("code", SAME)
def test_comments_docstrings_and_line_breaks_of_code_do_not_count(code: str) -> None:
    assert figures.statements(code) == figures.statements(CODE)


@pytest.mark.parametrize("code", OTHER)
def test_every_statement_of_code_counts(code: str) -> None:
    assert code != CODE
    assert figures.statements(code) != figures.statements(CODE)


def test_comments_of_configuration_do_not_count_but_the_one_that_hydra_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    contents = ["a: '# 1'", "# one\na: '# 1'  # two", "a: 1", "# @package _global_\na: '# 1'"]
    effects = []
    for content in contents:
        path.write_text(content)
        effects.append(figures.effective(path))
    assert effects[0] == effects[1]
    assert len(set(effects)) == 3


def test_other_code_text_and_results_do_not_change_it_and_a_new_module_of_a_loaded_package_does(root: Path) -> None:
    before, everything = figures.source(PROGRAM, root), figures.source(None, root)
    for name in (*OTHERS, "conf/README.md", "conf/bounds/a.yaml", "benchmarks/results/x.json", "recipes/a.pyc"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("changed = True")
    assert figures.source(PROGRAM, root) == before
    changed = [room for room, digest in figures.source(None, root).items() if digest != everything[room]]
    assert changed == ["recipes", "rewards"], "a check on a GPU may depend on all code"
    (root / "megatron_ext/models/two.py").write_text("")
    assert figures.source(PROGRAM, root) != before


# Two recipes, one with a ladder of stages. `small` names a file of data, and so does code.
RECIPES = {
    "conf/config.yaml": "defaults:\n- _self_\n- stage: rl\n- recipe: ???\nrows: null",
    "conf/recipe/small.yaml": "# @package _global_\nrows: recipes/data/small.jsonl",
    "conf/recipe/ladder.yaml": "# @package _global_\ndefaults: [{override /stage: all}]",
    "conf/stage/rl.yaml": "ladder: []",
    "conf/stage/sft.yaml": "ladder: []\nepochs: 2",
    "conf/stage/all.yaml": "ladder: [sft]",
    "recipes/data/small.jsonl": "",
    "recipes/data/by_code.jsonl": "",
    "recipes/data/other.jsonl": "",
    "recipes/further.py": "PROMPTS = 'recipes/data/by_code.jsonl'",
}


@pytest.mark.parametrize(
    ("changed", "text", "of_small", "of_ladder"),
    [
        ("conf/config.yaml", "\nsteps: 1", ["conf"], ["conf"]),
        ("conf/config.yaml", "\n# a comment", [], []),
        ("conf/recipe/small.yaml", "\nsteps: 3", ["conf"], []),
        ("conf/stage/sft.yaml", "\nsteps: 3", [], ["conf"]),
        ("conf/stage/unused.yaml", "a: 1", [], []),
        ("recipes/data/small.jsonl", "{}", ["recipes"], []),
        ("recipes/data/by_code.jsonl", "{}", ["recipes"], ["recipes"]),
        ("recipes/data/other.jsonl", "{}", [], []),
        ("rollout/server.py", "a = 1", ["rollout"], ["rollout"]),
    ],
)
def test_of_a_recipe_counts_what_it_composes_and_the_data_that_it_or_the_code_names(
    root: Path, changed: str, text: str, of_small: list[str], of_ladder: list[str]
) -> None:
    for name, content in RECIPES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    before = {recipe: figures.source(PROGRAM, root, [recipe]) for recipe in ("small", "ladder")}
    path = root / "benchmarks" / "results" / "x.json"
    figures.write(path, f"python -m {PROGRAM}", before["small"], {})
    assert figures.state(path, root) == figures.CURRENT
    (root / changed).write_text((root / changed).read_text() + text if (root / changed).exists() else text)
    for recipe, rooms in (("small", of_small), ("ladder", of_ladder)):
        after = figures.source(PROGRAM, root, [recipe])
        assert [room for room in figures.ROOMS if after[room] != before[recipe][room]] == rooms
        assert after[figures.OF_RECIPES] == [recipe]
    assert figures.state(path, root) == (f"changed since: {of_small[0]}" if of_small else figures.CURRENT)


def test_a_file_that_moves_changes_the_digest(root: Path) -> None:
    before = figures.source(PROGRAM, root)
    (root / "rewards" / "data" / "rows.jsonl").rename(root / "rewards" / "rows.jsonl")
    assert figures.source(PROGRAM, root) != before


def test_a_run_depends_on_its_engines_and_families_and_not_on_the_page() -> None:
    files = {str(path.relative_to(figures.ROOT)) for path in figures.importable("recipes.train", figures.ROOT)}
    needed = {"recipes/training/rl.py", "rollout/engine_server.py", "megatron_ext/models/llama.py", "rewards/mixing.py"}
    assert needed <= files
    assert not [name for name in files if name.startswith(("recipes/page/", "benchmarks/"))]


def test_a_result_is_current_until_the_code_changes(root: Path) -> None:
    made_by = figures.source(PROGRAM, root)
    path = root / "benchmarks" / "results" / "x.json"
    command = f"python -m {PROGRAM} --seconds 2"
    figures.write(path, command, made_by, {"seconds": 1.5})
    written = json.loads(path.read_text())
    assert (written["command"], written["source"], written["seconds"]) == (command, made_by, 1.5)
    assert figures.state(path, root) == figures.CURRENT
    (root / "conf" / "b.yaml").write_text("a: 1")
    (root / "rollout" / "server.py").write_text("a = 1")
    assert figures.state(path, root) == "changed since: rollout, conf"


def test_a_file_without_a_digest_says_so_and_one_of_gpu_checks_has_one_for_each(root: Path) -> None:
    made_by = figures.source(None, root)
    path = root / "gpu" / "one_gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"first": {"source": made_by}, "second": {"source": made_by}}))
    assert figures.state(path, root) == figures.CURRENT
    path.write_text(json.dumps({"first": {"source": made_by}, "second": {"source": {**made_by, "conf": "other"}}}))
    assert figures.state(path, root) == "changed since: conf"
    path.write_text(json.dumps({"first": {"source": made_by}, "second": {}}))
    assert figures.state(path, root) == figures.NO_DIGEST
    path = root / "old.json"
    path.write_text(json.dumps({"date": "2026-11-24", "seconds": 1.5}))
    assert figures.state(path, root) == figures.NO_DIGEST


def test_the_list_has_every_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(figures, "RESULTS", root)
    command = "python -m benchmarks.loop"
    figures.write(root / "new.json", command, figures.source("benchmarks.loop"), {})
    (root / "old.json").write_text("{}")
    figures.main()
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "new.json" in line)
    assert command in line and figures.CURRENT in line
    (line,) = (line for line in shown.splitlines() if "old.json" in line)
    assert figures.NO_DIGEST in line
    assert "1 of 2 files are stale" in shown
