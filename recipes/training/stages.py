"""One launch of a recipe: trains the parts of ``stage.trains`` in order, and evaluates the policy before and after."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from megatron_ext import hf_checkpoint
from recipes.config import Config
from recipes.data.rows import load_rows
from recipes.evaluation import evaluate
from recipes.evaluation.evaluate import Answers
from recipes.report.page import write_report
from recipes.run import records
from recipes.run.run import Run
from recipes.training import reward_model, rl, sft, value_model
from recipes.training.held_out import held_out_answers
from recipes.training.setup import Training
from rewards import mixing
from rewards.verdict import from_json

WARM_START = "warm_start"  # the folder of a part that another one follows
TITLES = {"sft": "SFT", "reward_model": "reward model", "value_model": "value model"}


def run_stage(training: Training) -> None:
    """Train, evaluate, export to ``run_dir/hf`` and write the report.

    A resumed run takes the answers and exports that it has already from its folder.
    """
    config = training.config
    run = training.run
    trains = config.stage.trains
    answers: dict[str, Answers] = _read(run.folder / "answers.json") or answers_before(config)
    reference = Path(config.model.path)
    models = evaluate.MODELS[-1 - len(trains) :]
    for part, model_before in zip(trains, models, strict=False):
        is_last = part == trains[-1]
        exported = run.folder / ("hf" if is_last else part)
        if not is_last and (exported / "config.json").is_file():
            hf_checkpoint.load(training.policy.model.shards, exported)
        else:
            _evaluate(training, model_before, answers)
            version = train(training, run if is_last else run.part(WARM_START), part, reference)
            if is_last:
                if run.steps_made:
                    # They are there where a run was finished and goes on for more steps.
                    answers.pop("after", None)
                _evaluate(training, "after", answers, version)
            with run.display.stage(f"export: {exported.name}/"):
                run.clock.watchdog.beat("export")
                training.policy.export(exported)
            if not is_last and run.rank == 0:
                shutil.rmtree(run.folder / WARM_START / "checkpoints")
        reference = exported
    if run.rank == 0 and config.stage.evaluates:
        rows = load_rows(config.data.evaluation)
        evaluation = evaluate.report(config.stage.name, rows, list(config.data.scores), answers)
        records.write_json(run.folder / "evaluation.json", evaluation)
        write_report(run.folder)
        run.display.finish(evaluation, run.folder)


def train(training: Training, run: Run, part: str, reference: Path) -> int:
    """Train one part of ``stage.trains`` from the policy's weights and return the version of the resulting weights."""
    if part == "rl":
        rl.fit(training, run, reference)
        return training.config.algorithm.steps
    with run.display.stage(TITLES[part]):
        fit = {"sft": sft.fit, "reward_model": reward_model.fit, "value_model": value_model.fit}[part]
        fit(training, run)
    return 0


def answers_before(config: Config) -> dict[str, Answers]:
    """The answers "before" this stage, which are the answers "after" the previous stage.

    This stage starts from the previous stage's model. Empty where there is no previous stage, where it has no answers,
    or where its evaluation had other settings.
    """
    former = Path(config.model.path).parent
    former_answers = _read(former / "answers.json")
    if config.stage.after is None or not former_answers:
        return {}
    former_settings = evaluate.comparable_settings(yaml.safe_load((former / "config.yaml").read_text()))
    if former_settings != evaluate.comparable_settings(asdict(config)):
        return {}
    return {"before": former_answers["after"]}


def _evaluate(training: Training, model: str, answers: dict[str, Answers], version: int = 0) -> None:
    """Collective: have the present weights answer the held-out prompts, unless the run already has these answers."""
    config = training.config
    if model in answers or not config.stage.evaluates:
        return
    assert training.rollouts is not None
    run = training.run
    headings = records.model_stages({"stage": config.stage.name} | dict.fromkeys(answers))
    with run.display.stage(f"evaluation: {headings.get(model, model)}"):
        training.rollouts.sync_weights(version)
        answers[model] = held_out_answers(config, training.rollouts, training.processor)
        log_failures(run, answers[model])
        training.rollouts.sleep()
        if run.rank == 0:
            records.write_json(run.folder / "answers.json", answers)


def log_failures(run: Run, answers: Answers) -> None:
    """Log the most frequent failures of verifiers on held-out answers. The evaluation excludes these answers."""
    of_all_modes = [answer for of_mode in answers.values() for answer in of_mode]
    results = [{name: from_json(verdict) for name, verdict in answer["scores"].items()} for answer in of_all_modes]
    failures = mixing.failures(results, [answer["id"] for answer in of_all_modes])
    for failed in failures[: mixing.SHOWN]:
        run.log(f"evaluation: {failed}")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
