"""The decisions of guided decoding, which are functions of values alone, the calibration's bound, and the router."""

import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from rollout.guidance import calibration, decisions, router, settings
from rollout.guidance.calibration import Calibration
from rollout.guidance.router import LogisticRouter, open_router
from tests.rollout.fake_guidance import PATIENT, guidance

CONF = Path(__file__).resolve().parents[2] / "conf"


def test_weights_are_brought_to_the_sum_one_in_the_principles_order() -> None:
    weights = decisions.normalised({"value": 1.0, "safety": 3.0}, ["safety", "value"])
    assert weights == (0.75, 0.25)
    assert decisions.normalised({}, ["safety", "value"]) == (0.5, 0.5)
    assert decisions.weighted([0.5, 1.0], weights) == 0.625


def test_the_best_come_first_and_equal_ones_in_their_order() -> None:
    assert decisions.best([0.1, 0.9, 0.9, 0.5], 3) == [1, 2, 3]
    assert decisions.best([0.1], 3) == [0]


@pytest.mark.parametrize(
    ("text", "thinks"),
    [("", False), ("<think>a", True), ("<think>a</think>b", False), ("<think>a</think><think>", True)],
)
def test_the_last_mark_says_whether_a_text_thinks(text: str, thinks: bool) -> None:
    assert decisions.thinks(text, ["<think>", "</think>"]) == thinks


@PATIENT
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=8),
    stops=st.lists(st.text("ab", min_size=1, max_size=3), max_size=3),
)
def test_a_text_that_is_shown_piece_by_piece_ends_where_the_whole_text_does(
    pieces: list[str], stops: list[str]
) -> None:
    whole = "".join(pieces)
    places = [whole.find(stop) for stop in stops if stop in whole]
    text = shown = ""
    for piece in pieces:
        known = len(text)
        text += piece
        stop = decisions.first_stop(text, known, stops)
        if stop is not None:
            # A text that is longer begins earlier and may be complete only later: then the shorter one ends it.
            ends = [place + len(stop_text) for stop_text in stops if (place := text.find(stop_text)) >= 0]
            assert min(ends) > known
            shown += text[len(shown) : stop]
            assert shown == text[:stop]
            assert stop >= min(places)
            return
        assert not any(stop in text for stop in stops)
        shown += text[len(shown) : len(text) - decisions.held_back(text, stops)]
        assert text.startswith(shown)
    assert not places


@pytest.mark.parametrize(("count", "level"), [(9, 0.1), (19, 0.1), (19, 0.05), (12, 0.25), (30, 0.07)])
def test_the_share_of_benign_answers_below_the_threshold_is_bounded(count: int, level: float) -> None:
    """Exactly: of n + 1 exchangeable scores each is the new one equally often."""
    scores = np.random.default_rng(count).normal(size=count + 1).tolist()
    touched = 0
    for new in range(count + 1):
        held_out = scores[:new] + scores[new + 1 :]
        touched += scores[new] < decisions.conformal_threshold(held_out, level)
    share = touched / (count + 1)
    assert share <= level
    assert share > level - 1 / (count + 1) - 1e-12  # and a higher threshold would touch more


def test_equal_scores_are_not_below_the_threshold() -> None:
    for new in range(20):
        scores = [float(place >= 10) for place in range(20)]
        held_out = scores[:new] + scores[new + 1 :]
        assert not scores[new] < decisions.conformal_threshold(held_out, 0.1) or scores[new] == 0.0
    assert decisions.conformal_threshold([0.0] * 10 + [1.0] * 9, 0.1) == 0.0


def test_the_threshold_is_the_conformal_quantile_of_the_negated_scores() -> None:
    scores = np.random.default_rng(0).normal(size=57)
    for level in (0.02, 0.05, 0.1, 0.5):
        quantile = sorted(-scores)[math.ceil(58 * (1 - level)) - 1]
        assert decisions.conformal_threshold(scores.tolist(), level) == -quantile


@pytest.mark.parametrize(("level", "needed"), [(0.05, 19), (0.1, 9), (0.3, 3)])
def test_too_few_prompts_for_a_level_are_refused(level: float, needed: int) -> None:
    decisions.conformal_threshold([0.0] * needed, level)
    with pytest.raises(ValueError, match=f"needs {needed} held-out prompts or more, and there are {needed - 1}"):
        decisions.conformal_threshold([0.0] * (needed - 1), level)


