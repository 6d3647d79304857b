"""The documentation names what is there: links, files, tests, modules, make targets, settings, and its own examples."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from megatron_ext.settings import mappings, with_new_keys
from recipes.config import Config, parse
from recipes.launch.requirements import check_parts

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = ("recipes", "megatron_ext", "rollout", "rewards", "conf", "slurm", "tests", "benchmarks", "docs")
# Names that the examples give to a reader's own files.
READERS_OWN = {"mine", "judged", "name", "my_conf"}
# A mapping whose keys the user chooses: what follows it in a dotted name is not checked.
FREE_FORM = {
    "algorithm.kwargs",
    "data.mix",
    "data.scores",
    "rewards.mix",
    "rewards.servers",
    "rewards.verifiers",
    "rollout.environment.settings",
}
# Files of a run's folder that look like dotted settings.
NOT_SETTINGS = re.compile(r"\.(py|md|yaml|json|jsonl|html|sh|txt|toml|png|svg)$")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def spans(page: Path) -> Iterator[str]:
    """The page's code: what stands in backticks, and its fenced and indented blocks, line by line."""
    text = page.read_text()
    fenced = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for block in fenced.findall(text):
        yield from block.splitlines()
    rest = fenced.sub("", text)
    yield from re.findall(r"`([^`\n]+)`", rest)
    yield from re.findall(r"^ {4}(\S.*)$", rest, re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_internal_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_and_test_that_is_named_exists(page: Path) -> None:
    missing = []
    for span in spans(page):
        for name in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*<>{{}}:-]*", span):
            path, _, test = name.rstrip(".:,").partition("::")
            parts = path.split("/")
            if any(mark in path for mark in "*<{") or READERS_OWN & {Path(part).stem for part in parts}:
                continue
            if re.search(r"/[A-Z_]+(\.\w+)?$", path) and not path.endswith("README.md"):
                continue  # slurm/sites/SITE.sh
            file = ROOT / path
            if not file.exists() or (test and f"def {test}" not in file.read_text()):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_module_and_make_target_that_is_named_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wrong = []
    for span in spans(page):
        for module in re.findall(r"python -m ([\w.]+)", span):
            file = ROOT / module.replace(".", "/")
            if module.split(".")[0] in FOLDERS and not (file.with_suffix(".py").is_file() or file.is_dir()):
                wrong.append(f"python -m {module}")
        wrong += [f"make {target}" for target in re.findall(r"^make ([a-z-]+)", span) if target not in targets]
    assert wrong == []


def groups() -> dict[str, set[str]]:
    """Each Hydra group of conf/ and the names in it."""
    folders = [folder for folder in (ROOT / "conf").iterdir() if folder.is_dir()]
    return {folder.name: {file.stem for file in folder.glob("*.yaml")} for folder in folders}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_choice_that_is_named_exists(page: Path) -> None:
    known = groups()
    wrong = []
    for span in spans(page):
        for group, name in re.findall(r"(?<![\w.+])\+?([a-z_]+)=([a-z]\w*)", span):
            if group in known and name not in known[group] | READERS_OWN:
                wrong.append(f"{group}={name}")
    assert wrong == []


