"""Runs the demo with several seeds. Shows what RL changes with each seed, and whether a repeated seed repeats the run.

``python -m benchmarks.demo_seeds 1 2 3`` runs the command of ``make demo`` once per seed into ``runs/demo_seed_<n>``,
writes ``benchmarks/results/demo_seeds.json`` and prints a table. ``--repeat 1`` runs that seed a second time and
compares the two runs. ``--reuse`` keeps complete runs of an earlier command with the same code, data and overrides.
``--recipe demo_vision`` does the same with the visual demo. Its name is then in the names of the folders and the file.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import figures, seeded
from recipes.run import records, sample_files

RECIPES = ("demo", "demo_vision")
EDGE_STEPS = 3  # the "first" and "last" response lengths are means over this many steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_seeds", description=__doc__)
    parser.add_argument("seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    parser.add_argument("--repeat", type=int, metavar="SEED", help="run this seed a second time and compare")
    parser.add_argument("--reuse", action="store_true", help="keep runs that are complete")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="Hydra override of a run")
    arguments = parser.parse_args()
    if arguments.repeat is not None and arguments.repeat not in arguments.seeds:
        parser.error(f"--repeat {arguments.repeat}: name it among the seeds as well")
    # An override may take any configuration.
    recipes = [] if arguments.override else [arguments.recipe]
    made_by = figures.source("benchmarks.demo_seeds", recipes=recipes)

    def trained(seed: int, suffix: str = "") -> Path:
        run_dir = Path(f"runs/{arguments.recipe}_seed_{seed}{suffix}")
        seeded.run(run_dir, arguments.recipe, seed, more=arguments.override, reuse=arguments.reuse)
        return run_dir

    runs = {seed: trained(seed) for seed in arguments.seeds}
    first_run = runs[arguments.seeds[0]]
    result = {
        **json.loads((first_run / "environment.json").read_text()),
        "seeds": {str(seed): collect(run_dir) for seed, run_dir in runs.items()},
    }
    if arguments.repeat is not None:
        repeated_run = trained(arguments.repeat, "_again")
        result["repeat"] = {"seed": arguments.repeat, **compare(runs[arguments.repeat], repeated_run)}
    path = figures.RESULTS / f"{arguments.recipe}_seeds.json"
    figures.write(path, " ".join(["python -m benchmarks.demo_seeds", *sys.argv[1:]]), made_by, result)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(result["seeds"]))
    if "repeat" in result:
        same = "identical" if result["repeat"]["identical"] else f"not identical: {result['repeat']['differences']}"
        console.print(f"seed {result['repeat']['seed']} run twice: {same}")
    console.print(f"{path} has the curves")


def collect(run_dir: Path) -> dict[str, Any]:
    """A run's evaluation without its transcripts, response lengths, minutes, and a curve of each metric."""
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    lengths = [row["response_length/mean"] for row in rows]
    return {
        **json.loads((run_dir / seeded.PROVENANCE).read_text()),
        "evaluation": {name: part for name, part in evaluation.items() if name != "transcripts"},
        "response_length": {"first": fmean(lengths[:EDGE_STEPS]), "last": fmean(lengths[-EDGE_STEPS:])},
        "seconds_per_step": fmean(row["time/step"] for row in rows),
        "curves": curves(rows),
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Metric → its value at each step, for all metrics except times."""
    names = dict.fromkeys(name for row in rows for name in row)  # unique, in order
    clock_metrics = {name for name in names if name.startswith("time/")} | {records.TOKENS_PER_SECOND}
    return {name: [row.get(name) for row in rows] for name in names if name not in clock_metrics}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Whether two runs have bitwise equal metrics (except times), samples and evaluation.

    "differences" lists what differs: a metric with its first differing step, or a file.
    """
    first_curves = curves(list(records.read_rows(first / "metrics.jsonl")))
    second_curves = curves(list(records.read_rows(second / "metrics.jsonl")))
    differences = []
    for name in dict.fromkeys([*first_curves, *second_curves]):
        first_curve = first_curves.get(name, [])
        second_curve = second_curves.get(name, [])
        if first_curve != second_curve:
            step = first_difference(first_curve, second_curve) + 1
            differences.append(f"{name} from step {step}")
    if list(sample_files.read(first)) != list(sample_files.read(second)):
        differences.append("samples")
    if (first / "evaluation.json").read_bytes() != (second / "evaluation.json").read_bytes():
        differences.append("evaluation.json")
    return {"identical": not differences, "differences": differences}


def first_difference(first: Sequence[Any], second: Sequence[Any]) -> int:
    """The first index at which two different sequences differ, or at which the shorter one ends."""
    for i, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return i
    return min(len(first), len(second))


def table(seeds: Mapping[str, Mapping[str, Any]]) -> Table:
    """A row per seed and score: base, before RL, after RL, and the paired difference with its interval."""
    first_evaluation = next(iter(seeds.values()))["evaluation"]
    stages = records.model_stages(first_evaluation)
    scores = Table("seed", "score", *stages.values(), "RL's difference", "length", "minutes")
    for seed, summary in seeds.items():
        length = summary["response_length"]
        length_cell = f"{length['first']:.1f} → {length['last']:.1f}"
        minutes_cell = f"{summary['minutes']:.1f}"
        for i, (score, mode, values, difference) in enumerate(records.evaluation_rows(summary["evaluation"])):
            low, high = difference["interval"]
            is_first = i == 0
            scores.add_row(
                seed if is_first else "",
                f"{score}, {mode}",
                *(f"{values[stage]['mean']:.3f}" for stage in stages),
                f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]",
                length_cell if is_first else "",
                minutes_cell if is_first else "",
            )
        scores.add_section()
    return scores


if __name__ == "__main__":
    main()
