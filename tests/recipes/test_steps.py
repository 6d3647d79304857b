"""Configurations that are accepted are trained for a step, on a tiny model and with no engine but that of ``steps``.

The algorithm's parts come in every pair; every number is at both ends of its range; every layout has four ranks.
"""

import math
import pickle
import random
from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from itertools import combinations, product, zip_longest
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_ext.settings import fields
from recipes.algorithms.registry import REGISTRY
from recipes.config import Config, parse
from recipes.launch.requirements import check_parts
from recipes.run import folder as run_folder
from recipes.run import records
from tests.megatron_ext.ranks import start
from tests.recipes import tiny
from tests.recipes.kill_check import timeless
from tests.recipes.test_config import composed, overridden

SEED = 20250726
FINISHED = "hf/model.safetensors"
Choice = tuple[str, ...]  # overrides
Factors = Mapping[str, Sequence[Choice]]

PARTS: Factors = {
    **{part: [(f"algorithm.{part}={f.__name__}",) for f in functions] for part, functions in REGISTRY.items()},
    "kl_estimator": [
        ("algorithm.kl_coefficient=0",),
        *[
            (f"algorithm.kl_estimator={f.__name__}", f"algorithm.kl_in={place}", "algorithm.kl_coefficient=0.1")
            for f, place in product(REGISTRY["kl_estimator"], ("loss", "reward"))
            if (f.__name__, place) != ("k1", "loss")  # is refused
        ],
    ],
    "updates": [(f"algorithm.updates_per_rollout={n}",) for n in (1, 2, 4)],
    "mismatch": [
        (),
        ("algorithm.importance_sampling=token_truncated", "rollout.oversample=1.5", "rollout.partial_rollout_tokens=3"),
        ("algorithm.sequence_ratio_bounds=[0.5,2]",),
        ("algorithm.token_ratio_veto=0.01",),
    ],
    "entropy": [(), ("algorithm.entropy_coefficient=0.01",)],
    "overlong": [(), ("algorithm.overlong_fraction=0.5",)],
    "skip": [(), ("algorithm.skip_zero_advantage=false",)],
    "rounds": [(), ("algorithm.max_generation_batches=2",)],
    "forced": [(), ("rollout.thinking_budget=4",)],
    "rewards": [(), ("rewards.normalise=group",), ("rewards.constraint.verifier=safety",)],
    "rollout": [(), ("rollout.oversample=1.5",)],
}
VERIFIERS = {"safety": "safety", "general_rule": "capability"}  # by label
RANKS = 4
LAYOUTS: Sequence[Choice] = [
    ("parallel.tensor=1",),
    ("parallel.tensor=2", "parallel.sequence=true"),
    ("parallel.tensor=4", "parallel.sequence=true", "parallel.recompute=selective"),
    ("parallel.tensor=2", "parallel.sequence=false", "parallel.pipeline=2"),
    ("parallel.pipeline=2", "parallel.recompute=full"),
    ("parallel.pipeline=2", "parallel.context=2"),
    ("parallel.context=2",),
    ("parallel.context=4",),
    ("parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "parallel.recompute=full"),
]
# Of what a test has no time or memory for, and the mismatch that is refused while training.
NOT_AT_THE_END = {
    "algorithm.steps": "high",
    "algorithm.prompts_per_step": "high",
    "algorithm.samples_per_prompt": "high",
    "algorithm.updates_per_rollout": "high",
    "algorithm.max_mismatch": "low",
    # Refused beside the defaults of others.
    "critic.warmup_steps": "high",
    "rewards.constraint.initial": "high",
}
GROUPS = ("algorithm.", "critic.", "optimizer.", "checkpoint.", "rewards.constraint.", "rollout.temperature")


def pairwise(factors: Factors, chance: random.Random) -> list[Choice]:
    """Rows that together have every pair of choices of two factors; a greedy search."""
    names = list(factors)

    def pairs(row: Mapping[str, int]) -> set[tuple[str, int, str, int]]:
        return {(a, row[a], b, row[b]) for a, b in combinations(names, 2) if a in row and b in row}

    missing = {
        (a, i, b, j)
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    rows = []
    while missing:
        a, i, b, j = min(missing)
        row = {a: i, b: j}
        for name in chance.sample(names, len(names)):
            if name not in row:
                levels = chance.sample(range(len(factors[name])), len(factors[name]))
                row[name] = max(levels, key=lambda level: len(pairs({**row, name: level}) & missing))
        missing -= pairs(row)
        rows.append(tuple(override for name in names for override in factors[name][row[name]]))
    return rows


def ends(interval: str) -> dict[str, str]:
    """The lowest and the highest number of an interval like "(0, 1]"; next to an open end."""
    low, high = (float(number) for number in interval[1:-1].split(","))
    near = min(1e-6, (high - low) / 1e3)
    return {
        "low": f"{low if interval[0] == '[' else low + near:.12g}",
        "high": f"{high if interval[-1] == ']' else high - near:.12g}",
    }


def at_the_ends() -> Iterator[Choice]:
    """Each number of a step's settings at both ends of its range, with a part that reads it, and two updates."""
    for path, _, described in fields(Config):
        if described is None or described.range is None or not path.startswith(GROUPS):
            continue
        keyword = path.removeprefix("algorithm.")
        readers = [
            (f"algorithm.{part}={function.__name__}",)
            for part, functions in REGISTRY.items()
            for function in functions
            if keyword in signature(function).parameters
        ]
        reader: Choice = readers[-1] if readers else ()
        if path.startswith("critic.") or keyword == "value_clip":
            reader = ("algorithm.advantage=gae_whitened",)
        if path.startswith("rewards.constraint."):
            reader = ("rewards.constraint.verifier=safety",)
        updates = 1 if path == "algorithm.prompts_per_step" else 2
        for end, number in ends(described.range).items():
            if NOT_AT_THE_END.get(path) != end:
                yield f"algorithm.updates_per_rollout={updates}", *reader, f"{path}={number}"


def together(choices: Sequence[Choice]) -> Iterator[Choice]:
    """The same in half as many runs: two choices each, where they do not set the same field."""
    half = (len(choices) + 1) // 2
    for first, second in zip_longest(choices[:half], choices[half:], fillvalue=()):
        both = dict.fromkeys((*first, *second))
        if len({override.partition("=")[0] for override in both}) == len(both):
            yield tuple(both)
        else:
            yield from (first, second)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    tiny.make(folder)
    return folder


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.ROOT)


def configured(twin: Path, run_dir: Path, ranks: int, choice: Choice) -> Config:
    """An accepted configuration of one RL step."""
    _, recipe, _, *small = tiny.overrides(twin, run_dir)
    mixes = {label: f"{{{verifier}: 0.5, {tiny.LETTERS}: 0.5}}" for label, verifier in VERIFIERS.items()}
    overrides = [
        *small,
        "stage.evaluates=false",
        "stage.trains=[rl]",
        "~rewards.mix",
        "+rewards.mix={" + ", ".join(f"{label}: {mix}" for label, mix in mixes.items()) + "}",
        f"cluster.ranks={ranks}",
        "cluster.threads=1",
        "parallel.tensor=1",
        "parallel.sequence=false",
        "algorithm.steps=1",
        "optimizer.epsilon=1e-3",  # see tests/megatron_ext/cases.py
        "rewards.functions.processes=1",  # whose start takes as long as a third of such a run
        *choice,
    ]
    config = parse(overridden(composed(recipe, "rewards=base", "precision=fp32"), overrides))
    check_parts(config)
    return config


def trained(folder: Path, twin: Path, ranks: int, choices: Sequence[Choice]) -> list[Path]:
    """The folders of the runs."""
    run_dirs = [folder / f"{ranks}_ranks" / str(number) for number in range(len(choices))]
    for run_dir in run_dirs:
        run_dir.mkdir(parents=True)
        run_folder.mark(run_dir)
    configs = [configured(twin, run_dir, ranks, c) for run_dir, c in zip(run_dirs, choices, strict=True)]
    (folder / "configs.pickle").write_bytes(pickle.dumps(configs))
    process = start(folder / "log", "tests.recipes.steps", str(folder), str(ranks))
    process.wait()
    for run_dir, choice in zip(run_dirs, choices, strict=True):
        if not (run_dir / FINISHED).exists():
            logs = [*sorted(run_dir.glob("logs/rank_*.log")), folder / "log"]
            raise AssertionError(f"{choice} failed:\n" + "\n".join(log.read_text()[-6000:] for log in logs))
    return run_dirs


def metrics(run_dir: Path) -> dict[str, Any]:
    """Of the one step, without clocks."""
    (row,) = timeless(list(records.read_rows(run_dir / "metrics.jsonl")))
    return row


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / FINISHED)


