"""Verifiers are tried on the run's own rows before anything starts, and what goes wrong names verifier and row."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from recipes.config import Config, parse
from recipes.errors import ConfigError
from recipes.launch import trial
from recipes.launch.requirements import check_parts
from rewards import mixing, registry

ROOT = Path(__file__).resolve().parents[2]
OWN = "tests.rewards.own"


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The demo's configuration on 20 rows of two labels, with a verifier of one's own in mix or scores."""
    monkeypatch.chdir(ROOT)
    rows = [{"id": f"{label}-{i}", "label": label, "kind": "k", "prompt": "?"} for label in "ab" for i in range(10)]

    def configure(*overrides: str, **of_row: Any) -> Config:
        rows[7] |= of_row
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = [f"data.{field}={tmp_path / 'rows.jsonl'}" for field in ("prompts", "evaluation")]
        mix = "++rewards.mix={a: {format: 1.0}, b: {format: 1.0}}"
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            raw = compose("config", ["recipe=demo", "algorithm.prompts_per_step=4", *data, mix, *overrides])
        raw.data.mix = {"k": 1}
        raw.data.scores = raw.data.scores if "own" in str(raw.data.scores) else {}
        return parse(raw)

    return configure


def in_mix(name: str) -> str:
    return f"++rewards.mix.b={{{OWN}.{name}: 1.0}}"


@pytest.mark.parametrize("name", ["number", "integer", "verdict", "instance"])
def test_a_verifier_that_works_is_accepted(configured: Any, name: str) -> None:
    check_parts(configured(in_mix(name)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", f"row 'b-0', answer {trial.SENTENCE!r}: it returned None"),
        ("truth", f"row 'b-0', answer {trial.SENTENCE!r}: it returned True"),
        ("not_a_number", f"row 'b-0', answer {trial.SENTENCE!r}: it returned nan"),
        ("raises", f"row 'b-0', answer {trial.SENTENCE!r}: it raised KeyError: 'no such field' (own.py:"),
        ("at_line_end", "has the parameters (completions: list[str], **fields: Any) -> list[float] and is called with"),
        ("awaits", "is async; "),
        ("Scorer", "is a class, "),
        ("one_parameter", "has the parameters (response: str) -> float and is called with (row, response)"),
    ],
)
def test_one_that_does_not_is_refused_with_its_row_and_what_is_expected(
    configured: Any, name: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_parts(configured(in_mix(name)))
    told = str(caught.value)
    assert told.startswith(f"rewards.mix, data.scores: verifier '{OWN}.{name}'")
    assert message in told
    assert "write `def score(row, response)` that returns a number from 0 to 1" in told
    assert "\n" not in told


def test_verifiers_of_the_evaluation_are_tried_too(configured: Any) -> None:
    with pytest.raises(ConfigError, match=rf"verifier '{OWN}\.two', row 'a-0', answer .*: it returned 2\.0 \(float\)"):
        check_parts(configured(f"++data.scores={{{OWN}.two: [k]}}"))


def test_a_function_that_hangs_on_a_row_is_told(configured: Any) -> None:
    config = configured(f"++rewards.mix.a={{{OWN}.sleeps: 1.0}}", "rewards.functions.timeout=3", hangs=True)
    with pytest.raises(
        ConfigError, match=r"sleeps', row 'a-7', answer '': it took more than 3 s: .*functions\.timeout"
    ):
        check_parts(config)


def test_a_function_is_not_tried_on_all_rows_of_a_large_data_set(
    configured: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row on which it hangs comes after those."""
    monkeypatch.setattr(trial, "FUNCTION_ROWS", 5)
    check_parts(configured(f"++rewards.mix.a={{{OWN}.sleeps: 1.0}}", "rewards.functions.timeout=3", hangs=True))


def test_a_verifier_of_an_environment_s_run_sees_segments(configured: Any) -> None:
    search = ["rollout=search", "rollout.environment.settings.corpus=recipes/data/search/corpus.jsonl"]
    check_parts(configured(in_mix("model_words"), *search))
    with pytest.raises(ConfigError, match="KeyError: 'segments'"):
        check_parts(configured(in_mix("model_words")))


def test_a_judge_s_requests_are_made_and_not_sent(configured: Any) -> None:
    """Nobody answers at that address."""
    judge = ["++rewards.verifiers.judged={template: general, server: s}", "++rewards.servers.s={model: m}"]
    judge += ["++rewards.servers.s.endpoints=['http://127.0.0.1:9']", "++rewards.mix.a={judged: 1.0}"]
    with pytest.raises(ConfigError, match="row 'a-0' has no `answer`, the reference"):
        check_parts(configured(*judge))
    check_parts(configured(*judge[:-1], "++rewards.verifiers.judged.template=normal", judge[-1]))


def test_answers_are_the_rows_own_a_sentence_and_none() -> None:
    assert trial.answers({"answer": "12", "response": "It is 12.", "prompt": "?"}) == [
        "12",
        "It is 12.",
        trial.SENTENCE,
        "",
    ]
    assert trial.answers({"answer": ["12"]}) == [trial.SENTENCE, ""]


@pytest.mark.parametrize("stage", ["rl_general", "rl_safety", "rl_search"])
def test_a_large_recipe_can_begin_with_rules_and_without_judges(stage: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", ["recipe=safework_72b", "rewards=rules", f"stage={stage}"]))
    check_parts(config)
    names = {*mixing.verifier_names(config.rewards.mix), *config.data.scores}
    assert registry.servers_of(names, config.rewards) == {}
