"""The whole ladder: ``stage.ladder``'s stages, each launched by itself, and what came of each on the same prompts.

Every stage is what ``python -m recipes.train stage=NAME recipe=…`` runs, in a folder of its own beside the others.
Where they were launched one by one, ``python -m recipes.launch.pipeline runs/RECIPE`` writes the report of all.
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
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from hydra import compose

from megatron_ext.processes import die_with
from recipes.config import Config, generates, parse
from recipes.data.rows import load_rows
from recipes.errors import ConfigError
from recipes.evaluation import judge_accuracy
from recipes.evaluation.evaluate import Answers, scored
from recipes.evaluation.statistics import mean_interval, normal_interval, paired_difference
from recipes.report.pipeline import write_ladder_report
from recipes.run import records
from rewards.serve import ServerDied, Supervisor, replicas

MEASURES = ("safety", "helpfulness", "accuracy", "reasoning_length", "false_certain")
POLL_SECONDS = 1.0


def run_pipeline(config: Config, arguments: Sequence[str]) -> None:
    """Launch the stages in order with the command line's ``arguments``; a resumed ladder leaves finished ones alone.

    The servers that a stage's verifiers need, and that have no endpoints, run beside it. Of a finished stage its
    exported model and records are kept, and no checkpoint. Raises ConfigError for any stage's configuration before the
    first begins, and when a stage fails.
    """
    folder = Path(config.run_dir)
    launched, configs, former = {}, {}, None
    for name in config.stage.ladder:
        launched[name], configs[name] = of_stage(name, arguments, folder, former)
        former = name if configs[name].stage.evaluates else former  # a judge's stage leaves no policy
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume:  # or a resumed ladder would leave out what an earlier one was done with
        for name in launched:
            (folder / name / records.FINISHED).unlink(missing_ok=True)
    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, lambda which, _: sys.exit(f"stopped by {signal.Signals(which).name}; go on: resume=true"))
    for name, given in launched.items():
        if (folder / name / records.FINISHED).is_file():
            print(f"==> stage {name}: finished before", flush=True)
        else:
            print(f"==> stage {name}", flush=True)
            started = time.monotonic()
            try:
                if code := run_beside_servers([sys.executable, "-m", "recipes.train", *given], configs[name]):
                    raise ConfigError(f"it ended with code {code}; its logs are in {folder / name}/logs")
                if configs[name].stage.sft.judge and configs[name].stage.sft.held_out:
                    found = judge_accuracy.measure(configs[name])["accuracy"]
                    print(f"the judge finds {found['mean']:.2f} of the held-out labels", flush=True)
            except (ConfigError, ServerDied) as error:
                raise ConfigError(f"stage {name}: {error}; go on with resume=true") from error
            seconds = time.monotonic() - started  # of its last launch, where it needed more than one
            records.write_json(folder / name / records.FINISHED, {"stage": name, "seconds": seconds})
        if (kept := folder / name / "checkpoints").is_dir():  # the next stage starts from the exported model
            shutil.rmtree(kept)
        write(folder, config.stage.ladder, config.data.evaluation)


def of_stage(name: str, arguments: Sequence[str], folder: Path, former: str | None) -> tuple[list[str], Config]:
    """The arguments of a stage's launch, and its configuration.

    A stage that starts from another starts from ``former``; ``model.path`` is for those that don't.
    """
    own = [argument for argument in arguments if not argument.startswith(("stage=", "stage.ladder=", "run_dir="))]
    given = [*own, f"stage={name}", f"run_dir={folder / name}"]
    config = composed(given)
    if config.stage.after is not None and former is not None:
        given = [argument for argument in given if not argument.startswith("model.path=")]
        given.append(f"stage.after={former}")
        config = composed(given)
    return given, config


def composed(arguments: Sequence[str]) -> Config:
    """The configuration of a command line. Raises ConfigError."""
    return parse(compose("config", overrides=[argument for argument in arguments if not argument.startswith("--")]))


def run_beside_servers(command: Sequence[str], config: Config) -> int:
    """The command's exit code. It ends with this process in any way, and so do the servers."""
    folder = Path(config.run_dir) / "servers"
    found = replicas(config.rewards, folder, config.cluster.platform) if generates(config) else []
    supervisor = Supervisor(found, config.rewards.supervisor)
    try:
        if found:
            print(f"servers: {', '.join(replica.name for replica in found)}", flush=True)
            supervisor.start()
        with subprocess.Popen(command, preexec_fn=partial(die_with, os.getpid())) as run:
            try:
                while True:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        return run.wait(POLL_SECONDS)
                    for news in supervisor.look():
                        print(news, flush=True)
            finally:
                run.terminate()
    finally:
        supervisor.stop()


