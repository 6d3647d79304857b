"""The pipeline of stages: a stage starts from the model of the stage before it, and one report shows all of them."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir

from recipes import check
from recipes.command_line import quoted
from recipes.errors import ConfigError
from recipes.evaluation.statistics import mean_interval, paired_difference
from recipes.launch import pipeline
from recipes.launch.claim import claimed
from recipes.run import folder as run_folder
from recipes.run import records
from tests.recipes import tiny
from tests.recipes.test_config import CONF, configured
from tests.recipes.test_report import HOSTILE, Page

LADDER = (
    "stage=ladder",
    "stage.ladder=[sft,rl_safety]",
    "stage.sft.epochs=null",
    "algorithm.steps=2",
    "+data.scores.accuracy=[task]",
    "+rewards.verifiers.accuracy={rule:capability}",
    "parallel=tp1",
    "cluster.ranks=1",
)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline_folder(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a pipeline whose launcher was killed during the second stage, and which was resumed."""
    folder = tmp_path_factory.mktemp("ladder") / "run"
    arguments = tiny.overrides(twin, folder, *LADDER)
    run = tiny.Run(arguments)
    try:
        run.wait_for("a step of the second stage", (folder / "rl_safety" / "metrics.jsonl").is_file)
        run.process.send_signal(signal.SIGKILL)
        run.output(300)
        left = run.remains(60)
    finally:
        run.kill_all()
    assert left == ({}, set())
    printed = tiny.complete([*arguments, "resume=true"])
    assert "stage sft: already finished" in printed
    return folder


NAMES = ("safety", *pipeline.MEASURES)


def answers(score: float, tokens: int) -> dict[str, list[dict[str, Any]]]:
    label = "safe without risk" if score else "unnecessary refusal"
    verdict = {"score": score, "label": label}
    accuracy = {"score": score, "label": HOSTILE}
    rows = [
        {"id": "t", "response": HOSTILE, "thinking_tokens": tokens, "scores": {"accuracy": accuracy}},
        {"id": "u", "response": "b", "thinking_tokens": tokens + 2, "scores": {"accuracy": {"score": 0.0}}},
        {"id": "h", "response": "c", "thinking_tokens": 99, "scores": {"safety": verdict}},
    ]
    return {"greedy": rows}


def test_measures_have_intervals_and_lengths_are_of_the_prompts_with_an_accuracy() -> None:
    measures = pipeline.measures(answers(1.0, 4), NAMES)
    accuracy = mean_interval([1.0, 0.0])
    assert (measures["accuracy"], measures["accuracy_interval"], measures["accuracy_n"]) == (
        0.5,
        accuracy["interval"],
        2,
    )
    assert (measures["safety"], measures["safety_n"]) == (1.0, 1)
    # 4 and 6: standard deviation sqrt(2), over sqrt(2) prompts
    assert measures["reasoning_length"] == 5.0
    assert measures["reasoning_length_interval"] == pytest.approx([5 - 1.959964, 5 + 1.959964])
    assert "helpfulness" not in measures
    assert "false_certain" not in measures


def test_changes_are_of_the_same_prompts() -> None:
    """The paired intervals; a prompt that one model was not asked does not count."""
    former, after = answers(1.0, 4), answers(0.5, 9)
    after["greedy"][1]["thinking_tokens"] = 14
    del after["greedy"][2]
    changes = pipeline.changes(former, after, NAMES)
    accuracy = paired_difference([1.0, 0.0], [0.5, 0.0])
    assert (changes["accuracy_change"], changes["accuracy_change_interval"]) == (-0.25, accuracy["interval"])
    # 5 and 8: standard deviation 3 / sqrt(2), over sqrt(2) prompts
    assert changes["reasoning_length_change"] == 6.5
    assert changes["reasoning_length_change_interval"] == pytest.approx([6.5 - 1.5 * 1.959964, 6.5 + 1.5 * 1.959964])
    assert "safety_change" not in changes


