"""Run the pipeline of stages that ``stage.ladder`` lists, and report every stage's model on the same prompts.

Each stage is one launch, ``python -m recipes.train stage=NAME recipe=…``, in the folder RUN_DIR/NAME. For stages that
were launched one by one, ``python -m recipes.launch.pipeline RUN_DIR`` writes the report of all stages.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hydra import compose

from megatron_ext.processes import die_with
from recipes.command_line import quoted
from recipes.config import Config, generates, parse
from recipes.data.rows import load_rows
from recipes.errors import ConfigError
from recipes.evaluation import judge_accuracy, rates
from recipes.evaluation.evaluate import Answers, scored
from recipes.evaluation.statistics import mean_interval, normal_interval, paired_difference
from recipes.launch.claim import changes_of, check_folder, claimed
from recipes.report.pipeline import write_pipeline_report
from recipes.run import records
from recipes.run.folder import is_run
from rewards.serve import ServerDied, Supervisor, judge_servers

REASONING_LENGTH = "reasoning_length"
# The measures in addition to the rates of safety (recipes/evaluation/rates.py).
MEASURES = ("helpfulness", "accuracy", REASONING_LENGTH, "search_accuracy", "false_certain")
POLL_SECONDS = 1.0


def run_pipeline(config: Config, arguments: Sequence[str]) -> None:
    """Launch the stages in order. ``arguments`` is the command line. A resumed pipeline skips its finished stages.

    The servers of a stage's verifiers that have no endpoints run during that stage. A finished stage keeps its exported
    model and its records, but no checkpoint.

    Raises ConfigError if the configuration of any stage is invalid, before the first launch, and if a stage fails.
    """
    folder = Path(config.run_dir)
    check_folder(config)
    launches = plan_launches(config.stage.ladder, arguments, folder, config.resume)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, exit_on_signal)
    with claimed(config):
        run_stages(folder, launches, config)


def run_stages(folder: Path, launches: Mapping[str, tuple[list[str], Config]], config: Config) -> None:
    """Launch the stages that are not finished, and write the pipeline's results after each. Raises ConfigError."""
    for name, (stage_arguments, stage_config) in launches.items():
        if (folder / name / records.FINISHED).is_file():
            print(f"==> stage {name}: already finished", flush=True)
        else:
            run_stage(name, stage_arguments, stage_config)
        # The next stage starts from the exported model, so the checkpoints are not needed any more.
        checkpoints = folder / name / "checkpoints"
        if checkpoints.is_dir():
            shutil.rmtree(checkpoints)
        write_results(folder, config.stage.ladder, config.data.evaluation)


def exit_on_signal(number: int, frame: FrameType | None) -> None:
    """A signal handler that raises SystemExit, so that the running stage and its servers are ended."""
    sys.exit(f"stopped by {signal.Signals(number).name}; go on with resume=true")


def plan_launches(
    stages: Sequence[str], arguments: Sequence[str], folder: Path, resume: bool
) -> dict[str, tuple[list[str], Config]]:
    """Each stage's arguments and configuration.

    Raises ConfigError for an invalid configuration, and for one that would make a stage that a resumed pipeline has
    begun another experiment.
    """
    launches = {}
    previous = None
    for name in stages:
        # A stage that has not begun can't be resumed.
        begun = resume and is_run(folder / name)
        launches[name] = stage_launch(name, [*arguments, f"resume={begun}"], folder, previous)
        _, config = launches[name]
        if begun:
            changes_of(folder / name, config)
        # A stage without an evaluation trains a judge or a reward model. The next stage can't start from those, since
        # they are not policies.
        if config.stage.evaluates:
            previous = name
    return launches


def stage_launch(name: str, arguments: Sequence[str], folder: Path, previous: str | None) -> tuple[list[str], Config]:
    """The arguments and the configuration of one stage.

    A stage that continues from another one starts from the model of ``previous``. ``model.path`` on the command line or
    in the recipe holds only for stages that do not.
    """
    stage_arguments = common_arguments(name, arguments, folder)
    config = compose_config(stage_arguments)
    if config.stage.after is not None and previous is not None:
        stage_arguments = [argument for argument in stage_arguments if not argument.startswith("model.path=")]
        stage_arguments.append(f"stage.after={previous}")
        stage_arguments.append(f"model.path={quoted(str(folder / previous / 'hf'))}")
        config = compose_config(stage_arguments)
    return stage_arguments, config


def common_arguments(name: str, arguments: Sequence[str], folder: Path) -> list[str]:
    """The arguments of one stage that do not depend on the stage it continues from."""
    replaced = ("stage=", "stage.ladder=", "run_dir=", "overwrite=")
    common = [argument for argument in arguments if not argument.startswith(replaced)]
    return [*common, f"stage={name}", f"run_dir={quoted(str(folder / name))}"]


def compose_config(arguments: Sequence[str]) -> Config:
    """The configuration of a command line. Raises ConfigError."""
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    return parse(compose("config", overrides=overrides))


def run_stage(name: str, arguments: Sequence[str], config: Config) -> None:
    """Launch one stage and mark it as finished. Raises ConfigError if it fails."""
    run_dir = Path(config.run_dir)
    print(f"==> stage {name}", flush=True)
    started = time.monotonic()
    try:
        code = run_with_servers([sys.executable, "-m", "recipes.train", *arguments], config)
        if code:
            raise ConfigError(f"it ended with code {code}; its logs are in {run_dir}/logs")
        if config.stage.sft.judge and config.stage.sft.held_out:
            accuracy = judge_accuracy.measure(config)["accuracy"]
            print(f"the judge's accuracy on held-out answers is {accuracy['mean']:.2f}", flush=True)
    except (ConfigError, ServerDied) as error:
        raise ConfigError(f"stage {name}: {error}; go on with resume=true") from error
    # The duration of the last launch only. A resumed stage had earlier launches.
    seconds = time.monotonic() - started
    records.write_json(run_dir / records.FINISHED, {"stage": name, "seconds": seconds})


