"""The measures of values, against NumPy and pairs that are counted one by one."""

from itertools import product

import numpy as np
import pytest

from recipes.evaluation.value_accuracy import accuracy, auc, calibration_error, correlation

CHANCE = np.random.default_rng(3)
VALUES = CHANCE.integers(0, 12, 60) / 11  # with ties
SCORES = CHANCE.choice([0.0, 0.1, 0.5, 1.0], 60)
WEIGHTS = CHANCE.integers(0, 3, (4, 60)).astype(float)


def repeated(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The responses as a list in which each stands as often as its weight says."""
    return np.repeat(VALUES, weights.astype(int)), np.repeat(SCORES, weights.astype(int))


@pytest.mark.parametrize("resample", range(4))
def test_weights_count_responses(resample: int) -> None:
    values, scores = repeated(WEIGHTS[resample])
    assert correlation(VALUES, SCORES, WEIGHTS)[resample] == pytest.approx(np.corrcoef(values, scores)[0, 1])

    good, bad = values[scores >= 0.5].tolist(), values[scores < 0.5].tolist()
    wins = [(here > there) + (here == there) / 2 for here, there in product(good, bad)]
    assert auc(VALUES, SCORES, WEIGHTS)[resample] == pytest.approx(np.mean(wins))

    gaps = [
        abs((scores[inside] - values[inside]).sum())
        for low in range(10)
        if (inside := (values * 10 >= low) & ((values * 10 < low + 1) | (low == 9))).any()
    ]
    assert calibration_error(VALUES, SCORES, WEIGHTS)[resample] == pytest.approx(sum(gaps) / len(values))


def test_what_is_not_defined_has_no_value() -> None:
    measured = accuracy([0.2, 0.2, 0.2], [1.0, 1.0, 1.0], ["a", "a", "b"])
    assert measured["correlation"] is None and measured["auc"] is None and measured["ranked"] is None
    assert measured["ece"] == {"mean": pytest.approx(0.8), "interval": [pytest.approx(0.8)] * 2}
    assert (measured["n"], measured["prompts"], measured["value"], measured["score"]) == (3, 2, pytest.approx(0.2), 1.0)


def test_values_that_know_the_prompt_alone_rank_no_responses_to_it() -> None:
    """They have a high AUC over all prompts, and say nothing about what guided decoding chooses from."""
    prompts = [prompt for prompt in range(20) for _ in range(4)]
    scores = [float(sample < (3 if prompt < 10 else 1)) for prompt in range(20) for sample in range(4)]
    values = [0.75 if prompt < 10 else 0.25 for prompt in prompts]
    measured = accuracy(values, scores, prompts)
    assert measured["auc"]["mean"] == pytest.approx(0.75)
    assert measured["ece"]["mean"] == pytest.approx(0)
    assert measured["ranked"]["mean"] == 0.5
    better = accuracy([value + 0.1 * score for value, score in zip(values, scores, strict=True)], scores, prompts)
    assert better["ranked"]["mean"] == 1.0


def test_the_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Of 80 draws of 30 prompts with four responses that share much: an interval that took the responses for
    independent would miss far more often."""
    missed = 0
    for draw in range(80):
        chance = np.random.default_rng(draw)
        quality = np.repeat(chance.random(30), 4)
        scores = np.clip(quality + 0.05 * chance.standard_normal(120), 0, 1)
        values = np.clip(np.repeat(chance.random(30), 4) + 0.05 * chance.standard_normal(120), 0, 1)
        low, high = accuracy(values, scores, [i // 4 for i in range(120)])["correlation"]["interval"]
        missed += not low <= 0 <= high  # values and scores are independent
    assert missed <= 12, "5 % are 4; more than 12 have a probability below 0.001"
