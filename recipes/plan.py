"""``python -m recipes.plan recipe=… cluster.nodes=N [goal=step_time|gpus|context] [overrides…]``: which layout is best?

Searches over tensor, pipeline, virtual, context and data parallelism, recomputation, the optimiser's offload, the
engines' tensor-parallel size and their KV cache. There are two kinds of layouts: with the engines on the trainer's
nodes, and with engines *apart*, that is on nodes of their own, where they generate one step ahead.

Prints at most ten layouts. Each has the memory of its fullest GPU, the seconds of a step by phase, what bounds it, and
the overrides to paste. Of layouts with the same parallel sizes and recomputation only the fastest of each kind is
printed. Half of the printed layouts are of each kind, where there are enough.

The search uses all nodes of the run, the trainer's and the engines' (``cluster.nodes`` + ``cluster.engine_nodes``), but
not the judges'. So a recipe with colocated engines on ``cluster.nodes=16`` is also divided into 8 + 8.

- ``goal=step_time``, the default: the shortest step on these nodes;
- ``goal=gpus``: the fewest nodes, at most the run's, and on them the shortest step;
- ``goal=context``: the longest responses, of the run's ``rollout.max_response_tokens`` and its doubles, and for them
  the shortest step.

Each layout has passed the preflight's memory checks (``recipes.preflight``) and leaves ``planner.KEPT_FREE_GIB`` of a
GPU free. The seconds are those of ``recipes.preflight.scale_model`` plus what a layout adds. They are meant for the
order of the layouts. ``preflight=h100`` (a file of conf/preflight) chooses the device. ``preflight.output=FILE.json``
gets the answer. The program needs no GPU and no weights.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_ext import platform
from recipes.command_line import from_command_line, split_arguments, with_group
from recipes.errors import ConfigError
from recipes.preflight import cost, planner, stages, view
from recipes.preflight.alternatives import Search
from recipes.preflight.architecture import model_config
from recipes.preflight.checks import check_settings
from recipes.preflight.report import Settings
from recipes.run.logs import quiet

TRAINING = ("train", "selective recompute", "uneven stages", "weights")
WIDTH = 200  # of the table, also in a file or pipe
EXCHANGES = ("tensor latency", "tensor gather", "context exchange", "pipeline exchange")
APART = (
    "apart: on the nodes of the trainer + those of the engines, which generate one step ahead (rollout.staleness=1). "
    "This is another algorithm: samples are one update old, and algorithm.importance_sampling corrects for it. A step "
    "is the longer of generation with judges and of log-probs, training and exchange; the sync comes on top."
)


def answer(raw: DictConfig, settings: Settings, goal: str, arguments: Sequence[str], say: Any) -> dict[str, Any]:
    """The best layouts for a goal, and the run's own.

    Args:
        raw: the composed configuration of the run.
        settings: the group ``preflight``.
        goal: one of ``planner.GOALS``.
        arguments: the overrides that ``raw`` was composed of.
        say: called with a text that says what is done next.

    Returns:
        A dictionary with these keys:

        - ``plans``: the layouts, the best first;
        - ``own``: the run's own layout as a plan, or None where it does not fit;
        - ``own_refused``: why ``own`` is None;
        - ``apart_refused``: why no layout has engines on nodes of their own, or "";
        - ``nodes``: the number of nodes of the run;
        - ``lengths``: the name of the lengths that the seconds are for.

    Raises:
        ConfigError: for a run that can't be planned.
    """
    check(raw, settings, goal)
    # Activated before the next import: it switches off torch's inductor, whose import takes seconds.
    platform.activate("cpu")
    from recipes.preflight import simulated_ranks

    base_model = stages.base_model(raw, arguments)
    if base_model is not None and not (Path(str(raw.model.path)) / "config.json").is_file():
        raw = OmegaConf.merge(raw, {"model": {"path": base_model}})  # type: ignore[assignment]
    simulated_ranks.activate()
    hf_config = model_config(str(raw.model.path))
    assert settings.costs is not None
    scale, machine = cost.read(settings.costs)
    limits = (int(raw.data.max_prompt_tokens), int(raw.rollout.max_response_tokens))
    costs = cost.Costs(
        machine=machine,
        model=cost.model_shape(str(raw.model.path)),
        scale=scale,
        limits=limits,
        lengths=planner.lengths_within(scale, limits),
    )
    planned = planner.Planner(Search(raw, settings, hf_config, say), costs)
    own, why = planned.own()
    plans = planned.plans(goal)
    return {
        "lengths": costs.lengths,
        "nodes": planned.nodes,
        "own": own,
        "own_refused": why,
        "apart_refused": planned.apart_refused,
        "plans": plans,
    }


def check(raw: DictConfig, settings: Settings, goal: str) -> None:
    """Raises ConfigError for a goal, a stage or settings that the planner does not support."""
    check_settings(settings)
    if goal not in planner.GOALS:
        raise ConfigError(f"goal={goal!r}: use one of {', '.join(planner.GOALS)}")
    if "rl" not in raw.stage.trains:
        raise ConfigError(
            f"stage.trains={list(raw.stage.trains)}: layouts are ordered by the seconds of an RL step; use stage=rl"
        )
    if not platform.capabilities(str(raw.cluster.platform)).has_gpus:
        raise ConfigError(
            f"cluster.platform={str(raw.cluster.platform)!r}: layouts are of GPUs; use cluster=slurm_h100"
        )
    if settings.costs is None:
        raise ConfigError(
            f"preflight.costs=null: conf/scale has no file for {settings.device}; use preflight.costs=h100"
        )


def show(answered: dict[str, Any], raw: DictConfig, settings: Settings, goal: str, seconds: float) -> None:
    """Print the layouts as a table, and the overrides of each layout below it."""
    out = Console(highlight=False, markup=False, emoji=False, width=max(Console().width, WIDTH))
    nodes = answered["nodes"]
    gpus = nodes * (raw.cluster.ranks // raw.cluster.nodes)
    out.print(Text(f"{raw.recipe.name}, goal={goal}: {nodes} nodes, {gpus} GPUs, {settings.device}", "bold"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    columns = (
        "", "nodes", "layout", "recompute", "offload", "engines", "KV GiB", "fullest GPU, GiB", "step s", "generate",
        "judge", "log-probs", "train", "exchange", "sync", "bound by",
    )  # fmt: skip
    for name in columns:
        table.add_column(name, overflow="fold", no_wrap=name == "layout")
    if answered["own"] is not None:
        table.add_row("own", *cells(answered["own"]), end_section=True)
    for n, plan in enumerate(answered["plans"]):
        table.add_row(str(n + 1), *cells(plan))
    out.print(table)
    if answered["own"] is None:
        out.print(Text(f"The run's own layout does not fit: {answered['own_refused']}"), soft_wrap=True)
    for n, plan in enumerate(answered["plans"]):
        out.print(Text(f"{n + 1:>3}  {' '.join(plan.overrides) or '(the run as it is)'}"), soft_wrap=True)
        if plan.note:
            out.print(Text(f"     {plan.note}"), soft_wrap=True)
    if not answered["plans"]:
        out.print(Text("No layout fits.", "bold red"))
    if any(plan.apart for plan in answered["plans"]):
        out.print(Text(APART), soft_wrap=True)
    if answered["apart_refused"]:
        out.print(Text(f"None has engines apart: {answered['apart_refused']}"), soft_wrap=True)
    out.print(
        Text(
            f"Seconds are an estimate for the order, with the costs and the lengths ({answered['lengths']}) of "
            f"conf/scale/{settings.costs}.yaml; an exchange counts as if nothing were computed meanwhile. Left out: a "
            f"vision tower's and a critic's work. In {seconds:.0f} s"
        ),
        soft_wrap=True,
    )


def cells(plan: Any) -> list[str]:
    """The cells of a plan's row in the table, without its number."""
    config = plan.config
    phases = plan.phases
    seconds = [
        plan.seconds,
        phases["generate"],
        phases["judge"],
        phases["logprobs"],
        sum(phases[name] for name in TRAINING),
        sum(phases[name] for name in EXCHANGES),
        phases["sync"] + phases["offload"],
    ]
    nodes = str(config.cluster.nodes)
    engines = f"{config.rollout.engines} of {config.rollout.tensor}"
    if plan.apart:
        nodes += f" + {config.cluster.engine_nodes}"
        engines += ", apart"
    return [
        nodes,
        plan.layout,
        config.parallel.recompute,
        "yes" if config.optimizer.offload else "no",
        engines,
        f"{config.rollout.kv_cache_gib:g}",
        f"{plan.fullest_gib:.1f}, {plan.fullest_phase}",
        *(f"{value:.1f}" for value in seconds),
        plan.bound,
    ]


