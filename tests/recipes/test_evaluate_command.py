"""What ``python -m recipes.evaluate`` evaluates, by which settings; its answers are compared in test_run."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch.distributed as dist
import yaml
from hydra.core.global_hydra import GlobalHydra

from megatron_ext.batch import TokenBatch, build, extend
from recipes import evaluate, evaluate_folders
from recipes.config import Config
from recipes.data.rows import load_rows
from recipes.data.value_examples import load_rollouts
from recipes.evaluation import rates
from recipes.evaluation.evaluate import difference
from rollout.engine import EngineSettings
from rollout.sampling import Sampling
from tests.recipes import tiny


@pytest.fixture(autouse=True)
def fresh_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    GlobalHydra.instance().clear()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], Config]]:
    """The commands that would run, and the configurations that say which servers run beside them."""
    calls: list[tuple[list[str], Config]] = []

    def run_with_servers(command: list[str], config: Config) -> int:
        calls.append((command, config))
        return 0

    monkeypatch.setattr(evaluate, "run_with_servers", run_with_servers)
    return calls


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    tiny.make(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The exit code or message of the command."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as exit:
        evaluate.main()
    return exit.value.code


def overrides(twin: Path) -> list[str]:
    kept = ("model.path", "run_dir", "recipe", "rewards", "--config-dir")
    rest = [override for override in tiny.overrides(twin, twin / "unused") if not override.startswith(kept)]
    return [f"--config-dir={twin / 'conf'}", "recipe=demo", "rewards=letters", *rest]


def test_a_folder_by_a_recipe_and_then_by_the_settings_of_that_evaluation(
    twin: Path, started: list[tuple[list[str], Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, first, second = twin / "model", twin / "first", twin / "second"
    code = call(monkeypatch, f"model={model}", f"to={first}", *overrides(twin), "data.evaluation_samples=3")
    assert code == 0, code
    ((command, config),) = started
    assert command[1:] == ["-m", "recipes.evaluate_folders", str(first), str(model)]
    assert (config.model.path, config.run_dir, config.data.evaluation_samples) == (str(model), str(first), 3)
    stored = yaml.safe_load((first / "config.yaml").read_text())
    assert stored["model"]["path"] == str(model)

    arguments = [f"run={first}", f"model={model}", f"against={model}", f"to={second}", "rollout.max_response_tokens=5"]
    assert call(monkeypatch, *arguments) == 0
    command, config = started[1]
    assert command[3:] == [str(second), str(model), str(model)]
    changed = yaml.safe_load((second / "config.yaml").read_text())
    assert (stored["rollout"].pop("max_response_tokens"), changed["rollout"].pop("max_response_tokens")) == (8, 5)
    assert changed == stored | {"run_dir": str(second)}


def test_only_the_servers_of_the_scores_start(
    twin: Path, started: list[tuple[list[str], Config]], monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = {name: {"template": "normal", "server": name} for name in ("scoring", "training")}
    servers = {name: {"model": "m", "endpoints": ["http://127.0.0.1:1"]} for name in judges}
    more = [
        f"rewards.verifiers={json.dumps(judges)}".replace('"', ""),
        "rewards.servers={"
        + ",".join(f'{name}:{{model:m,endpoints:["http://127.0.0.1:1"]}}' for name in servers)
        + "}",
        "data.scores={scoring:[task]}",
        "rewards.mix={safety:{training:1.0},general_rule:{scoring:1.0}}",
    ]
    code = call(monkeypatch, f"model={twin / 'model'}", f"to={twin / 'to'}", *overrides(twin), *more)
    assert code == 0, code
    ((_, config),) = started
    assert list(config.rewards.verifiers) == ["scoring"]
    assert set(yaml.safe_load((twin / "to" / "config.yaml").read_text())["rewards"]["verifiers"]) == set(judges)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: "),
        (["recipe=demo"], "usage: "),
        (["model=M", "step=3", "recipe=demo"], "usage: "),
        (["run=nowhere"], "error: run=nowhere: no config.yaml there"),
        (["model=nowhere", "OVERRIDES"], "error: model=nowhere: no config.json there"),
        (["model=MODEL", "against=nowhere", "OVERRIDES"], "error: against=nowhere: no config.json there"),
        (["model=MODEL", "to=MODEL", "OVERRIDES"], "is there already, and nothing is overwritten"),
        (["model=MODEL", "OVERRIDES", "stage=reward_model"], "answers no prompts"),
        (["model=MODEL", "OVERRIDES", "stage=value_model", "stage.value_model.rollouts=MODEL"], "answers no prompts"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    arguments: list[str], message: str, twin: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(twin.rglob("*"))
    given: list[str] = []
    for argument in arguments:
        given += overrides(twin) if argument == "OVERRIDES" else [argument.replace("MODEL", str(twin / "model"))]
    assert message in str(call(monkeypatch, *given))
    assert started == []
    assert sorted(twin.rglob("*")) == before


class FakeEngine:
    """In the place of vLLM: the answer of a folder named n is n tokens, whatever the prompt."""

    alive = True
    running: ClassVar[list[str]] = []

    def __init__(self, settings: EngineSettings, log: Path) -> None:
        assert settings.loads_weights and not self.running, "one model's engines after the other's"
        self.model = Path(settings.model).name
        self.running.append(self.model)

    def wait_until_ready(self, deadline: float) -> None:
        pass

    def generate(self, requests: TokenBatch, sampling: Sampling, num_complete: int | None) -> Iterator[TokenBatch]:
        for i in range(len(requests)):
            tokens = [70] * int(self.model)
            yield extend(requests.select([i]), build(requests.select([i]).prompts, [tokens], finish_reasons=["stop"]))

    def stop(self) -> None:
        self.running.remove(self.model)


def test_two_folders_answer_the_same_prompts_and_are_compared_pair_by_pair(
    twin: Path, started: list[tuple[list[str], Config]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in ("2", "3"):
        shutil.copytree(twin / "model", twin / name)
    scores = f"data.scores={{{tiny.LETTERS}:[task,benign]}}"
    arguments = [f"model={twin / '3'}", f"against={twin / '2'}", f"to={twin / 'to'}", *overrides(twin), scores]
    assert call(monkeypatch, *arguments, "data.evaluation_samples=2") == 0
    monkeypatch.setattr(evaluate_folders, "Engine", FakeEngine)
    monkeypatch.setattr(evaluate_folders, "redirect_stderr", lambda folder: None)
    ((command, _),) = started
    monkeypatch.setattr(sys, "argv", command[2:])
    evaluate_folders.main()
    assert not dist.is_initialized() and FakeEngine.running == []

    answers = json.loads((twin / "to" / "answers.json").read_text())
    kinds = {row["id"]: row["kind"] for row in map(json.loads, (twin / "eval.jsonl").read_text().splitlines())}
    for model, length in (("after", 3), ("before", 2)):
        assert [answer["id"] for answer in answers[model]["greedy"]] == list(kinds)
        assert {len(answer["response"]) for answer in answers[model]["greedy"]} == {length}
    scored = {answer["id"].split("-")[1] for answer in answers["after"]["greedy"] if tiny.LETTERS in answer["scores"]}
    assert scored == {"task", "benign"}
    evaluation = json.loads((twin / "to" / "evaluation.json").read_text())
    names = ["safety", "capability", "helpfulness", tiny.LETTERS]
    measured, measures = rates.with_rates(answers, names, kinds)
    assert evaluation["difference"] == difference(measured["before"], measured["after"], measures)
    assert evaluation["difference"][tiny.LETTERS]["n"] == 4
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Effect: {twin.name}/3 minus {twin.name}/2, same prompts" in printed

    # The sampled answers of the first are rollouts that a value model learns from.
    source, prompts = str(twin / "to" / "samples.jsonl"), load_rows(str(twin / "eval.jsonl"))
    rollouts = load_rollouts(source, prompts, {"letters": [tiny.LETTERS]}, held_out_share=0.5, seed=0)
    read = {row["sample"]: (row["response"], row["scores"]) for row in [*rollouts.trained, *rollouts.held_out]}
    expected = {}
    for place, answer in enumerate(answers["after"]["sampled"]):
        if tiny.LETTERS in answer["scores"]:
            score = answer["scores"][tiny.LETTERS]["score"]
            expected[f"0/{answer['id']}/{place % 2}"] = (answer["response"], {"letters": score})
    assert read == expected
    assert len(read) == 8
