"""Every leaf of two recipes' configurations made wrong in every way: each case is possible or told, in one line."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from megatron_ext.settings import fields
from recipes.command_line import one_line
from recipes.config import Config, parse
from recipes.errors import ConfigError
from recipes.launch.requirements import check_parts, check_supervised
from tests.recipes.test_config import composed, overridden

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
SEED, CASES = 20250726, 65  # of each recipe, beside the unknown choices and the crossed fields
RECIPES = ("demo", "safework_72b")
RANGES = {path: described.range for path, _, described in fields(Config) if described and described.range}
GROUPS = "recipe stage model algorithm rewards parallel precision rollout data cluster logger".split()
REMEDY = re.compile(
    r"\b(use|give|must|set|name|needs?|lower|raise|did you mean|fields are|export|converted|Available options|drop|of "
    r"which|correct)\b"
)
CROSSED = [
    ("demo", "parallel.tensor=3"),
    ("demo", "parallel.sequence=true,parallel.tensor=1"),
    ("demo", "cluster.ranks=5"),
    ("demo", "rollout.max_response_tokens=100000"),
    ("demo", "data.max_prompt_tokens=100000"),
    ("demo", "parallel.micro_batch_tokens=8"),
    ("demo", "algorithm.updates_per_rollout=5"),
    ("demo", "algorithm.samples_per_prompt=3,cluster.ranks=36"),
    ("demo", "stage.sft.steps=null"),
    ("demo", "stage.sft.epochs=1"),
    ("demo", "stage.sft.rows_per_step=7,parallel.tensor=1,parallel.sequence=false"),
    ("demo", "rollout.staleness=1"),
    ("demo", "rollout.partial_rollout_tokens=16"),
    ("demo", "rollout.sleep=true"),
    ("demo", "rollout.thinking_marks=[a]"),
    ("demo", "data.images.min_pixels=100,data.images.max_pixels=10"),
    ("demo", "critic.warmup_steps=56"),
    ("demo", "parallel.virtual_pipeline=2"),
    ("demo", "parallel.first_stage_layers=4"),
    ("demo", "parallel.distributed_optimizer=false"),
    ("demo", "rewards.constraint.initial=9"),
    ("demo", "rewards.gate=capability,rewards.normalise=group"),
    ("demo", "rewards.server.host=0.0.0.0"),
    ("safework_72b", "cluster.ranks=48"),
    ("safework_72b", "parallel.micro_batch_tokens=16383"),
    ("safework_72b", "rewards.servers.value.port=8100"),
    ("safework_72b", "rewards.verifiers.safety.server=nobody"),
]


@dataclass(frozen=True)
class Case:
    """An override of one field; ``wrong``: it can't work by itself, whatever the other fields are."""

    recipe: str
    field: str
    override: str
    wrong: bool


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, below in value.items():
        if isinstance(below, dict) and below:
            yield from leaves(below, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", below


def misspelt(path: str, chance: random.Random) -> str:
    """Two letters of the last name exchanged, or one left out."""
    head, dot, name = path.rpartition(".")
    at = chance.randrange(max(1, len(name) - 1))
    if len(name) > 2 and name[at : at + 2] != name[at : at + 2][::-1] and chance.random() < 0.5:
        return f"{head}{dot}{name[:at]}{name[at + 1 : at + 2]}{name[at]}{name[at + 2 :]}"
    return f"{head}{dot}{name[:at]}{name[at + 1 :]}"


def mutations(recipe: str, path: str, value: Any, chance: random.Random) -> Iterator[Case]:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    checked = path in RANGES
    if number or path in RANGES:
        for text in ("many", "-1", "-0.5", "nan", "1e30", "1000000000000000000", "true", "[1]", "{a:1}"):
            yield Case(recipe, path, f"{path}={text}", checked)
        yield Case(recipe, path, f"{path}=0", False)
        yield Case(recipe, path, f"{path}=null", False)
    elif isinstance(value, bool):
        for text in ("perhaps", "2.5", "null", "[]"):
            yield Case(recipe, path, f"{path}={text}", True)
    else:
        for text in ("nonesuch", "-1", "null", "[1,2]", "{a:{b:1}}", "''"):
            yield Case(recipe, path, f"{path}={text}", False)
    free = path.startswith(
        ("algorithm.kwargs", "rollout.environment.settings", "rewards.mix", "data.mix", "data.scores")
    )
    free = free or re.match(r"rewards\.verifiers\.\w+\.(request|arguments)", path)
    wrong = misspelt(path, chance)
    yield Case(recipe, wrong, f"{wrong}=1", True)
    yield Case(recipe, wrong, f"+{wrong}=1", not free)


def chosen(recipe: str, raw: DictConfig) -> list[Case]:
    """A seeded sample with some of each kind of mutation, and of as many fields as there are cases."""
    chance = random.Random(f"{SEED}/{recipe}")
    fields = list(leaves(OmegaConf.to_container(raw, resolve=True)))
    by_field = [list(mutations(recipe, path, value, chance)) for path, value in fields]
    chance.shuffle(by_field)
    sample: list[Case] = []
    while len(sample) < CASES:
        for cases in by_field:
            if cases and len(sample) < CASES:
                sample.append(cases.pop(chance.randrange(len(cases))))
    return sample


def outcome(make: Any, deep: bool) -> tuple[Any, str]:
    """The configuration and "", or None and the line that a user reads. Anything else but these errors is raised."""
    try:
        config = parse(make())
        if deep:
            check_supervised(config)
            check_parts(config)
        return config, ""
    except ConfigError as error:
        return None, str(error)
    except HydraException as error:
        return None, one_line(error)


@pytest.fixture(scope="module")
def recipes() -> dict[str, DictConfig]:
    return {recipe: composed(f"recipe={recipe}") for recipe in RECIPES}


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def told(line: str, field: str) -> list[str]:
    """What a user would miss in the line."""
    missing = []
    names = [name for name in re.split(r"[.\[\]]+", field) if name]
    if not any(name in line for name in (names[-1], field)):
        missing.append("the field")
    if "\n" in line:
        missing.append("one line")
    if not REMEDY.search(line):
        missing.append("a remedy")
    return missing


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_mutation_is_possible_or_told(recipe: str, recipes: dict[str, DictConfig]) -> None:
    cases = chosen(recipe, recipes[recipe])
    assert len(cases) == CASES
    failures, refused = [], 0
    for case in cases:
        deep = case.field.startswith(("algorithm.", "data.", "rewards.", "rollout.environment"))
        try:
            config, line = outcome(lambda case=case: overridden(recipes[recipe], [case.override]), deep)
        except Exception as error:
            failures.append(f"{case.override}: {type(error).__name__}: {error}")
            continue
        refused += config is None
        if config is None and (missing := told(line, case.field)):
            failures.append(f"{case.override}: lacks {', '.join(missing)}: {line}")
        if config is not None and case.wrong:
            failures.append(f"{case.override}: was taken")
    assert failures == []
    assert refused > CASES // 2


def test_a_misspelt_field_is_told_with_the_nearest(recipes: dict[str, DictConfig]) -> None:
    chance = random.Random(SEED)
    fields = [path for path in RANGES if not path.startswith(("stage.reward_model", "stage.value_model"))]
    for path in chance.sample(fields, 20):
        wrong = misspelt(path, chance)
        for override in (f"{wrong}=1", f"+{wrong}=1"):
            _, line = outcome(lambda override=override: overridden(recipes["demo"], [override]), False)
            assert re.match(rf"{re.escape(wrong)}(=1)?: no such field; did you mean {re.escape(path)}\?", line), line


@pytest.mark.parametrize("group", GROUPS)
def test_an_unknown_choice_is_told_with_those_there_are(group: str) -> None:
    first = [] if group == "recipe" else ["recipe=demo"]
    _, line = outcome(lambda: composed(*first, f"{group}=nonesuch"), False)
    assert f"{group}/nonesuch" in line
    options = {path.stem for path in (CONF / group).glob("*.yaml")}
    assert options <= set(re.split(r"\s+", line.partition(":")[2])), line


@pytest.mark.parametrize(("recipe", "overrides"), CROSSED)
def test_fields_that_do_not_go_together_are_told(recipe: str, overrides: str, recipes: dict[str, DictConfig]) -> None:
    parts = re.split(r",(?=\w+\.)", overrides)
    config, line = outcome(lambda: overridden(recipes[recipe], parts), False)
    assert config is None, "was taken"
    assert [part for part in parts if not told(line, part.partition("=")[0])], line


def test_overridden_is_what_compose_makes(recipes: dict[str, DictConfig]) -> None:
    overrides = [
        "algorithm.steps=7",
        "+rewards.mix.safety.length=0.5",
        "cluster.ranks=4",
        "data.sft=[a,b]",
        "seed=null",
    ]
    assert overridden(recipes["demo"], overrides) == composed("recipe=demo", *overrides)


def test_every_number_has_a_range() -> None:
    numbers = {path for path, hint, _ in fields(Config) if {int, float} & {hint, *get_args(hint)}}
    # The values of a list or mapping are checked with its length.
    without = {path for path in numbers if path not in RANGES}
    assert without == {"optimizer.betas", "data.mix"}
