"""Times the phases of the demo's RL step and compares them with plain transformers and bare vLLM.

``python -m benchmarks.loop [Hydra overrides]`` writes ``benchmarks/results/loop.json`` and prints its tables. It times
``recipes.training.rl.fit`` itself. After the generate and the train phase, while the clock is stopped and the ranks
wait, a yardstick does the same work. Both sides of a ratio therefore run within seconds of each other.
"""

import json
import os
import shutil
import statistics
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from benchmarks.yardsticks import GENERATION, TRAINING
from megatron_ext.processes import die_with
from recipes import command_line, train
from recipes.config import Config, parse
from recipes.errors import ConfigError
from recipes.run import records

REPETITIONS = 3  # measured RL steps, after one warm-up step of both sides
RUN_DIR = Path("runs/benchmark_loop")
RESULT = Path("benchmarks/results/loop.json")
TRAINING_GOAL = 1.0  # at most: our seconds / plain transformers' seconds
GENERATION_GOAL = 0.95  # at least: our tokens/s / bare vLLM's tokens/s

# The learning rate is too small to change a weight. Bare vLLM gets no weight sync, but still has the same weights as
# our engine, and all repetitions start from these weights. The time of an update does not depend on the learning rate.
SETTINGS = (
    "recipe=demo",
    f"algorithm.steps={1 + REPETITIONS}",
    # The yardstick makes one update with all samples.
    "algorithm.updates_per_rollout=1",
    "algorithm.learning_rate=1e-30",
    f"checkpoint.every_steps={1 + REPETITIONS}",
)


def main() -> None:
    changes = sys.argv[1:]
    # A change may take any configuration.
    made_by = figures.source("benchmarks.loop", recipes=[] if changes else ["demo"])
    overrides = [*SETTINGS, *changes, f"run_dir={RUN_DIR}", "resume=false"]
    try:
        with initialize_config_dir(str(Path("conf").resolve()), version_base="1.3"):
            config = parse(compose("config", overrides))
        check(config)
        if "RANK" not in os.environ:
            launch(config)
    except ConfigError as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)
    except HydraException as error:
        print(f"error: {command_line.one_line(error)}", flush=True)
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
            "settings": overrides,
            **json.loads((RUN_DIR / "environment.json").read_text()),
            "load_average_before": float(os.environ["BENCHMARK_LOAD"]),
            **summarise(list(records.read_rows(RUN_DIR / "metrics.jsonl")), answers),
        }
        figures.write(RESULT, " ".join(["python -m benchmarks.loop", *sys.argv[1:]]), made_by, result)
        shutil.rmtree(RUN_DIR / "checkpoints")  # gigabytes that are not needed
        Console().print(*tables(result), f"{RESULT} has the raw times", sep="\n")


def check(config: Config) -> None:
    """Raises ConfigError for settings that the yardsticks cannot reproduce."""
    if config.rollout.engines != 1:
        raise ConfigError(f"rollout.engines={config.rollout.engines}: bare vLLM is one engine; use rollout.engines=1")
    if config.algorithm.steps < 2:
        raise ConfigError(f"algorithm.steps={config.algorithm.steps}: the first step only warms up; use 2 or more")


def launch(config: Config) -> None:
    """Launch the ranks as ``recipes.train.launch`` does, in an empty run folder."""
    shutil.rmtree(RUN_DIR, ignore_errors=True)
    os.environ["BENCHMARK_LOAD"] = str(os.getloadavg()[0])
    train.launch(config)


def summarise(rows: Sequence[Mapping[str, Any]], answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians and ranges over the steps after the warm-up, and every raw number.

    Args:
        rows: metrics.jsonl, one row per step.
        answers: the yardsticks' answers for "training" and "generation", one per step.

    Raises:
        ValueError: a step has no answer, or there is no step after the warm-up.
    """
    steps = []
    for row, plain, bare in zip(rows, answers["training"], answers["generation"], strict=True):
        phases = {name: row[f"time/{name}"] for name in records.time_phases([row])}
        steps.append({"phases": phases, "training": _training(row, plain), "generation": _generation(row, bare)})
    repetitions = steps[1:]
    if not repetitions:
        raise ValueError("one step only, which warms up: run 2 or more (algorithm.steps)")

    def spread_of(part: str, name: str) -> dict[str, float]:
        return spread([repetition[part][name] for repetition in repetitions])

    training_ratio = spread_of("training", "ratio")
    generation_ratio = spread_of("generation", "ratio")
    return {
        "phases": {name: spread_of("phases", name) for name in records.time_phases(rows[1:])},
        "training": {
            "yardstick": TRAINING,
            "ratio_is": "our seconds / plain transformers' seconds",
            "goal": f"≤ {TRAINING_GOAL}",
            "met": training_ratio["median"] <= TRAINING_GOAL,
            "seconds": spread_of("training", "seconds"),
            "plain_seconds": spread_of("training", "plain_seconds"),
            "ratio": training_ratio,
        },
        "generation": {
            "yardstick": GENERATION,
            "ratio_is": "our response tokens per second / bare vLLM's",
            "goal": f"≥ {GENERATION_GOAL}",
            "met": generation_ratio["median"] >= GENERATION_GOAL,
            "tokens_per_second": spread_of("generation", "tokens_per_second"),
            "bare_tokens_per_second": spread_of("generation", "bare_tokens_per_second"),
            "ratio": generation_ratio,
        },
        "repetitions": repetitions,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _training(row: Mapping[str, Any], plain: Mapping[str, Any]) -> dict[str, Any]:
    """The training of one step: ours from its metrics, and the answer of plain transformers."""
    return {
        "seconds": row["time/train"],
        "loss": row["loss"],
        "grad_norm": row["grad_norm"],
        "plain_seconds": plain["seconds"],
        "plain_loss": plain["loss"],
        "plain_grad_norm": plain["grad_norm"],
        "plain_micro_batches": plain["micro_batches"],
        "tokens": plain["tokens"],
        "plain_padded_tokens": plain["padded_tokens"],
        "ratio": row["time/train"] / plain["seconds"],
    }


def _generation(row: Mapping[str, Any], bare: Mapping[str, Any]) -> dict[str, Any]:
    """The generation of one step: ours from its metrics, and the answer of bare vLLM."""
    tokens_per_second = bare["tokens"] / row["time/generate"]
    bare_tokens_per_second = bare["bare_tokens"] / bare["bare_seconds"]
    return {
        "seconds": row["time/generate"],
        **bare,
        "tokens_per_second": tokens_per_second,
        "bare_tokens_per_second": bare_tokens_per_second,
        "ratio": tokens_per_second / bare_tokens_per_second,
    }


def tables(result: Mapping[str, Any]) -> list[Table]:
    """One table of the seconds per phase, and one of the two ratios with their goals."""
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
        comparison = result[side]
        ratio = comparison["ratio"]
        ratios.add_row(
            f"{side}, {units}",
            f"{comparison[ours]['median']:.2f}",
            f"{comparison[theirs]['median']:.2f}",
            f"{ratio['median']:.3f}",
            f"{ratio['min']:.3f}",
            f"{ratio['max']:.3f}",
            comparison["goal"],
            "yes" if comparison["met"] else "no",
        )
    return [phases, ratios]


if __name__ == "__main__":
    main()
