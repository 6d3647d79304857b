"""Check a finished run against the bounds of its recipe: ``python -m recipes.check run=FOLDER``.

The bounds of a recipe are in ``conf/bounds/RECIPE.yaml``. FOLDER is the folder of a run, or that of a pipeline of
stages, which has one run per stage. The program prints one line per bound: whether the bound holds, fails or is not in
this run, the value and the limit. The exit code is 0 if no bound fails.

A file of bounds maps a file in the run's folder to a list of bounds. The key ``stages`` has further bounds for single
stages. The key ``base`` names another file whose bounds apply too. The fields of a bound are those of ``Bound``.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from recipes.errors import ConfigError
from recipes.run import records

BOUNDS = Path(__file__).resolve().parents[1] / "conf" / "bounds"
HOLDS = "holds"
FAILS = "fails"
NOT_IN_THIS_RUN = "not in this run"

type Steps = tuple[int, int]


@dataclass(frozen=True)
class Bound:
    """Limits of one value of a run."""

    # A key of the rows of a .jsonl file, or a path into a .json file, such as after.safety.mean.
    metric: str
    # The limits, which are themselves allowed values. At least one is needed.
    low: float | None = None
    high: float | None = None
    # The first and the last step that the bound applies to, [1, -1] for all. Negative numbers count from the last step.
    steps: Steps = (1, -1)
    # "every" for the value of every step, or "mean" for the mean over the steps.
    of: str = "every"
    # Steps whose mean is subtracted from the mean over "steps". Needs of: mean.
    minus: Steps | None = None

    def describe(self) -> str:
        """The compared value in words, such as ``reward/mean, mean of steps -5 to -1 minus that of 1 to 5``."""
        text = self.metric
        if self.steps == (1, 1):
            text += ", step 1"
        elif self.of == "mean":
            text += f", mean of steps {self.steps[0]} to {self.steps[1]}"
        elif self.steps != (1, -1):
            text += f", steps {self.steps[0]} to {self.steps[1]}"
        if self.minus is not None:
            text += f" minus that of {self.minus[0]} to {self.minus[1]}"
        return text

    def limit(self) -> str:
        """The limits, such as ``>= 0.05``."""
        if self.low == self.high:
            return f"= {figure(self.low)}"
        limits = []
        if self.low is not None:
            limits.append(f">= {figure(self.low)}")
        if self.high is not None:
            limits.append(f"<= {figure(self.high)}")
        return ", ".join(limits)

    def allows(self, value: float | None) -> bool:
        """Whether the value is within the limits. A missing value (None, such as a mean without samples) is not."""
        if value is None or not math.isfinite(value):
            return False
        if self.low is not None and value < self.low:
            return False
        return self.high is None or value <= self.high


@dataclass(frozen=True)
class Result:
    """The result of checking one bound."""

    file: str
    description: str
    limit: str
    # HOLDS, FAILS or NOT_IN_THIS_RUN.
    state: str
    value: str

    def line(self) -> str:
        value = f": {self.value}" if self.value else ""
        return f"{self.state:15}  {self.file}  {self.description}{value}  (limit {self.limit})"


def main() -> None:
    """Command line: print every result. The exit code is 1 when a bound fails."""
    argument = sys.argv[1] if len(sys.argv) == 2 else ""
    if not argument.startswith("run="):
        sys.exit("usage: python -m recipes.check run=FOLDER    for example run=runs/demo")
    try:
        results = check(Path(argument.removeprefix("run=")))
    except (ConfigError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for result in results:
        print(result.line())
    counts = Counter(result.state for result in results)
    print(f"{counts[HOLDS]} bounds hold, {counts[FAILS]} fail, {counts[NOT_IN_THIS_RUN]} are not in this run")
    sys.exit(1 if counts[FAILS] else 0)


def check(folder: Path) -> list[Result]:
    """The results of a run, or of all stages of a pipeline in the order of their folders.

    Raises ConfigError when there is no run, when its recipe has no bounds, and when none of the bounds is in the run.
    """
    if (folder / "config.yaml").is_file():
        results = list(check_run(folder, ""))
    else:
        stages = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not stages:
            raise ConfigError(f"run={folder}: no config.yaml there; give the folder of a run, such as runs/demo")
        results = [result for stage in stages for result in check_run(stage, f"{stage.name}/")]
    if all(result.state == NOT_IN_THIS_RUN for result in results):
        raise ConfigError(f"run={folder}: none of the bounds is in this run; let it finish first")
    return results


def check_run(run_dir: Path, prefix: str) -> Iterator[Result]:
    """Yield the results of one run. ``prefix`` is put before the names of the files."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    stage = config["stage"]
    if "rl" in stage["trains"]:
        yield check_required_metrics(run_dir, prefix)
    bounds = load_bounds(config["recipe"]["name"], stage["name"])
    contents: dict[str, Any] = {}
    for file, bound in bounds:
        if file not in contents:
            contents[file] = read_record(run_dir / file)
        content = contents[file]
        if isinstance(content, list):
            state, value = check_rows(bound, content)
        else:
            state, value = check_value(bound, content)
        yield Result(prefix + file, bound.describe(), bound.limit(), state, value)


