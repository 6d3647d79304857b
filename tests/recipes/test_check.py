"""recipes.check: the bounds of the recipes hold for the measured runs, and each bound fails where it should."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes import check
from recipes.check import FAILS, HOLDS, NOT_IN_THIS_RUN, Bound
from recipes.errors import ConfigError
from recipes.run import records

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
RECIPES = (
    "demo",
    "ladder_demo",
    "safework_7b",
    "safework_70b",
    "safework_72b",
    "safework_72b_async",
    "safework_72b_long",
    "safework_78b",
)
MEASURED_LADDERS = json.loads((RESULTS / "ladder_demo.json").read_text())["seeds"]
STAGES = {"ladder_demo": ("sft", "judge", "rl_general", "rl_safety", "rl_efficient", "rl_search")}
EVERY_BOUND = [
    (recipe, stage, number)
    for recipe in RECIPES
    for stage in STAGES.get(recipe, ("rl",))
    for number in range(len(check.load_bounds(recipe, stage)))
]


def write_run(folder: Path, recipe: str, stage: str, files: dict[str, Any]) -> Path:
    """A run's folder with these records: a list of rows for a .jsonl file, else a mapping."""
    folder.mkdir(parents=True, exist_ok=True)
    trains = ["sft"] if stage in ("sft", "judge") else ["rl"]
    config = {"recipe": {"name": recipe}, "stage": {"name": stage, "trains": trains}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".jsonl":
            records.append_rows(path, content)
        else:
            records.write_json(path, content)
    return folder


def rows_of_curves(curves: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl from the curves of benchmarks/demo_seeds.py, which leaves out the times."""
    # Runs that were measured before the metric was renamed.
    renamed = {name.replace("logprob_gap", "train_inference_mismatch"): curve for name, curve in curves.items()}
    steps = range(len(renamed["step"]))
    return [{"time/step": 1.0} | {name: curve[step] for name, curve in renamed.items()} for step in steps]


def measured_demo(seed: str) -> dict[str, Any]:
    run = json.loads((RESULTS / "demo_seeds.json").read_text())["seeds"][seed]
    warm_start = [{"step": step, "loss": 3.2 - 0.1 * step, "skipped_updates": 0} for step in range(1, 31)]
    return {
        "metrics.jsonl": rows_of_curves(run["curves"]),
        "evaluation.json": run["evaluation"],
        "warm_start/metrics.jsonl": warm_start,
    }


def measured_ladder(folder: Path, seed: str) -> Path:
    """A pipeline's folder with what benchmarks/results/ladder_demo.json has of each stage."""
    ladder = MEASURED_LADDERS[seed]
    for row in ladder["stages"][1:]:
        changes = {
            name.removesuffix("_change"): {"mean": change} for name, change in row.items() if name.endswith("_change")
        }
        write_run(folder / row["stage"], "ladder_demo", row["stage"], {"evaluation.json": {"difference": changes}})
    write_run(folder / "judge", "ladder_demo", "judge", {"judge.json": {"accuracy": ladder["judge_accuracy"]}})
    return folder


def inside(bound: Bound) -> float:
    """A value that a bound allows."""
    if bound.low is not None and bound.high is not None:
        return (bound.low + bound.high) / 2
    return bound.low if bound.low is not None else bound.high or 0.0


def outside(bound: Bound) -> float:
    return bound.high + 1.0 if bound.high is not None else (bound.low or 0.0) - 1.0


def files_for(file: str, bound: Bound, value: float) -> dict[str, Any]:
    """The records of a run in which the bound's value is ``value``."""
    if file.endswith(".jsonl"):
        rows = [{"step": step, bound.metric: 0.0 if bound.minus else value} for step in range(1, 61)]
        first, last = (step if step > 0 else 61 + step for step in bound.steps)
        for row in rows[first - 1 : last]:
            row[bound.metric] = value
        return {file: rows}
    content: Any = value
    for key in reversed(bound.metric.split(".")):
        content = {key: content}
    return {file: content}


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_the_measured_demo_runs_are_within_the_bounds(seed: str, tmp_path: Path) -> None:
    results = check.check(write_run(tmp_path / "run", "demo", "rl", measured_demo(seed)))
    assert {result.state for result in results} == {HOLDS}, [result.line() for result in results]


@pytest.mark.parametrize("seed", list(MEASURED_LADDERS))
def test_the_measured_ladders_are_within_the_bounds(seed: str, tmp_path: Path) -> None:
    results = check.check(measured_ladder(tmp_path, seed))
    assert FAILS not in {result.state for result in results}, [result.line() for result in results]
    checked = {result.file.split("/")[0] for result in results if result.state == HOLDS}
    assert checked == set(STAGES["ladder_demo"])


@pytest.mark.parametrize(("recipe", "stage", "number"), EVERY_BOUND)
def test_every_bound_holds_within_its_limits_and_fails_outside(
    recipe: str, stage: str, number: int, tmp_path: Path
) -> None:
    file, bound = check.load_bounds(recipe, stage)[number]
    states = []
    for name, value in (("inside", inside(bound)), ("outside", outside(bound))):
        run = write_run(tmp_path / name, recipe, stage, files_for(file, bound, value))
        results = [result for result in check.check_run(run, "") if result.limit != "in every step"]
        assert len(results) == len(check.load_bounds(recipe, stage))
        assert results[number].description == bound.describe()
        states.append(results[number].state)
    assert states == [HOLDS, FAILS]


def test_bounds_are_about_metrics_that_runs_write() -> None:
    (row, *_) = measured_demo("1")["metrics.jsonl"]
    bounds = [check.load_bounds(recipe, stage)[number] for recipe, stage, number in EVERY_BOUND]
    names = {bound.metric for file, bound in bounds if file == "metrics.jsonl"}
    assert names <= row.keys()


ROWS: list[dict[str, Any]] = [
    {"step": step, "x": float(step), "gap": None if step == 2 else 1.0} for step in range(1, 7)
]
for row in ROWS[2::3]:
    row["every third"] = row["x"]


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        (Bound("x", low=1, high=6), (HOLDS, "1 to 6")),
        (Bound("x", high=4), (FAILS, "5 at step 5")),
        (Bound("x", high=4, steps=(1, 4)), (HOLDS, "1 to 4")),
        (Bound("x", low=6, steps=(-1, -1)), (HOLDS, "6")),
        (Bound("x", low=3.5, of="mean"), (HOLDS, "3.5")),
        (Bound("x", low=4.0, of="mean", steps=(-2, -1), minus=(1, 2)), (HOLDS, "4")),
        (Bound("x", low=4.1, of="mean", steps=(-2, -1), minus=(1, 2)), (FAILS, "4")),
        (Bound("x", low=0, steps=(-7, -1)), (NOT_IN_THIS_RUN, "")),
        (Bound("x", low=0, steps=(1, 7)), (NOT_IN_THIS_RUN, "")),
        (Bound("y", low=0), (NOT_IN_THIS_RUN, "")),
        (Bound("gap", low=0), (FAILS, "no value at step 2")),
        (Bound("gap", low=0, steps=(3, -1)), (HOLDS, "1")),
        (Bound("every third", low=3), (HOLDS, "3 to 6")),
        (Bound("every third", high=5), (FAILS, "6 at step 6")),
        (Bound("every third", low=4.5, of="mean"), (HOLDS, "4.5")),
        (Bound("every third", low=0, steps=(1, 1)), (NOT_IN_THIS_RUN, "")),
        (Bound("every third", low=0, of="mean", minus=(1, 2)), (NOT_IN_THIS_RUN, "")),
    ],
)
def test_rows_are_compared_by_step(bound: Bound, expected: tuple[str, str]) -> None:
    assert check.check_rows(bound, ROWS) == expected


