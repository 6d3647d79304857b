"""One launch of a recipe: what ``stage.trains`` names, in order, and the policy's evaluation around it."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_ext import hf_checkpoint
from recipes.config import Config
from recipes.data.rows import load_rows
from recipes.data.sources import RowsById
from recipes.evaluation import evaluate
from recipes.report.page import write_report
from recipes.run import records
from recipes.training import reward_model, rl, sft
from recipes.training.session import Session
from rewards.verdict import from_json
from rollout.sample import Sample

WARM_START = "warm_start"


def run_stage(session: Session) -> None:
    """Train, evaluate, export to ``run_dir/hf`` and report; what a resumed run has done is taken from its folder."""
    config, run_dir, trains = session.config, session.run_dir, session.config.stage.trains
    answers: dict[str, evaluate.Answers] = _read(run_dir / "answers.json") or answers_before(config)
    reference = Path(config.model.path)
    models = evaluate.MODELS[-1 - len(trains) :]
    for part, before in zip(trains, models, strict=False):
        last = part == trains[-1]
        trained = run_dir / ("hf" if last else part)
        if not last and (trained / "config.json").is_file():
            hf_checkpoint.load(session.model.shards, trained)
        else:
            _evaluate(session, before, answers)
            version = train(session if last else warm_start(session), part, reference)
            if last:
                _evaluate(session, "after", answers, version)
            with session.display.stage(f"export: {trained.name}/"):
                session.export(trained)
            if not last and session.rank == 0:
                shutil.rmtree(run_dir / WARM_START / "checkpoints")
        reference = trained
    if session.rank == 0 and config.stage.evaluates:
        rows = load_rows(config.data.evaluation)
        evaluation = evaluate.report(config.stage.name, rows, list(config.data.scores), answers)
        records.write_json(run_dir / "evaluation.json", evaluation)
        write_report(run_dir)
        session.display.finish(evaluation, run_dir)


def train(session: Session, part: str, reference: Path) -> int:
    """One of ``stage.trains``, from the session's weights; returns the version of the weights that it leaves."""
    if part == "rl":
        rl.fit(session, reference)
        return session.config.algorithm.steps
    with session.display.stage({"sft": "SFT", "reward_model": "reward model"}[part]):
        (sft if part == "sft" else reward_model).fit(session)
    return 0


def warm_start(session: Session) -> Session:
    """For a part that another follows: with records and checkpoints of its own."""
    folder = session.run_dir / WARM_START
    folder.mkdir(exist_ok=True)
    return replace(session, run_dir=folder)


def answers_before(config: Config) -> dict[str, evaluate.Answers]:
    """The former stage's last answers, where it was asked the same: its model is the one that this one begins with."""
    former = Path(config.model.path).parent
    if config.stage.after is None or not (found := _read(former / "answers.json")):
        return {}
    former_settings = evaluate.comparable_settings(yaml.safe_load((former / "config.yaml").read_text()))
    return {"before": found["after"]} if former_settings == evaluate.comparable_settings(asdict(config)) else {}


def _evaluate(session: Session, model: str, answers: dict[str, evaluate.Answers], version: int = 0) -> None:
    """Collective: have the present weights answer the held-out prompts, once in a run's life."""
    if model in answers or not session.config.stage.evaluates:
        return
    headings = records.model_stages({"stage": session.config.stage.name} | dict.fromkeys(answers))
    with session.display.stage(f"evaluation: {headings.get(model, model)}"):
        session.sync_weights(version)
        answers[model] = held_out_answers(session)
        session.sleep_engines()
        if session.rank == 0:
            records.write_json(session.run_dir / "answers.json", answers)


def held_out_answers(session: Session) -> evaluate.Answers:
    """Collective: the answers of the engines' present weights to the held-out prompts."""
    config = session.config
    rows = load_rows(config.data.evaluation)
    by_id = RowsById(rows)
    prompts = [session.prompts(row).prompt for row in rows]

    def verify(sample: Sample) -> dict[str, Any]:
        row = by_id[sample.prompt_id]
        return session.judge(row, sample, evaluate.score_names(row, config.data.scores))

    def encode(text: str) -> list[int]:
        return session.tokenizer.encode(text, add_special_tokens=False)

    def generate(samples_per_prompt: int, temperature: float) -> list[evaluate.Response]:
        samples, results = session.generate(prompts, samples_per_prompt, evaluate.EVALUATION_STEP, temperature, verify)
        responses = []
        for sample, of_sample in zip(samples, results, strict=True):
            text = session.text(sample)
            thinking = evaluate.thinking_tokens(text, len(sample.response_token_ids), encode)
            verdicts = {name: from_json(result) for name, result in of_sample.items()}
            responses.append(evaluate.Response(sample.prompt_id, text, thinking, verdicts))
        return responses

    return evaluate.answer(generate, config.data.evaluation_samples, config.rollout.temperature)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