def read_record(path: Path) -> list[dict[str, Any]] | dict[str, Any]:
    """The rows of a ``.jsonl`` file, or the content of a ``.json`` file. Empty when the file does not exist."""
    if path.suffix == ".jsonl":
        return list(records.read_rows(path)) if path.is_file() else []
    return json.loads(path.read_text()) if path.is_file() else {}


def check_required_metrics(run_dir: Path, prefix: str) -> Result:
    """Check that every row of metrics.jsonl has the metrics that every RL run writes."""
    rows = read_record(run_dir / "metrics.jsonl")
    missing = dict.fromkeys(name for row in rows for name in records.REQUIRED_METRICS if name not in row)
    state = FAILS if missing else HOLDS
    if not rows:
        state = NOT_IN_THIS_RUN
    value = f"{', '.join(missing)} missing" if missing else f"{len(rows)} steps"
    return Result(f"{prefix}metrics.jsonl", "the required metrics", "in every step", state, value)


def check_rows(bound: Bound, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The state and the value of a bound on the rows of a ``.jsonl`` file.

    A row without the metric did not measure it and is left out. A row in which the metric is null has no value, so the
    bound fails.
    """
    chosen = _rows_of(bound.steps, bound.metric, rows)
    subtracted = _rows_of(bound.minus, bound.metric, rows) if bound.minus is not None else []
    if not chosen or (bound.minus is not None and not subtracted):
        return NOT_IN_THIS_RUN, ""
    for row in (*chosen, *subtracted):
        value = row[bound.metric]
        if value is None:
            return FAILS, f"no value at step {row['step']}"
        if bound.of == "every" and not bound.allows(value):
            return FAILS, f"{figure(value)} at step {row['step']}"
    values = [row[bound.metric] for row in chosen]
    if bound.of == "every":
        lowest = min(values)
        highest = max(values)
        return HOLDS, figure(lowest) if lowest == highest else f"{figure(lowest)} to {figure(highest)}"
    mean = fmean(values)
    if subtracted:
        mean -= fmean(row[bound.metric] for row in subtracted)
    return HOLDS if bound.allows(mean) else FAILS, figure(mean)


def check_value(bound: Bound, content: Any) -> tuple[str, str]:
    """The state and the value of a bound on one value of a ``.json`` file."""
    value = content
    for key in bound.metric.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return NOT_IN_THIS_RUN, ""
        value = value[key]
    if value is None:
        return FAILS, "no value"
    return HOLDS if bound.allows(value) else FAILS, figure(value)


def load_bounds(recipe: str, stage: str) -> list[tuple[str, Bound]]:
    """The bounds of a recipe's stage, each with its file in the run's folder.

    Raises ConfigError when the recipe has no bounds. Raises ConfigError naming an entry that is not a valid bound.
    """
    path = BOUNDS / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in BOUNDS.glob("*.yaml")))
        raise ConfigError(f"recipe.name={recipe}: no bounds in {path}; write them, recipes with bounds are {known}")
    content = yaml.safe_load(path.read_text())
    base = content.pop("base", None)
    of_stages = content.pop("stages", {})
    bounds = load_bounds(base, stage) if base is not None else []
    for files in (content, of_stages.get(stage, {})):
        for file, entries in files.items():
            bounds += [(file, parse_bound(entry, f"{path.name}: {file}")) for entry in entries]
    return bounds


def parse_bound(entry: Mapping[str, Any], where: str) -> Bound:
    """Parse a bound from its YAML mapping. Raises ConfigError naming the entry and the field."""
    known = [field.name for field in fields(Bound)]
    for field in entry:
        if field not in known:
            raise ConfigError(f"{where}: {dict(entry)}: no field {field}; the fields are {', '.join(known)}")
    if "metric" not in entry or ("low" not in entry and "high" not in entry):
        raise ConfigError(f"{where}: {dict(entry)}: give metric, and low, high or both")
    if entry.get("of", "every") not in ("every", "mean"):
        raise ConfigError(f"{where}: {dict(entry)}: of={entry['of']}: use every or mean")
    if "minus" in entry and entry.get("of") != "mean":
        raise ConfigError(f"{where}: {dict(entry)}: minus subtracts a mean; add of: mean")
    ranges = {name: tuple(entry[name]) for name in ("steps", "minus") if name in entry}
    return Bound(**{**entry, **ranges})


def figure(value: float | None) -> str:
    """A number as text: integers in full, others with six significant digits."""
    return str(value) if value is None or isinstance(value, int) else f"{value:.6g}"


def _rows_of(steps: Steps, metric: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that have the metric, from the first to the last of ``steps``. Empty when the run has fewer steps."""
    first, last = (step if step > 0 else len(rows) + 1 + step for step in steps)
    if first < 1 or last > len(rows) or first > last:
        return []
    return [row for row in rows[first - 1 : last] if metric in row]


if __name__ == "__main__":
    main()