def as_json(plan: Any) -> dict[str, Any] | None:
    """A plan as JSON for the file of ``preflight.output``. None stays None."""
    if plan is None:
        return None
    return {
        "overrides": list(plan.overrides),
        "layout": plan.layout,
        "seconds": plan.seconds,
        "phases": dict(plan.phases),
        "bound": plan.bound,
        "fullest_gib": plan.fullest_gib,
        "fullest_phase": plan.fullest_phase,
        "note": plan.note,
    }


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(raw: DictConfig) -> None:
    """Search, write the file of ``preflight.output`` if it is set, and print the layouts."""
    started = time.monotonic()
    settings = Settings(**OmegaConf.to_container(raw.preflight))  # type: ignore[arg-type]
    goal = str(raw.goal)
    run = OmegaConf.masked_copy(raw, [str(key) for key in raw if key not in ("preflight", "goal")])
    given = [word for word in HydraConfig.get().overrides.task if not stages.OWN.match(word) and word[:6] != "+goal="]
    try:
        with view.progress() as say, quiet():
            answered = answer(run, settings, goal, given, say)
    except (ConfigError, ValueError) as error:
        sys.exit(f"error: {error}")
    seconds = time.monotonic() - started
    if settings.output:
        content = {
            "lengths": answered["lengths"],
            "own": as_json(answered["own"]),
            "own_refused": answered["own_refused"],
            "plans": [as_json(plan) for plan in answered["plans"]],
            "seconds": seconds,
        }
        Path(settings.output).parent.mkdir(parents=True, exist_ok=True)
        Path(settings.output).write_text(json.dumps(content, indent=2) + "\n")
    show(answered, run, settings, goal, seconds)
    sys.exit(0 if answered["plans"] else 1)


if __name__ == "__main__":
    own_arguments, others = split_arguments(sys.argv[1:], ("goal",))
    sys.argv[1:] = [*with_group(others, "preflight", "h100"), f"+goal={own_arguments.get('goal', 'step_time')}"]
    from_command_line(main)
