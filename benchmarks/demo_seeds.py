"""The demo with several seeds: what RL gained with each, and whether a fixed seed gives the same curve again.

``python -m benchmarks.demo_seeds 1 2 3`` runs ``make demo``'s command once per seed into ``runs/demo_seed_<n>``, writes
``benchmarks/results/demo_seeds.json`` and prints a table. ``--repeat 1`` runs that seed a second time and compares.
``--reuse`` keeps runs that this command finished before with the same code, data and overrides.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from recipes.run import records

RESULT = Path("benchmarks/results/demo_seeds.json")
FINISHED = "finished.json"  # in a run's folder, written last: what ran, and how long the whole command took
SOURCES = ("recipes", "megatron_ext", "rollout", "rewards", "conf")
SOURCE_SUFFIXES = (".py", ".yaml", ".jsonl")
EDGE_STEPS = 3  # steps that "first" and "last" response lengths are means of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_seeds", description=__doc__)
    parser.add_argument("seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--repeat", type=int, metavar="SEED", help="run this seed a second time and compare")
    parser.add_argument("--reuse", action="store_true", help="keep runs that are complete")
    parser.add_argument("--override", action="append", default=[], metavar="KEY=VALUE", help="Hydra override of a run")
    arguments = parser.parse_args()
    if arguments.repeat is not None and arguments.repeat not in arguments.seeds:
        parser.error(f"--repeat {arguments.repeat}: name it among the seeds as well")
    runs = {seed: run(seed, f"runs/demo_seed_{seed}", arguments) for seed in arguments.seeds}
    first = next(iter(runs.values()))
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.demo_seeds", *sys.argv[1:]]),
        **json.loads((first / "environment.json").read_text()),
        "seeds": {str(seed): collect(folder) for seed, folder in runs.items()},
    }
    if arguments.repeat is not None:
        again = run(arguments.repeat, f"runs/demo_seed_{arguments.repeat}_again", arguments)
        result["repeat"] = {"seed": arguments.repeat, **compare(runs[arguments.repeat], again)}
    RESULT.parent.mkdir(exist_ok=True)
    records.write_json(RESULT, result)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(result["seeds"]))
    if "repeat" in result:
        same = "identical" if result["repeat"]["identical"] else f"not identical: {result['repeat']['differences']}"
        console.print(f"seed {result['repeat']['seed']} run twice: {same}")
    console.print(f"{RESULT} has the curves")


def run(seed: int, folder: str, arguments: argparse.Namespace) -> Path:
    """One demo run from nothing, unless it is complete and may be kept; its folder.

    Raises CalledProcessError when the run fails and RuntimeError when a source file changed while it ran.
    """
    run_dir, before = Path(folder), source_digest(Path("."))
    overrides = ["recipe=demo", f"seed={seed}", f"run_dir={folder}", *arguments.override]
    made_by = {"overrides": overrides, "source": before}
    if arguments.reuse and (run_dir / FINISHED).is_file():
        if made_by.items() <= json.loads((run_dir / FINISHED).read_text()).items():
            return run_dir
        print(f"{folder} was made by other code, data or overrides: running it again", flush=True)
    shutil.rmtree(run_dir, ignore_errors=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "recipes.train", *overrides], check=True)
    minutes = (time.monotonic() - started) / 60
    if source_digest(Path(".")) != before:
        raise RuntimeError(f"code or data changed while {folder} was made, which makes it worthless: run it again")
    records.write_json(run_dir / FINISHED, {**made_by, "minutes": minutes})
    return run_dir


def source_digest(root: Path) -> str:
    """One digest of the code, configuration and data that a run depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for room in SOURCES for path in (root / room).rglob("*") if path.suffix in SOURCE_SUFFIXES):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def collect(run_dir: Path) -> dict[str, Any]:
    """One run's evaluation (without transcripts), response lengths, minutes, and a curve per metric."""
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    lengths = [row["response_length/mean"] for row in rows]
    return {
        **json.loads((run_dir / FINISHED).read_text()),
        "evaluation": {name: part for name, part in evaluation.items() if name != "transcripts"},
        "response_length": {"first": fmean(lengths[:EDGE_STEPS]), "last": fmean(lengths[-EDGE_STEPS:])},
        "seconds_per_step": fmean(row["time/step"] for row in rows),
        "curves": curves(rows),
    }


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Metric → its value at each step; without what a clock measured."""
    names = dict.fromkeys(name for row in rows for name in row)
    timed = {name for name in names if name.startswith("time/")} | {records.TOKENS_PER_SECOND}
    return {name: [row.get(name) for row in rows] for name in names if name not in timed}


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Whether two runs made the same metrics (times aside), samples and evaluation, to the last bit.

    ``differences`` names what differs: a metric with its first differing step, or a file.
    """
    one, two = (curves(list(records.read_rows(folder / "metrics.jsonl"))) for folder in (first, second))
    differences = []
    for name in dict.fromkeys([*one, *two]):
        a, b = one.get(name, []), two.get(name, [])
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            differences.append(f"{name} from step {at + 1}")
    for name in ("samples.jsonl", "evaluation.json"):
        if (first / name).read_bytes() != (second / name).read_bytes():
            differences.append(name)
    return {"identical": not differences, "differences": differences}


def table(seeds: Mapping[str, Mapping[str, Any]]) -> Table:
    """Per seed and score: base, before and after RL, and the paired difference with its interval."""
    stages = list(records.model_stages(next(iter(seeds.values()))["evaluation"]).items())
    found = Table("seed", "score", *(heading for _, heading in stages), "RL's difference", "length", "minutes")
    for seed, part in seeds.items():
        length = part["response_length"]
        ends = [f"{length['first']:.1f} → {length['last']:.1f}", f"{part['minutes']:.1f}"]
        for i, (score, mode, values, difference) in enumerate(records.evaluation_rows(part["evaluation"])):
            low, high = difference["interval"]
            found.add_row(
                seed if i == 0 else "",
                f"{score}, {mode}",
                *(f"{values[stage]['mean']:.3f}" for stage, _ in stages),
                f"{difference['mean']:+.3f} [{low:+.3f}, {high:+.3f}]",
                *(ends if i == 0 else ["", ""]),
            )
        found.add_section()
    return found


if __name__ == "__main__":
    main()