def write(folder: Path, stages: Sequence[str], evaluation: str) -> None:
    """``ladder.json`` and ``report.html`` of the stages that are there; ``evaluation``: the held-out prompts."""
    answers: dict[str, Answers] = {}
    for name in stages:
        path = folder / name / "answers.json"
        found = json.loads(path.read_text()) if path.is_file() else {}
        if "after" in found:
            answers |= {"base": found["before"]} if not answers else {}
            answers[name] = found["after"]
    if answers:
        ladder = {"stages": [{"stage": name, **measures(rows)} for name, rows in answers.items()]}
        for (former, after), stage in zip(pairwise(answers.values()), ladder["stages"][1:], strict=True):
            stage |= changes(former, after)
        records.write_json(folder / "ladder.json", ladder)
        rows = {row["id"]: row for row in load_rows(evaluation)}
        write_ladder_report(folder, ladder, answers, rows)


def begun(folder: Path) -> tuple[list[str], str]:
    """The stages in a ladder's folder that have answers, in their order, and the last one's held-out prompts.

    Raises ConfigError where there are none.
    """
    found = [path.parent for path in sorted(folder.glob("*/answers.json"))]
    configs = {stage.name: yaml.safe_load((stage / "config.yaml").read_text()) for stage in found}
    if not configs:
        raise ConfigError(f"{folder}: no stage has answers.json there; give the folder of a ladder: runs/RECIPE")

    def depth(name: str) -> int:
        after = configs[name]["stage"]["after"]
        return depth(after) + 1 if after in configs else 0

    order = sorted(configs, key=depth)
    return order, configs[order[-1]]["data"]["evaluation"]


def measures(answers: Answers) -> dict[str, Any]:
    """Each of ``MEASURES`` of one model's greedy answers, with its 95 % interval, where the evaluation has it.

    ``reasoning_length``: thinking tokens on the prompts that ``accuracy`` judges.
    """
    found: dict[str, Any] = {}
    for name in MEASURES:
        rows = scored(answers["greedy"], "accuracy" if name == "reasoning_length" else name)
        if not rows:
            continue
        if name == "reasoning_length":
            of = normal_interval([row["thinking_tokens"] for row in rows])
        else:
            of = mean_interval([row["scores"][name]["score"] for row in rows])
        found |= {name: of["mean"], f"{name}_interval": of["interval"], f"{name}_n": of["n"]}
    return found


def changes(former: Answers, after: Answers) -> dict[str, Any]:
    """``MEASURE_change`` from the former stage's greedy answers to the same prompts, with its 95 % interval."""
    found: dict[str, Any] = {}
    for name in MEASURES:
        judged = "accuracy" if name == "reasoning_length" else name
        rows = [{row["id"]: row for row in scored(answers["greedy"], judged)} for answers in (former, after)]
        shared = sorted(rows[0].keys() & rows[1].keys())
        if not shared:
            continue
        if name == "reasoning_length":
            of = normal_interval([rows[1][i]["thinking_tokens"] - rows[0][i]["thinking_tokens"] for i in shared])
        else:
            before, now = ([of_model[i]["scores"][name]["score"] for i in shared] for of_model in rows)
            of = paired_difference(before, now)
        found |= {f"{name}_change": of["mean"], f"{name}_change_interval": of["interval"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Write ladder.json and report.html of stages launched one by one.")
    parser.add_argument("folder", type=Path, help="with a folder for each stage: runs/RECIPE")
    folder = parser.parse_args().folder
    try:
        write(folder, *begun(folder))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
