"""The loop on 64 to 4,096 GPUs, on paper: step time, its phases, goodput, and what bounds them, for three schedules.

``python -m benchmarks.scale_simulation [recipe=safework_72b] [overrides…] [scale.output=FILE.json]``, on any machine,
in seconds. The recipe gives layout, batch, limits and checkpoints, conf/scale the costs with their sources; what the
model is worth shows in its ratios to published steps, printed last. Text alone: a vision tower's work is left out.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from recipes.config import parse
from recipes.errors import ConfigError
from recipes.preflight import scale_model
from recipes.preflight.cost import job, machine, shapes
from recipes.preflight.scale_model import SCHEDULES, Group, Job, Machine, Shapes, Step

ASIDE = ("scale", "simulate")
DEFAULTS = ("recipe=safework_72b", "+scale=h100", "+simulate=h100")


def check(scale: DictConfig) -> None:
    """Raises ConfigError for a choice that is none."""
    for name, allowed in (("batch", ("recipe", "gpus")), ("sync", ("bytes", "plan"))):
        if scale[name] not in allowed:
            raise ConfigError(f"scale.{name}={scale[name]!r}: use one of {', '.join(allowed)}")
    for name, count in (("draws", scale.draws), *(("gpus", gpus) for gpus in scale.gpus)):
        if count < 1:
            raise ConfigError(f"scale.{name}={scale[name]}: use 1 or more")


def sync(raw: DictConfig, task: Job, model: Shapes, on: Machine) -> dict[str, float]:
    """Seconds of a weight sync by place of the engines."""
    if raw.scale.sync == "bytes":
        return {
            "colocated": scale_model.sync_seconds(task, model, on, disaggregated=False),
            "disaggregated": scale_model.sync_seconds(task, model, on, disaggregated=True),
        }
    from recipes.preflight.weight_sync import simulate

    found = {}
    for where in ("colocated", "disaggregated"):
        placed = OmegaConf.merge(raw, {"simulate": {"engines": where}})
        assert isinstance(placed, DictConfig)
        found[where] = simulate(placed)["seconds"]
    return found


def simulate(raw: DictConfig) -> dict[str, Any]:
    """The whole answer for a recipe's configuration with the groups ``scale`` and ``simulate``, plain JSON."""
    scale, config = raw.scale, parse(OmegaConf.masked_copy(raw, [str(key) for key in raw if key not in ASIDE]))
    check(scale)
    task, model, on = job(config), shapes(config.model.path), machine(scale, raw.simulate)
    seconds = sync(raw, task, model, on)
    rows = []
    for name, lengths in scale.lengths.items():
        plain: Any = OmegaConf.to_container(lengths)
        for gpus in scale.gpus:
            more = max(1, gpus // config.cluster.ranks) if scale.batch == "gpus" else 1
            batches = [scale_model.draw(task, task.prompts * more, plain, scale.seed + i) for i in range(scale.draws)]
            for schedule in SCHEDULES:
                at = seconds["colocated" if schedule == "colocated" else "disaggregated"]
                step = scale_model.best_step(task, model, on, batches, schedule, gpus, at)
                rows.append({"lengths": str(name), **row(step, on, config.checkpoint.every_steps)})
    return {
        "recipe": config.recipe.name,
        "every_steps": config.checkpoint.every_steps,
        "constants": OmegaConf.to_container(scale),
        "parameters": model.parameters,
        "sync_seconds": seconds,
        "rows": rows,
        "published": [published(case, on, scale) for case in scale.published],
    }


def row(step: Step, on: Machine, every: int) -> dict[str, Any]:
    """A step with its failures: goodput with the recipe's checkpoints, with the best interval, and with the best one of
    checkpoints that hold the trainer up only while its states go to the host's memory."""
    found = {k: v for k, v in vars(step).items() if k != "seconds"}
    if not step.phases:
        return {"gpus": step.gpus, "schedule": step.schedule, "note": step.note}
    mtbf = on.mtbf_gpu_hours * 3600 / step.gpus
    best = scale_model.best_interval(step.seconds, step.save, mtbf, step.restart)
    kept = scale_model.goodput(step.seconds, every, step.save, mtbf, step.restart)
    to_host = min(step.save, step.copy)
    soon = scale_model.best_interval(step.seconds, to_host, mtbf, step.restart)
    return {
        **found,
        "step": step.seconds,
        "tokens_per_second_per_gpu": step.tokens / step.seconds / step.gpus,
        "mtbf_hours": mtbf / 3600,
        "goodput": kept,
        "kept_tokens_per_second_per_gpu": kept * step.tokens / step.seconds / step.gpus,
        "best_every_steps": best,
        "best_goodput": scale_model.goodput(step.seconds, best, step.save, mtbf, step.restart),
        "to_host_every_steps": soon,
        "to_host_goodput": scale_model.goodput(step.seconds, soon, to_host, mtbf, step.restart),
        "bound": step.bound,
    }


def published(case: DictConfig, on: Machine, scale: DictConfig) -> dict[str, Any]:
    """The model's step beside the published one; ratio: ours over theirs."""
    plain: Any = OmegaConf.to_container(case)
    task, model = Job(**plain["job"]), scale_model.shapes(plain["architecture"])
    on = replace(on, judge_samples_s=math.inf, judge_latency_s=0)  # rules decide, not judges
    batches: Sequence[Sequence[Group]] = [
        scale_model.draw(task, task.prompts, plain, scale.seed + i) for i in range(scale.draws)
    ]
    seconds = scale_model.sync_seconds(task, model, on, plain["schedule"] != "colocated")
    ruled = (plain["schedule"], plain["gpus"], plain["trainers"])
    step = scale_model.one_step(task, model, on, batches, *ruled, seconds)
    return {
        "name": plain["name"],
        "published": plain["seconds"],
        "ours": step.seconds,
        "ratio": step.seconds / plain["seconds"],
        "phases": step.phases,
    }


def show(answer: Mapping[str, Any]) -> None:
    console = Console(width=max(Console().width, 190))
    every = answer["every_steps"]
    for lengths in dict.fromkeys(row["lengths"] for row in answer["rows"]):
        columns = ("GPUs", "schedule", "train + generate", "generate", "judge", "logprobs", "train", "sync", "save")
        results = ("step s", "tokens/s/GPU", f"goodput, every {every}", "best", "to host", "bound by")
        table = Table(*columns, *results, title=f"{answer['recipe']}, {lengths}: seconds")
        for row in (row for row in answer["rows"] if row["lengths"] == lengths):
            table.add_row(*line(row), end_section=row["schedule"] == SCHEDULES[-1])
        console.print(table)
    console.print("save: a checkpoint beyond the step. best, to host: goodput and interval that lose least, the latter")
    console.print("where a checkpoint holds the trainer up only until its states are in the host's memory.")
    table = Table("published", "s", "ours", "ours / published", title="the same model on others' steps")
    for case in answer["published"]:
        table.add_row(case["name"], f"{case['published']:.1f}", f"{case['ours']:.1f}", f"{case['ratio']:.2f}")
    console.print(table)


def line(row: Mapping[str, Any]) -> list[str]:
    if "step" not in row:
        return [str(row["gpus"]), row["schedule"], *[""] * 12, row["note"]]
    phases = (f"{row['phases'][name]:.1f}" for name in ("generate", "judge", "logprobs", "train", "sync"))
    share = "all" if row["schedule"] == "colocated" else f"{row['trainers']} + {row['generators']}"
    goodput = (
        f"{row['goodput']:.1%}",
        f"{row['best_goodput']:.1%}, {row['best_every_steps']}",
        f"{row['to_host_goodput']:.1%}, {row['to_host_every_steps']}",
    )
    rate = f"{row['tokens_per_second_per_gpu']:.0f}"
    why = "; ".join(filter(None, (row["bound"], row["note"])))
    return [
        str(row["gpus"]),
        row["schedule"],
        share,
        *phases,
        f"{row['save']:.1f}",
        f"{row['step']:.1f}",
        rate,
        *goodput,
        why,
    ]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        answer = simulate(raw)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if raw.scale.output:
        Path(raw.scale.output).parent.mkdir(parents=True, exist_ok=True)
        Path(raw.scale.output).write_text(json.dumps(answer, indent=1) + "\n")
    show(answer)


if __name__ == "__main__":
    # The groups that the configuration of a run does not have; the recipe only where none is named.
    named = any(argument.startswith("recipe=") for argument in sys.argv)
    sys.argv[1:1] = DEFAULTS[1:] if named else DEFAULTS
    main()