@pytest.fixture(scope="module")
def everything() -> DictConfig:
    """A composed configuration; which recipe does not matter for the names of fields."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["recipe=demo", "+preflight=h100", "+simulate=h100", "+scale=h100"]
        return compose("config", overrides=overrides)


def is_field(config: DictConfig, name: str) -> bool:
    """Whether a dotted name is a field of the configuration, or a key of one of its free-form mappings."""
    node: object = config
    path = ""
    for key in name.split("."):
        if path in FREE_FORM:
            return True
        if not isinstance(node, dict) or key not in node:
            return path.startswith("rewards.servers")
        node = node[key]
        path = f"{path}.{key}".lstrip(".")
    return True


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_setting_that_is_named_exists(page: Path, everything: DictConfig) -> None:
    config = OmegaConf.to_container(everything, resolve=False)
    assert isinstance(config, dict)
    wrong = []
    for span in spans(page):
        for name in re.findall(r"(?<![\w./\"'-])([a-z_]+(?:\.[a-z_]+)+)(?![\w(/])", span):
            first = name.partition(".")[0]
            if first not in config or NOT_SETTINGS.search(name):
                continue
            if not is_field(config, name) and not names_code(name):
                wrong.append(name)
    assert wrong == []


def names_code(name: str) -> bool:
    """Whether a dotted name is a module, or something in one: rewards.verdict.Row."""
    parts = name.split(".")
    paths = [ROOT / "/".join(parts[:count]) for count in range(2, len(parts) + 1)]
    return any(path.is_dir() or path.with_suffix(".py").is_file() for path in paths)


def test_every_page_that_the_code_names_exists() -> None:
    missing = []
    for folder in ("recipes", "megatron_ext", "rollout", "rewards", "conf", "slurm", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".yaml", ".sh"):
                continue
            for page in re.findall(r"\b(?:docs|benchmarks)/\w+\.md", path.read_text()):
                if not (ROOT / page).is_file():
                    missing.append(f"{page_id(path)}: {page}")
    assert missing == []


def test_the_readme_is_short() -> None:
    assert README.read_text().count("\n") <= 90


def named_blocks(page: Path) -> dict[str, str]:
    """The page's code blocks whose first line is a comment that names a file: name → content."""
    blocks = {}
    for block in re.findall(r"^```\w*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        name = re.match(r"# ([\w/]+\.\w+)", block)
        if name:
            blocks[name[1]] = block
    return blocks


def commands(page: Path, text: str) -> list[list[str]]:
    """The arguments of the page's ``python -m recipes.…`` commands that contain ``text``; a backslash goes on."""
    joined = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^ {4}\S*python -m recipes\.(?:train|preflight) (.+)$", joined, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if text in line]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "quick_start.md"], ids=page_id)
def test_the_example_of_own_data_and_an_own_reward_is_accepted(page: Path, tmp_path, monkeypatch) -> None:
    """The reader's files as they stand on the page, and rows of the page's form: the configuration and every row pass
    the checks that a run makes before it starts anything."""
    for name, content in named_blocks(page).items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    rows = "".join(
        f'{{"id": "{i}", "label": "short", "kind": "chat", "prompt": "What is a bridge, in {i} words?"}}\n'
        for i in range(6)
    )
    for name in ("my_rows.jsonl", "my_heldout.jsonl"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")  # the demo's own data, which stands in conf/ by relative paths
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    tried = commands(page, "data=mine")
    assert tried
    for arguments in tried:
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            search_path = f"hydra.searchpath=[file://{tmp_path / 'conf'}]"
            config = parse(compose("config", overrides=[*with_new_keys(arguments, mappings(Config)), search_path]))
        if "rewards=judged" not in arguments:
            check_parts(config)


def texts(tree: ast.AST) -> Iterator[str]:
    """The string constants of a module, a placeholder in an f-string as "…"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
            yield "".join(map(str, parts))


def test_every_message_of_the_troubleshooting_page_is_one_of_the_codes() -> None:
    """The first column quotes messages; "…" stands for what varies."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 30
    rooms = [path for room in ("recipes", "megatron_ext", "rollout", "rewards") for path in (ROOT / room).rglob("*.py")]
    known = [" ".join(text.split()) for path in rooms for text in texts(ast.parse(path.read_text()))]
    known += [" ".join(path.read_text().split()) for path in (ROOT / "slurm").rglob("*.sh")]
    stale = []
    for message in quoted:
        pieces = [re.escape(piece.strip()) for piece in message.replace("\\|", "|").split("…") if piece.strip(" =:")]
        pattern = re.compile(".*".join(pieces))
        if not any(pattern.search(text) for text in known):
            stale.append(message)
    assert stale == []


def test_the_glossary_has_every_metric() -> None:
    """Keys with a slash that the loops record, and those of records.REQUIRED_METRICS."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    recording = [
        *(ROOT / "recipes" / "training").glob("*.py"),
        ROOT / "recipes" / "algorithms" / "objective.py",
        ROOT / "rewards" / "verifiers" / "search.py",
    ]
    keys = set()
    for path in recording:
        for text in texts(ast.parse(path.read_text())):
            if re.fullmatch(r"[a-z_]+/[a-z_]+", text) and not text.startswith("build/"):
                keys.add(text)
    keys.discard("train_inference_mismatch/tokens")  # a sum that means are made of
    missing = sorted(key for key in keys if f"`{key}`" not in page)
    assert len(keys) > 10
    assert missing == []


def test_the_picture_of_the_architecture_is_drawn_from_the_present_imports(tmp_path) -> None:
    drawing = tmp_path / "architecture.svg"
    subprocess.run([sys.executable, "docs/draw_architecture.py", str(drawing)], cwd=ROOT, check=True)
    assert drawing.read_text() == (ROOT / "docs" / "architecture.svg").read_text(), (
        "run: python docs/draw_architecture.py"
    )


def test_the_algorithms_page_has_every_algorithm_and_every_part() -> None:
    page = (ROOT / "docs" / "algorithms.md").read_text()
    names = {path.stem for path in (ROOT / "conf" / "algorithm").glob("*.yaml")}
    registry = (ROOT / "recipes" / "algorithms" / "registry.py").read_text()
    names |= set(re.findall(r"(?:advantages|policy_losses|kl|aggregation|mismatch)\.(\w+)[,)]", registry))
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_the_stages_page_has_every_stage() -> None:
    page = (ROOT / "docs" / "stages.md").read_text()
    names = sorted(path.stem for path in (ROOT / "conf" / "stage").glob("*.yaml") if path.stem != "base")
    assert [name for name in names if f"`{name}`" not in page] == []


def test_the_layouts_page_has_every_large_recipe() -> None:
    page = (ROOT / "docs" / "layouts.md").read_text()
    names = [path.stem for path in (ROOT / "conf" / "recipe").glob("safework_*.yaml")]
    large = [
        name for name in names if "recipe" in (yaml.safe_load((ROOT / "conf/recipe" / f"{name}.yaml").read_text()))
    ]
    assert [name for name in sorted(large) if f"`{name}`" not in page] == []
