"""Intervals against published closed forms, statsmodels' figures, a bootstrap, and their coverage in simulation."""

import math

import numpy as np
import pytest

from recipes.evaluation.statistics import mean_interval, paired_difference


@pytest.mark.parametrize(
    ("successes", "n", "confidence", "low", "high"),
    [  # statsmodels 0.14 proportion_confint(..., method="agresti_coull")
        (0, 20, 0.95, 0.0, 0.18980956054248888),
        (45, 60, 0.95, 0.6266926041268328, 0.8432214698021223),
        (60, 60, 0.95, 0.9280110840110488, 1.0),
        (7, 10, 0.90, 0.43841587933002235, 0.8764073326366149),
    ],
)
def test_one_binary_score_per_prompt_is_agresti_coull(successes, n, confidence, low, high):
    result = mean_interval([1.0] * successes + [0.0] * (n - successes), confidence=confidence)
    assert result["n"] == n
    assert result["mean"] == pytest.approx(successes / n)
    assert result["interval"] == pytest.approx([low, high], abs=1e-12)


def test_paired_binary_scores_are_agresti_min_on_the_two_by_two_table():
    both, lost, won, neither = 20, 4, 17, 19
    before = [1.0] * both + [1.0] * lost + [0.0] * won + [0.0] * neither
    after = [1.0] * both + [0.0] * lost + [1.0] * won + [0.0] * neither
    # Agresti and Min (2005), section 3: one half more in each cell, then the Wald interval of the table.
    n, b, c = both + lost + won + neither + 2, lost + 0.5, won + 0.5
    centre = (c - b) / n
    half = 1.959963984540054 * math.sqrt((b + c) - (c - b) ** 2 / n) / n
    result = paired_difference(before, after)
    assert result["mean"] == pytest.approx((won - lost) / 60)
    assert result["interval"] == pytest.approx([centre - half, centre + half], abs=1e-12)


def test_identical_samples_of_a_prompt_add_no_evidence():
    scores = [1.0, 0.0, 1.0, 1.0, 0.1, 0.0, 1.0, 0.5]
    once = mean_interval(scores)
    repeated = mean_interval(np.repeat(scores, 4), prompts=[f"p{i}" for i in range(8) for _ in range(4)])
    assert repeated["n"] == 8
    assert repeated["mean"] == pytest.approx(once["mean"])
    assert repeated["interval"] == pytest.approx(once["interval"])


def test_prompts_are_matched_by_id_in_any_order():
    scores, prompts = np.array([0.0, 0.1, 1.0, 1.0, 0.5, 0.4]), ["a", "a", "b", "b", "c", "c"]
    order = [4, 1, 2, 5, 0, 3]
    shuffled = mean_interval(scores[order], [prompts[i] for i in order])
    assert shuffled["interval"] == pytest.approx(mean_interval(scores, prompts)["interval"])


@pytest.mark.parametrize(("rate", "concentration"), [(0.1, 30), (0.5, 3), (0.9, 0.3), (0.97, 3)])
def test_coverage_with_several_samples_per_prompt(rate, concentration):
    """Rates per prompt from a beta distribution, 4 samples of 60 prompts: a nominal 95 % interval covers the truth."""
    random = np.random.default_rng(1)
    covered = covered_difference = 0
    trials = 1000
    for _ in range(trials):
        rates = random.beta(rate * concentration, (1 - rate) * concentration, 60)
        before = random.binomial(4, rates) / 4
        after = random.binomial(4, rates + (1 - rates) * 0.3) / 4
        low, high = mean_interval(before)["interval"]
        covered += low <= rate <= high
        low, high = paired_difference(before, after)["interval"]
        covered_difference += low <= (1 - rate) * 0.3 <= high
    # Three standard errors of 1000 trials below 95 % is 0.929.
    assert covered / trials >= 0.929
    assert covered_difference / trials >= 0.929


def test_agrees_with_the_bootstrap_over_prompts_where_that_is_valid():
    random = np.random.default_rng(2)
    before = random.beta(2, 2, 400)
    after = np.clip(before + random.normal(0.05, 0.2, 400), 0, 1)
    draws = random.integers(0, 400, (20000, 400))
    expected = np.quantile((after - before)[draws].mean(axis=1), [0.025, 0.975])
    assert paired_difference(before, after)["interval"] == pytest.approx(expected, abs=0.003)
    expected = np.quantile(after[draws].mean(axis=1), [0.025, 0.975])
    assert mean_interval(after)["interval"] == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.0])
def test_unanimous_scores_keep_an_interval_that_holds_the_mean(value):
    low, high = mean_interval([value] * 12)["interval"]
    assert low <= value <= high
    assert high - low > 0.05
    low, high = paired_difference([value] * 12, [value] * 12)["interval"]
    assert low < 0 < high


def test_pairing_sees_what_separate_intervals_hide():
    before = np.linspace(0, 0.9, 80)
    after = before + 0.1
    assert mean_interval(before)["interval"][1] > mean_interval(after)["interval"][0]
    assert paired_difference(before, after)["interval"][0] > 0.05


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "at least one score"),
        (lambda: mean_interval([0.5, 1.5]), r"holds 1\.5"),
        (lambda: mean_interval([0.5, float("nan")]), "holds nan"),
        (lambda: mean_interval([0.5, 0.6], ["a"]), "1 entries for 2 scores"),
        (lambda: mean_interval([0.5], confidence=95), "confidence is 95"),
        (lambda: paired_difference([0.5], [0.5, 1.0]), "same prompts"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