def run_with_servers(command: Sequence[str], config: Config) -> int:
    """Run a command while the stage's reward servers run, and return its exit code.

    However this process ends, the command and the servers end too. Raises ServerDied.
    """
    folder = Path(config.run_dir) / "servers"
    servers = judge_servers(config.rewards, folder, config.cluster.platform) if generates(config) else []
    supervisor = Supervisor(servers, config.rewards.supervisor)
    try:
        if servers:
            print(f"servers: {', '.join(replica.name for replica in servers)}", flush=True)
            supervisor.start()
        with subprocess.Popen(command, preexec_fn=partial(die_with, os.getpid())) as process:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return process.wait(POLL_SECONDS)
                    for message in supervisor.poll():
                        print(message, flush=True)
            finally:
                process.terminate()
    finally:
        supervisor.stop()


def write_results(folder: Path, stages: Sequence[str], evaluation: str) -> None:
    """Write ``ladder.json`` and ``report.html`` of the stages that have answers.

    ``evaluation`` is the source of the held-out prompts.
    """
    answers: dict[str, Answers] = {}
    for name in stages:
        path = folder / name / "answers.json"
        of_stage = json.loads(path.read_text()) if path.is_file() else {}
        if "after" not in of_stage:
            continue
        if not answers:
            answers["base"] = of_stage["before"]
        answers[name] = of_stage["after"]
    if not answers:
        return
    prompts_by_id = {row["id"]: row for row in load_rows(evaluation)}
    kinds = {prompt_id: row["kind"] for prompt_id, row in prompts_by_id.items()}
    verifiers = dict.fromkeys(
        name for of_stage in answers.values() for row in of_stage["greedy"] for name in row["scores"]
    )
    measured, measure_names = rates.with_rates(answers, verifiers, kinds)
    names = [*(name for name in measure_names if "/" in name), *MEASURES]
    rows = [{"stage": name, **measures(of_stage, names)} for name, of_stage in measured.items()]
    for row, (before, after) in zip(rows[1:], pairwise(measured.values()), strict=True):
        row |= changes(before, after, names)
    ladder = {"stages": rows}
    records.write_json(folder / "ladder.json", ladder)
    write_pipeline_report(folder, ladder, answers, prompts_by_id)


def stages_with_answers(folder: Path) -> tuple[list[str], str]:
    """The stages below ``folder`` that have answers, in order, and the held-out prompts of the last one.

    Raises ConfigError if there are none, and for the folder of a single run, whose report would be overwritten.
    """
    if (folder / "metrics.jsonl").is_file():
        raise ConfigError(
            f"{folder}: is the folder of one run, and the report of stages would replace its report.html; move the run "
            "away, or the folders of the stages, and write the report again"
        )
    stage_folders = [path.parent for path in sorted(folder.glob("*/answers.json"))]
    configs = {stage.name: yaml.safe_load((stage / "config.yaml").read_text()) for stage in stage_folders}
    if not configs:
        raise ConfigError(f"{folder}: no stage has answers.json there; give the folder of the stages: runs/RECIPE")

    def depth(name: str) -> int:
        previous = configs[name]["stage"]["after"]
        return depth(previous) + 1 if previous in configs else 0

    order = sorted(configs, key=depth)
    return order, configs[order[-1]]["data"]["evaluation"]


def measures(answers: Answers, names: Sequence[str]) -> dict[str, Any]:
    """The measures ``names`` of one model's greedy answers: mean, 95 % interval and number of prompts.

    Measures that the evaluation does not have are left out.
    """
    results: dict[str, Any] = {}
    for name in names:
        values = list(values_by_prompt(answers, name).values())
        if not values:
            continue
        interval = normal_interval(values) if name == REASONING_LENGTH else mean_interval(values)
        results[name] = interval["mean"]
        results[f"{name}_interval"] = interval["interval"]
        results[f"{name}_n"] = interval["n"]
    return results


def changes(before: Answers, after: Answers, names: Sequence[str]) -> dict[str, Any]:
    """``MEASURE_change``: the mean difference of the greedy answers to the same prompts, with its 95 % interval."""
    results: dict[str, Any] = {}
    for name in names:
        values_before = values_by_prompt(before, name)
        values_after = values_by_prompt(after, name)
        shared = sorted(values_before.keys() & values_after.keys())
        if not shared:
            continue
        if name == REASONING_LENGTH:
            interval = normal_interval([values_after[prompt] - values_before[prompt] for prompt in shared])
        else:
            interval = paired_difference(
                [values_before[prompt] for prompt in shared], [values_after[prompt] for prompt in shared]
            )
        results[f"{name}_change"] = interval["mean"]
        results[f"{name}_change_interval"] = interval["interval"]
    return results


def values_by_prompt(answers: Answers, measure: str) -> dict[str, float]:
    """A measure of each greedy answer, by the prompt's id.

    The reasoning length, in thinking tokens, is given only for prompts that have an accuracy.
    """
    if measure == REASONING_LENGTH:
        return {row["id"]: row["thinking_tokens"] for row in scored(answers["greedy"], "accuracy")}
    return {row["id"]: row["scores"][measure]["score"] for row in scored(answers["greedy"], measure)}


def main() -> None:
    """Command line: write the results of stages that were launched one by one."""
    parser = argparse.ArgumentParser(description="Write ladder.json and report.html of stages launched one by one.")
    parser.add_argument("folder", type=Path, help="with a folder for each stage: runs/RECIPE")
    folder = parser.parse_args().folder
    try:
        write_results(folder, *stages_with_answers(folder))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