def test_every_pair_of_an_algorithm_s_choices_makes_an_update(twin: Path, tmp_path: Path) -> None:
    """By the log-probabilities that transformers computes."""
    choices = pairwise(PARTS, random.Random(SEED))
    before = load_file(twin / "model" / "model.safetensors")
    for run_dir, choice in zip(trained(tmp_path, twin, 1, choices), choices, strict=True):
        row = metrics(run_dir)
        assert row["train_inference_mismatch/max"] < 1e-4, choice
        assert row["skipped_updates"] == 0 and math.isfinite(row["loss"]) and row["grad_norm"] > 0, choice
        after = weights(run_dir)
        assert any((after[name] != tensor).any() for name, tensor in before.items()), choice
        assert all(tensor.isfinite().all() for tensor in after.values()), choice


def test_a_number_at_an_end_of_its_range_makes_an_update_or_one_that_is_told_to_be_skipped(
    twin: Path, tmp_path: Path
) -> None:
    choices = list(together(list(at_the_ends())))
    for run_dir, choice in zip(trained(tmp_path, twin, 1, choices), choices, strict=True):
        row = metrics(run_dir)
        assert math.isfinite(row["grad_norm"]) if row["skipped_updates"] < 2 else row["grad_norm"] is None, choice
        assert all(tensor.isfinite().all() for tensor in weights(run_dir).values()), choice


def test_every_layout_makes_the_update_that_one_rank_makes(twin: Path, tmp_path: Path) -> None:
    """Each with other choices of the algorithm. Sums in another order differ by rounding."""
    rows = pairwise(PARTS, random.Random(SEED))
    chance = random.Random(SEED)
    choices = [(*row, "algorithm.skip_zero_advantage=false") for row in chance.sample(rows, len(LAYOUTS))]
    of_one_rank = trained(tmp_path, twin, 1, choices)
    of_several = trained(tmp_path, twin, RANKS, [(*c, *lay) for c, lay in zip(choices, LAYOUTS, strict=True)])
    for one, several, layout in zip(of_one_rank, of_several, LAYOUTS, strict=True):
        assert metrics(several) == pytest.approx(metrics(one), rel=1e-4, abs=1e-5), layout
        after = weights(several)
        for name, tensor in weights(one).items():
            torch.testing.assert_close(after[name], tensor, rtol=0, atol=1e-5, msg=f"{layout}: {name}")