def test_the_router_s_regression_is_at_the_minimum_and_finds_what_matters() -> None:
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, 300)
    values = generator.normal(size=(300, 3)) + 3 * np.eye(3)[labels]
    penalty = 0.7
    coefficients, intercepts = router.fit(values, labels, 3, penalty)

    def loss(at: np.ndarray) -> float:
        logits = values @ at[:, :3].T + at[:, 3]
        chosen = logits[np.arange(300), labels] - np.log(np.exp(logits).sum(1))
        return float(penalty / 2 * (at**2).sum() - chosen.sum())

    fitted = np.concatenate([coefficients, intercepts[:, None]], axis=1)
    for row, column, change in itertools.product(range(3), range(4), (-1e-3, 1e-3)):
        moved = fitted.copy()
        moved[row, column] += change
        assert loss(moved) > loss(fitted)
    guesses = (values @ coefficients.T + intercepts).argmax(1)
    assert (guesses == labels).mean() > 0.9


def test_a_learned_router_weighs_by_the_query_and_a_strange_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "router.json"
    learned = LogisticRouter(["safety", "value"], [[-2.0, 0.0], [0.0, 0.0]], [0.0, 0.0], 10, 5, 0.9)
    router.write(learned, path)
    opened = open_router(guidance(router=str(path)))
    assert opened.reads_values
    assert opened.weights([0.0, 1.0]) == (0.5, 0.5)
    safety, value = opened.weights([-1.0, 1.0])
    assert safety == pytest.approx(math.e**2 / (math.e**2 + 1))
    assert safety + value == pytest.approx(1.0)
    assert opened.weights(None) == (0.5, 0.5)
    path.write_text(json.dumps(asdict(replace(learned, principles=["value", "safety"]))))
    with pytest.raises(ValueError, match=r"guidance.router=.*for the principles \['value', 'safety'\]"):
        open_router(guidance(router=str(path)))


def test_a_calibration_holds_only_for_what_it_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    config = guidance(threshold=None, calibration=str(path))
    calibrated = Calibration(0.05, 19, 1, 0.25, calibration.conditions(config, "values"), [0.25] * 19)
    calibration.write(calibrated, path)
    assert calibration.read_threshold(config, "values") == 0.25
    with pytest.raises(ValueError, match="value_model='values', here it is 'others': calibrate again"):
        calibration.read_threshold(config, "others")
    config.weights["safety"] = 2.0
    with pytest.raises(ValueError, match="weights="):
        calibration.read_threshold(config, "values")
    with pytest.raises(FileExistsError):
        calibration.write(calibrated, path)


@pytest.mark.parametrize(
    "overrides", [["guidance.threshold=0.3", "guidance.values.principles=[brevity]"], ["guidance=search"]]
)
def test_the_configurations_of_conf_are_accepted(overrides: list[str]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = settings.read(compose("guidance", overrides=overrides).guidance)
    assert (config.mode, config.beams) == (("search", 2) if overrides == ["guidance=search"] else ("monitor", 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": None}, "guidance.calibration=None, guidance.threshold=None: give one of them"),
        ({"calibration": "x.json"}, "guidance.calibration='x.json', guidance.threshold=0.5: give one of them"),
        ({"weights": {"safety": 1.0}}, r"guidance.weights=\{'safety': 1.0\}: give each of"),
        ({"weights": {"safety": 0.0, "value": 0.0}}, "one of them above 0"),
        ({"values__principles": ["safety", "safety"]}, "give each output of the value model a name"),
        ({"generator__address": "http://me:secret@host"}, "guidance.generator.address="),
        ({"candidates": 0}, "guidance.candidates=0: use 1 or more"),
        ({"server__host": "0.0.0.0"}, "guidance.server.host='0.0.0.0': others can reach it there"),
        ({"server__max_requests": 500}, "these are 1500 connections"),
        ({"thinking_marks": ["<think>"]}, "guidance.thinking_marks="),
    ],
)
def test_settings_that_can_t_work_are_refused(changes: dict[str, object], message: str) -> None:
    settings.check(guidance())
    with pytest.raises(ValueError, match=message):
        settings.check(guidance(**changes))


def test_a_missing_token_is_named() -> None:
    assert settings.key("guidance.server", None) is None
    assert settings.key("guidance.server", "TOKEN", {"TOKEN": "t"}) == "t"
    with pytest.raises(ValueError, match=r"guidance.server.key_variable='TOKEN': no such environment variable"):
        settings.key("guidance.server", "TOKEN", {})
