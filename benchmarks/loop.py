"""Time per phase of the demo's RL step, next to plain transformers and bare vLLM in the same run.

``python -m benchmarks.loop [Hydra overrides]`` writes ``benchmarks/results/loop.json`` and prints its tables. The loop
that is timed is ``recipes.training.rl.fit`` itself. After the train and the generate phase, off their clocks and while
the ranks wait, a yardstick does the same work, so that both sides of a ratio run within seconds of each other.
"""

import json
import os
import shutil
import statistics
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from benchmarks.yardsticks import GENERATION, TRAINING
from megatron_ext.processes import die_with
from recipes import command_line, train
from recipes.config import Config, parse
from recipes.errors import ConfigError
from recipes.run import records

REPETITIONS = 3  # RL steps that count; one more goes before them and warms both sides up
RUN_DIR = Path("runs/benchmark_loop")
RESULT = Path("benchmarks/results/loop.json")
TRAINING_GOAL = 1.0  # our seconds / plain transformers' seconds, at most
GENERATION_GOAL = 0.95  # our tokens/s / bare vLLM's tokens/s, at least

# The demo's step. The learning rate is too small to move a weight, so that bare vLLM, which is never synced, keeps
# the weights that our engine has, and every repetition starts from the same; an update takes as long at any rate.
SETTINGS = (
    "recipe=demo",
    f"algorithm.steps={1 + REPETITIONS}",
    "algorithm.learning_rate=1e-30",
    f"checkpoint.every_steps={1 + REPETITIONS}",
)


def main() -> None:
    overrides = [*SETTINGS, *sys.argv[1:], f"run_dir={RUN_DIR}", "resume=false"]
    try:
        with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
            config = parse(compose("config", overrides))
        check(config)
        if "RANK" not in os.environ:
            launch(config)
    except (ConfigError, HydraException) as error:
        print(f"error: {command_line.one_line(error) if isinstance(error, HydraException) else error}", flush=True)
        sys.exit(1)
    die_with(os.getppid())
    if os.environ["RANK"] == "0":
        train.report_sigterm(config)
    train.load(config)

    from benchmarks import measured_training

    try:
        answers = measured_training.run(config)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {error}\n(rank {os.environ['RANK']}; logs in {RUN_DIR}/logs)", flush=True)
        sys.exit(1)
    if answers is not None:
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python -m benchmarks.loop", *sys.argv[1:]]),
            "settings": overrides,
            **json.loads((RUN_DIR / "environment.json").read_text()),
            "load_average_before": float(os.environ["BENCHMARK_LOAD"]),
            **summarise(list(records.read_rows(RUN_DIR / "metrics.jsonl")), answers),
        }
        RESULT.parent.mkdir(exist_ok=True)
        records.write_json(RESULT, result)
        shutil.rmtree(RUN_DIR / "checkpoints")  # gigabytes of no use
        Console().print(*tables(result), f"{RESULT} has the raw times", sep="\n")


def check(config: Config) -> None:
    """Raises ConfigError for what the yardsticks have no counterpart of."""
    if config.rollout.engines != 1:
        raise ConfigError(f"rollout.engines={config.rollout.engines}: bare vLLM is one engine; use rollout.engines=1")
    if config.algorithm.steps < 2:
        raise ConfigError(f"algorithm.steps={config.algorithm.steps}: the first step only warms up; use 2 or more")


def launch(config: Config) -> None:
    """As ``recipes.train.launch``, from an empty folder."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    os.environ["BENCHMARK_LOAD"] = str(os.getloadavg()[0])
    train.launch(config)


def summarise(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians and ranges over the steps behind the first, and every raw number.

    Args:
        rows: metrics.jsonl, one row per step.
        answers: "training" and "generation", the yardsticks' answers, one per step.

    Raises:
        ValueError: a step without its answers, or no step behind the warm-up.
    """
    repetitions = [
        {"phases": {name: row[f"time/{name}"] for name in records.time_phases([row])}}
        | {"training": _training(row, plain), "generation": _generation(row, bare)}
        for row, plain, bare in zip(rows, answers["training"], answers["generation"], strict=True)
    ][1:]
    if not repetitions:
        raise ValueError("one step only, which warms up: run 2 or more (algorithm.steps)")
    sides: dict[str, Any] = {
        side: {name: spread(r[side][name] for r in repetitions) for name in names}
        for side, names in (
            ("training", ("seconds", "plain_seconds", "ratio")),
            ("generation", ("tokens_per_second", "bare_tokens_per_second", "ratio")),
        )
    }
    training, generation = (sides[side]["ratio"]["median"] for side in ("training", "generation"))
    return {
        "phases": {name: spread(r["phases"][name] for r in repetitions) for name in records.time_phases(rows[1:])},
        "training": {
            "yardstick": TRAINING,
            "ratio_is": "our seconds / plain transformers' seconds",
            "goal": f"≤ {TRAINING_GOAL}",
            "met": training <= TRAINING_GOAL,
            **sides["training"],
        },
        "generation": {
            "yardstick": GENERATION,
            "ratio_is": "our response tokens per second / bare vLLM's",
            "goal": f"≥ {GENERATION_GOAL}",
            "met": generation >= GENERATION_GOAL,
            **sides["generation"],
        },
        "repetitions": repetitions,
    }


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def _training(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    ours = {"seconds": row["time/train"], "loss": row["loss"], "grad_norm": row["grad_norm"]}
    theirs = {f"plain_{name}": plain[name] for name in ("seconds", "loss", "grad_norm", "micro_batches")}
    tokens = {"tokens": plain["tokens"], "plain_padded_tokens": plain["padded_tokens"]}
    return {**ours, **theirs, **tokens, "ratio": ours["seconds"] / plain["seconds"]}


def _generation(row: Mapping[str, Any], bare: Mapping[str, Any]) -> dict[str, Any]:
    ours = bare["tokens"] / row["time/generate"]
    theirs = bare["bare_tokens"] / bare["bare_seconds"]
    rates = {"tokens_per_second": ours, "bare_tokens_per_second": theirs, "ratio": ours / theirs}
    return {"seconds": row["time/generate"], **bare, **rates}


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The result as two tables: seconds per phase, and the two ratios with their goals."""
    phases = Table("phase", "median s", "min", "max", title="the demo's RL step")
    for name, seconds in result["phases"].items():
        phases.add_row(name, *(f"{seconds[key]:.2f}" for key in ("median", "min", "max")))
    total = sum(seconds["median"] for seconds in result["phases"].values())
    phases.add_row("sum of medians", f"{total:.2f}", "", "")
    ratios = Table("", "ours", "theirs", "ratio", "min", "max", "goal", "met", title="medians against the yardsticks")
    for side, ours, theirs, units in (
        ("training", "seconds", "plain_seconds", "seconds"),
        ("generation", "tokens_per_second", "bare_tokens_per_second", "tokens/s"),
    ):
        part = result[side]
        ratios.add_row(
            f"{side}, {units}",
            *(f"{part[name]['median']:.2f}" for name in (ours, theirs)),
            *(f"{part['ratio'][key]:.3f}" for key in ("median", "min", "max")),
            part["goal"],
            "yes" if part["met"] else "no",
        )
    return [phases, ratios]


if __name__ == "__main__":
    main()