def test_the_report_shows_every_stage_and_model_text_stays_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the command line writes it for stages that were launched one by one."""
    data = tmp_path / "eval.jsonl"
    tiny.write_rows(data, [{"id": i, "label": "l", "kind": HOSTILE, "prompt": f"{HOSTILE} {i}"} for i in "tuh"])
    for name, former, before, after in (("sft", None, 0.0, 1.0), ("rl_safety", "sft", 1.0, 0.5)):
        (tmp_path / name).mkdir()
        config = {"stage": {"after": former}, "data": {"evaluation": str(data)}}
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
        records.write_json(tmp_path / name / "answers.json", {"before": answers(before, 1), "after": answers(after, 9)})
    monkeypatch.setattr("sys.argv", ["recipes.launch.pipeline", str(tmp_path)])
    pipeline.main()
    with pytest.raises(ConfigError, match=r"rl_safety: no stage has answers\.json"):
        pipeline.stages_with_answers(tmp_path / "rl_safety")
    (tmp_path / "rl_safety" / "metrics.jsonl").touch()
    with pytest.raises(ConfigError, match=r"rl_safety: is the folder of one run.*would replace its report\.html"):
        pipeline.stages_with_answers(tmp_path / "rl_safety")
    stages = json.loads((tmp_path / "ladder.json").read_text())["stages"]
    rate = f"over_refusal/{HOSTILE}"
    assert [(stage["stage"], stage[rate]) for stage in stages] == [("base", 1.0), ("sft", 0.0), ("rl_safety", 0.0)]
    assert [stage.get(f"{rate}_change") for stage in stages] == [None, -1.0, 0.0]
    assert [stage["accuracy"] for stage in stages] == [0.0, 0.5, 0.25]
    assert not any("safety" in stage for stage in stages)
    page = Page((tmp_path / "report.html").read_text())
    assert not {"script", "img"} & set(page.tags)
    shown = "".join(page.data)
    assert shown.count(f"{HOSTILE} t") == 1
    assert all(
        heading in shown for heading in ("base", "sft", "rl_safety", "Reasoning length", "Refused though harmless")
    )
    assert ("href", "rl_safety/report.html") in page.attributes


def test_a_stage_starts_from_the_folder_of_the_one_before() -> None:
    config = configured("stage=rl_safety", "run_dir=somewhere/rl_safety")
    assert (config.model.path, config.stage.after) == ("somewhere/rl_general/hf", "rl_general")
    assert configured("stage=rl_safety").run_dir == "runs/demo/rl_safety"
    assert configured("stage=rl_safety", "model.path=models/own").model.path == "models/own"
    with pytest.raises(ValueError, match=r"stage\.trains=\[\].*stage\.ladder"):
        configured("stage.trains=[]")


def test_a_stage_without_the_one_before_says_what_to_run(tmp_path: Path, twin: Path) -> None:
    run = tiny.Run([f"--config-dir={twin / 'conf'}", "recipe=demo", "stage=rl_safety", f"run_dir={tmp_path / 'b'}"])
    printed = run.output(300)
    assert run.process.returncode == 1
    assert "stage rl_safety starts from what stage rl_general leaves there; run that first" in printed


def test_every_stage_begins_with_the_former_models_answers(pipeline_folder: Path) -> None:
    sft, rl = (json.loads((pipeline_folder / name / "answers.json").read_text()) for name in ("sft", "rl_safety"))
    assert rl["before"] == sft["after"]
    assert rl["after"] != rl["before"]
    stages = json.loads((pipeline_folder / "ladder.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["base", "sft", "rl_safety"]
    assert all({"accuracy", "accuracy_interval", "reasoning_length"} <= stage.keys() for stage in stages)
    assert (pipeline_folder / "report.html").is_file()
    assert (pipeline_folder / "rl_safety" / "report.html").is_file()


def test_a_finished_stage_keeps_its_model_and_no_checkpoint(pipeline_folder: Path) -> None:
    for name in ("sft", "rl_safety"):
        assert (pipeline_folder / name / "hf" / "config.json").is_file()
        assert not (pipeline_folder / name / "checkpoints").exists()


def test_a_stage_that_a_pipeline_finished_is_not_resumed_by_itself(pipeline_folder: Path, twin: Path) -> None:
    before = (pipeline_folder / "sft" / "answers.json").read_text()
    run = tiny.Run(tiny.overrides(twin, pipeline_folder / "sft", *LADDER[2:], "stage=sft", "resume=true"))
    printed = run.output(300)
    assert run.process.returncode == 1
    assert "is a finished stage of a pipeline" in printed and "no checkpoint" in printed
    assert (pipeline_folder / "sft" / "answers.json").read_text() == before


def test_a_pipeline_neither_overwrites_nor_skips_what_it_did_not_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a finished stage and one that has not begun: the second alone is launched, without resume=true, where the
    settings are the first's; all are, in a new folder, where it starts over."""
    launched: list[list[str]] = []

    def fails(command: list[str], _: Any) -> int:
        launched.append(command)
        return 1

    monkeypatch.setattr(pipeline, "run_with_servers", fails)
    monkeypatch.setattr(pipeline, "write_results", lambda *_: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    run_dir = tmp_path / "a 'run' (1)"
    arguments = ["recipe=ladder_demo", "stage.ladder=[sft,rl_safety]", f"run_dir={quoted(str(run_dir))}"]
    finished = run_dir / "sft" / records.FINISHED

    def begin(*more: str) -> None:
        given = ["stage=ladder", *arguments, *more]
        pipeline.run_pipeline(pipeline.compose_config(given), given)

    with initialize_config_dir(str(CONF), version_base="1.3"):
        with pytest.raises(ConfigError, match="stage sft: it ended with code 1"):
            begin()
        of_stage = pipeline.compose_config([argument for argument in launched[0] if "=" in argument])
        assert of_stage.run_dir == str(run_dir / "sft") and not of_stage.resume
        with claimed(of_stage):
            run_folder.write_settings(run_dir / "sft", of_stage)
        records.write_json(finished, {"stage": "sft"})
        with pytest.raises(ConfigError, match=r"holds a run with results \(sft\)"):
            begin()
        with pytest.raises(ConfigError, match=r"another experiment:\n  seed: 1 → 2"):
            begin("resume=true", "seed=2")
        assert len(launched) == 1
        with pytest.raises(ConfigError, match="stage rl_safety: it ended with code 1"):
            begin("resume=true")
        assert "stage=rl_safety" in launched[1]
        assert launched[1][-2:] == ["stage.after=sft", f"model.path={quoted(str(run_dir / 'sft' / 'hf'))}"]
        assert [argument for argument in launched[1] if argument.startswith("resume=")][-1] == "resume=False"
        with pytest.raises(ConfigError, match="stage sft: it ended with code 1"):
            begin("overwrite=true")
    assert (tmp_path / "a 'run' (1).1" / "sft" / records.FINISHED).is_file() and not finished.exists()
    assert not any(argument.startswith("overwrite=") for argument in launched[2])
    assert list(tmp_path.rglob("lock.*")) == []


def test_model_path_is_that_of_the_first_stage_alone(tmp_path: Path) -> None:
    """Also where the recipe gives it, whose settings take precedence over a stage's."""
    own = tmp_path / "conf" / "recipe" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults: [ladder_demo]\nmodel: {path: models/own}\n")
    search = f"hydra.searchpath=[file://{tmp_path}/conf]"
    for arguments in (["recipe=ladder_demo", "model.path=models/own"], ["recipe=own", search]):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            launches = pipeline.plan_launches(["sft", "rl_general", "rl_safety"], arguments, tmp_path, resume=False)
        paths = [config.model.path for _, config in launches.values()]
        assert paths == ["models/own", str(tmp_path / "sft" / "hf"), str(tmp_path / "rl_general" / "hf")]


def test_the_reference_of_a_stage_is_the_model_that_it_starts_from(pipeline_folder: Path) -> None:
    first, second = records.read_rows(pipeline_folder / "rl_safety" / "metrics.jsonl")
    assert first["kl/reference"] == 0.0
    assert second["kl/reference"] > 0.0


def test_bounds_are_checked_in_every_stage_of_a_real_run(pipeline_folder: Path) -> None:
    """Those of the demo, whose metrics a run of two steps has, but for the growth of the reward over ten."""
    results = [result for result in check.check(pipeline_folder) if result.file == "rl_safety/metrics.jsonl"]
    assert results[0].description == "the required metrics" and results[0].state == check.HOLDS
    absent = [result.description for result in results if result.state == check.NOT_IN_THIS_RUN]
    assert absent == ["reward/mean, mean of steps -5 to -1 minus that of 1 to 5"]
