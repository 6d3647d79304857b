"""Runs all stages of the ladder demo with several seeds: ``python -m benchmarks.ladder 1 2 3``.

It runs ``python -m recipes.train recipe=ladder_demo`` once per seed into ``runs/ladder_seed_<n>`` and writes
``benchmarks/results/ladder_demo.json``. It prints each stage's target measures and how much each seed changed them. A
seed's entry has each stage's measures and seconds, the judge's accuracy and the total time. ``--reuse`` keeps complete
runs of an earlier command with the same code and data.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import figures, seeded
from recipes.run import records

RESULT = figures.RESULTS / "ladder_demo.json"
# Each stage's target: a measure of ladder.json that it should change.
AIMS = {
    "sft": ("accuracy", "unsafe/harmful", "unsafe/jailbreak"),
    "rl_general": ("accuracy",),
    "rl_safety": ("unsafe/harmful", "unsafe/jailbreak", "over_refusal/borderline", "over_refusal/benign"),
    "rl_efficient": ("reasoning_length", "accuracy"),
    "rl_search": ("search_accuracy", "false_certain", "accuracy"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.add_argument("seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--reuse", action="store_true", help="keep runs that are complete")
    arguments = parser.parse_args()
    made_by = figures.source("benchmarks.ladder", recipes=["ladder_demo"])
    runs = {seed: Path(f"runs/ladder_seed_{seed}") for seed in arguments.seeds}
    for seed, run_dir in runs.items():
        seeded.run(run_dir, "ladder_demo", seed, reuse=arguments.reuse)
    first_stage = runs[arguments.seeds[0]] / "sft"
    seeds = {str(seed): collect(run_dir) for seed, run_dir in runs.items()}
    result = {
        **json.loads((first_stage / "environment.json").read_text()),
        "precision": yaml.safe_load((first_stage / "config.yaml").read_text())["precision"]["name"],
        "seeds": seeds,
    }
    figures.write(RESULT, " ".join(["python -m benchmarks.ladder", *sys.argv[1:]]), made_by, result)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(seeds))
    console.print(f"{RESULT} has all measures")


def collect(run_dir: Path) -> dict[str, Any]:
    """A run's measures and seconds per stage, its judge's accuracy, its overrides, digests and minutes."""
    finished_stages = [json.loads(path.read_text()) for path in run_dir.glob(f"*/{records.FINISHED}")]
    return {
        **json.loads((run_dir / seeded.PROVENANCE).read_text()),
        "stage_seconds": {stage["stage"]: stage["seconds"] for stage in finished_stages},
        "judge_accuracy": json.loads((run_dir / "judge" / "judge.json").read_text())["accuracy"],
        **json.loads((run_dir / "ladder.json").read_text()),
    }


def table(seeds: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row for each stage and target measure, a column for each seed: the value and the change."""
    shown = Table("stage", "measure", *(f"seed {seed}" for seed in seeds))
    for stage, measures in AIMS.items():
        for measure in measures:
            shown.add_row(stage, measure, *(_cell(of_seed["stages"], stage, measure) for of_seed in seeds.values()))
        shown.add_section()
    judges = [figures.with_interval(of_seed["judge_accuracy"], ".2f") for of_seed in seeds.values()]
    shown.add_row("judge", "accuracy", *judges)
    shown.add_row("all", "minutes", *(f"{of_seed['minutes']:.1f}" for of_seed in seeds.values()))
    return shown


def _cell(stages: list[dict[str, Any]], name: str, measure: str) -> str:
    """A stage's measure, and its change from the previous stage with the interval over the same prompts."""
    (stage,) = (stage for stage in stages if stage["stage"] == name)
    digits = ".1f" if measure == "reasoning_length" else ".2f"
    change = {"mean": stage[f"{measure}_change"], "interval": stage[f"{measure}_change_interval"]}
    return f"{stage[measure]:{digits}}, {figures.with_interval(change, '+' + digits)}"


if __name__ == "__main__":
    main()