def test_a_row_without_a_required_metric_is_named(tmp_path: Path) -> None:
    files = measured_demo("1")
    for row in files["metrics.jsonl"][5:]:
        del row["sync/bytes"]
    first, *_ = check.check(write_run(tmp_path, "demo", "rl", files))
    assert (first.state, first.value) == (FAILS, "sync/bytes missing")


def test_the_required_metrics_are_a_promise() -> None:
    """To whoever reads metrics.jsonl: a key may be added, none may go."""
    promised = "step reward/mean grad_norm response_length/mean time/step sync/bytes"
    promised += " train_inference_mismatch/mean train_inference_mismatch/max"
    assert set(promised.split()) <= set(records.REQUIRED_METRICS)


def test_what_can_not_be_checked_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml there; give the folder of a run"):
        check.check(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"recipe\.name=own: no bounds in .*own\.yaml"):
        check.check(write_run(tmp_path / "own", "own", "rl", {}))
    with pytest.raises(ConfigError, match="none of the bounds is in this run"):
        check.check(write_run(tmp_path / "begun", "demo", "rl", {}))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"metric": "x", "lowest": 1}, "no field lowest; the fields are metric, low, high, steps, of, minus"),
        ({"metric": "x"}, "give metric, and low, high or both"),
        ({"metric": "x", "low": 1, "of": "last"}, "of=last: use every or mean"),
        ({"metric": "x", "low": 1, "minus": [1, 2]}, "minus subtracts a mean; add of: mean"),
    ],
)
def test_an_entry_that_is_no_bound_is_an_error(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check.parse_bound(entry, "demo.yaml: metrics.jsonl")


def test_the_command_prints_a_line_per_bound_and_exits_with_1_when_one_fails(tmp_path: Path) -> None:
    files = measured_demo("2")
    good = write_run(tmp_path / "good", "demo", "rl", files)
    files["metrics.jsonl"][3]["skipped_updates"] = 1
    del files["evaluation.json"]
    bad = write_run(tmp_path / "bad", "demo", "rl", files)
    printed = {}
    for run, code in ((good, 0), (bad, 1), (tmp_path / "none", 1)):
        done = subprocess.run(
            [sys.executable, "-m", "recipes.check", f"run={run}"], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        printed[run] = done.stdout + done.stderr
    assert len(printed[good].splitlines()) == len(check.load_bounds("demo", "rl")) + 2
    assert "holds            metrics.jsonl  kl/reference, step 1: 0  (limit = 0)" in printed[good]
    assert "fails            metrics.jsonl  skipped_updates: 1 at step 4  (limit <= 0)" in printed[bad]
    assert "1 fail, 9 are not in this run" in printed[bad]
    assert printed[tmp_path / "none"].startswith("error: run=")
