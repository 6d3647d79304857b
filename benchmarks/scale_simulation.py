"""Estimates the training loop on 64 to 4,096 GPUs for three schedules: step time, phases, goodput and bottleneck.

``python -m benchmarks.scale_simulation [recipe=safework_72b] [overrides…] [scale.output=FILE.json]`` takes seconds on
any machine. The recipe gives layout, batch, limits and checkpoints; conf/scale gives the costs and their sources. The
last table compares the model with published steps. Images are left out: a vision tower's operations are not counted.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from benchmarks import figures
from recipes.config import parse
from recipes.errors import ConfigError
from recipes.preflight import scale_model
from recipes.preflight.cost import job_of, machine_of, model_shape
from recipes.preflight.scale_model import SCHEDULES, Job, Machine, ModelShape, StepEstimate

# Groups of the configuration that a training run does not have.
OWN_GROUPS = ("scale", "simulate")
OWN_OVERRIDES = ("+scale=h100", "+simulate=h100")
DEFAULT_RECIPE = "recipe=safework_72b"


def check(scale: DictConfig) -> None:
    """Raises ConfigError for an unknown choice or a count below 1."""
    for name, allowed in (("batch", ("recipe", "gpus")), ("sync", ("bytes", "plan"))):
        if scale[name] not in allowed:
            raise ConfigError(f"scale.{name}={scale[name]!r}: use one of {', '.join(allowed)}")
    if scale.draws < 1:
        raise ConfigError(f"scale.draws={scale.draws}: use 1 or more")
    if any(gpus < 1 for gpus in scale.gpus):
        raise ConfigError(f"scale.gpus={scale.gpus}: use 1 or more")


def sync_seconds(raw: DictConfig, job: Job, model: ModelShape, machine: Machine) -> dict[str, float]:
    """Seconds of a weight sync to engines that are "colocated" or "disaggregated"."""
    if raw.scale.sync == "bytes":
        return {
            "colocated": scale_model.sync_seconds(job, model, machine, disaggregated=False),
            "disaggregated": scale_model.sync_seconds(job, model, machine, disaggregated=True),
        }
    # This import loads PyTorch and Megatron-Core, which only this choice needs.
    from recipes.preflight.weight_sync import simulate as simulate_sync

    seconds = {}
    # The engines get as many separate nodes as they would fill among the trainer's. Their number stays the same.
    for placement, engine_nodes in (("colocated", 0), ("disaggregated", raw.cluster.nodes)):
        places = {"cluster": {"engine_nodes": engine_nodes}, "rollout": {"engines": raw.rollout.engines}}
        config = OmegaConf.merge(raw, places)
        assert isinstance(config, DictConfig)
        seconds[placement] = simulate_sync(config)["seconds"]
    return seconds


def simulate(raw: DictConfig) -> dict[str, Any]:
    """The estimates of all sizes and schedules, as JSON, for a configuration with the groups ``OWN_GROUPS``."""
    scale = raw.scale
    run_groups = [str(key) for key in raw if key not in OWN_GROUPS]
    config = parse(OmegaConf.masked_copy(raw, run_groups))
    check(scale)
    job = job_of(config)
    model = model_shape(config.model.path)
    machine = machine_of(scale, raw.simulate)
    sync = sync_seconds(raw, job, model, machine)
    rows = []
    for name, lengths in scale.lengths.items():
        distributions: Any = OmegaConf.to_container(lengths)
        for gpus in scale.gpus:
            growth = 1
            if scale.batch == "gpus":
                growth = max(1, gpus // config.cluster.ranks)
            prompts = job.prompts * growth
            seeds = range(scale.seed, scale.seed + scale.draws)
            batches = [scale_model.draw_batch(job, prompts, distributions, seed) for seed in seeds]
            for schedule in SCHEDULES:
                placement = "colocated" if schedule == "colocated" else "disaggregated"
                step = scale_model.best_step(job, model, machine, batches, schedule, gpus, sync[placement])
                rows.append({"lengths": str(name), **row_of(step, machine, config.checkpoint.every_steps)})
    return {
        "recipe": config.recipe.name,
        "every_steps": config.checkpoint.every_steps,
        "constants": OmegaConf.to_container(scale),
        "parameters": model.parameters,
        "sync_seconds": sync,
        "rows": rows,
        "published": [compare_with_published(case, machine, scale) for case in scale.published],
    }


def row_of(step: StepEstimate, machine: Machine, every_steps: int) -> dict[str, Any]:
    """A step with its goodput for three checkpoint policies.

    "goodput" is that of the recipe's interval, "best_goodput" that of the best interval. "to_host_goodput" is that of
    the best interval when a checkpoint stops the trainer only until its state is in the host's memory.
    """
    if not step.phases:
        return {"gpus": step.gpus, "schedule": step.schedule, "note": step.note}
    mtbf = machine.mtbf_gpu_hours * 3600 / step.gpus
    goodput = scale_model.goodput(step.seconds, every_steps, step.save, mtbf, step.restart)
    best_every_steps = scale_model.best_interval(step.seconds, step.save, mtbf, step.restart)
    best_goodput = scale_model.goodput(step.seconds, best_every_steps, step.save, mtbf, step.restart)
    to_host = min(step.save, step.copy)
    to_host_every_steps = scale_model.best_interval(step.seconds, to_host, mtbf, step.restart)
    to_host_goodput = scale_model.goodput(step.seconds, to_host_every_steps, to_host, mtbf, step.restart)
    return {
        "gpus": step.gpus,
        "schedule": step.schedule,
        "trainers": step.trainers,
        "generators": step.generators,
        "phases": step.phases,
        "spent": step.generation_causes,
        "alone": step.longest_alone,
        "tokens": step.tokens,
        "save": step.save,
        "copy": step.copy,
        "restart": step.restart,
        "note": step.note,
        "step": step.seconds,
        "tokens_per_second_per_gpu": step.tokens / step.seconds / step.gpus,
        "mtbf_hours": mtbf / 3600,
        "goodput": goodput,
        "kept_tokens_per_second_per_gpu": goodput * step.tokens / step.seconds / step.gpus,
        "best_every_steps": best_every_steps,
        "best_goodput": best_goodput,
        "to_host_every_steps": to_host_every_steps,
        "to_host_goodput": to_host_goodput,
        "bound": step.bound,
    }


def compare_with_published(case: DictConfig, machine: Machine, scale: DictConfig) -> dict[str, Any]:
    """Our estimate of a published step. "ratio" is our seconds over the published ones."""
    settings: Any = OmegaConf.to_container(case)
    job = Job(**settings["job"])
    model = scale_model.model_shape(settings["architecture"])
    schedule = settings["schedule"]
    # These runs have rule rewards, whose time is negligible.
    machine = replace(machine, judge_samples_s=math.inf, judge_latency_s=0)
    seeds = range(scale.seed, scale.seed + scale.draws)
    batches = [scale_model.draw_batch(job, job.prompts, settings, seed) for seed in seeds]
    sync = scale_model.sync_seconds(job, model, machine, disaggregated=schedule != "colocated")
    step = scale_model.estimate_step(
        job, model, machine, batches, schedule, settings["gpus"], settings["trainers"], sync
    )
    return {
        "name": settings["name"],
        "published": settings["seconds"],
        "ours": step.seconds,
        "ratio": step.seconds / settings["seconds"],
        "phases": step.phases,
    }


def show(answer: Mapping[str, Any]) -> None:
    """Print one table for each distribution of lengths, and one of the published steps."""
    console = Console(width=max(Console().width, 190))
    every_steps = answer["every_steps"]
    distributions = dict.fromkeys(row["lengths"] for row in answer["rows"])  # unique, in order
    for lengths in distributions:
        table = Table(
            "GPUs",
            "schedule",
            "train + generate",
            "generate",
            "judge",
            "logprobs",
            "train",
            "sync",
            "save",
            "step s",
            "tokens/s/GPU",
            f"goodput, every {every_steps}",
            "best",
            "to host",
            "bound by",
            title=f"{answer['recipe']}, {lengths}: seconds",
        )
        for row in answer["rows"]:
            if row["lengths"] == lengths:
                table.add_row(*cells(row), end_section=row["schedule"] == SCHEDULES[-1])
        console.print(table)
    console.print("save: what a checkpoint adds to a step. best: the highest goodput, and its interval in steps.")
    console.print("to host: the same when a checkpoint stops the trainer only until its state is in the host's memory.")
    table = Table("published", "s", "ours", "ours / published", title="the same model for published steps")
    for case in answer["published"]:
        table.add_row(case["name"], f"{case['published']:.1f}", f"{case['ours']:.1f}", f"{case['ratio']:.2f}")
    console.print(table)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table in ``show``."""
    if "step" not in row:
        return [str(row["gpus"]), row["schedule"], *[""] * 12, row["note"]]
    split = "all" if row["schedule"] == "colocated" else f"{row['trainers']} + {row['generators']}"
    phases = row["phases"]
    bound_and_note = [text for text in (row["bound"], row["note"]) if text]
    return [
        str(row["gpus"]),
        row["schedule"],
        split,
        f"{phases['generate']:.1f}",
        f"{phases['judge']:.1f}",
        f"{phases['logprobs']:.1f}",
        f"{phases['train']:.1f}",
        f"{phases['sync']:.1f}",
        f"{row['save']:.1f}",
        f"{row['step']:.1f}",
        f"{row['tokens_per_second_per_gpu']:.0f}",
        f"{row['goodput']:.1%}",
        f"{row['best_goodput']:.1%}, {row['best_every_steps']}",
        f"{row['to_host_goodput']:.1%}, {row['to_host_every_steps']}",
        "; ".join(bound_and_note),
    ]


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    try:
        made_by = figures.source("benchmarks.scale_simulation")
        answer = simulate(raw)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if raw.scale.output:
        command = f"python -m benchmarks.scale_simulation recipe={answer['recipe']}"
        figures.write(Path(raw.scale.output), command, made_by, answer)
    show(answer)


if __name__ == "__main__":
    # Hydra reads sys.argv. The default recipe applies only when the command names none.
    overrides = list(OWN_OVERRIDES)
    if not any(argument.startswith("recipe=") for argument in sys.argv):
        overrides.insert(0, DEFAULT_RECIPE)
    sys.argv[1:1] = overrides
    main()
