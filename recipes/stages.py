"""The ladder of a run: base → SFT → RL, each stage from the former's checkpoint, evaluated in between."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from megatron_ext import hf_checkpoint
from recipes import evaluate, records, reward_model, rl, sft
from recipes.report import write_report
from recipes.session import Session


def run_stages(session: Session) -> None:
    """Run ``stage.names``; finished stages of a resumed run are taken from its folder."""
    config, display, run_dir = session.config, session.display, session.run_dir
    answers = _read(run_dir / "answers.json")
    start = Path(config.model.path)

    def evaluated(stage: str, title: str, version: int) -> None:
        if stage not in answers:
            with display.stage(f"evaluation: {title}"):
                session.sync_weights(version)
                answers[stage] = evaluate.answer(session)
                if session.rank == 0:
                    records.write_json(run_dir / "answers.json", answers)

    if config.stage.names in (["sft"], ["reward_model"]):
        with display.stage("training"):
            (sft if config.stage.names == ["sft"] else reward_model).fit(session)
        with display.stage("export: hf/"):
            session.export(run_dir / "hf")
        return
    if "sft" in config.stage.names:
        tuned = run_dir / "sft"
        if not (tuned / "config.json").is_file():
            evaluated("base", "base model", 0)
            with display.stage("SFT warm start"):
                warm_start(session)
                session.export(tuned)
                if session.rank == 0:
                    shutil.rmtree(run_dir / "warm_start" / "checkpoints")
        else:
            hf_checkpoint.load(session.model.shards, tuned)
        start = tuned
    evaluated("before", "before RL", 0)
    rl.fit(session, reference=start)
    evaluated("after", "after RL", config.algorithm.steps)
    with display.stage("export: hf/"):
        session.export(run_dir / "hf")
    if session.rank == 0:
        evaluation = evaluate.report(session, answers)
        records.write_json(run_dir / "evaluation.json", evaluation)
        write_report(run_dir)
        display.finish(evaluation, run_dir)


def warm_start(session: Session) -> None:
    """SFT before RL in one run, with records and checkpoints in a folder of its own."""
    folder = session.run_dir / "warm_start"
    folder.mkdir(exist_ok=True)
    sft.fit(replace(session, run_dir=folder))


def _read(path: Path) -> dict[str, evaluate.Answers]:
    return json.loads(path.read_text()) if path.is_file() else {}
