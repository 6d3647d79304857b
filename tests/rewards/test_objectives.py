"""Normalisation and constraint, next to their formulas."""

import json
import math
import statistics
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from recipes.algorithms.advantages import AdvantageInputs, dr_grpo, grpo
from rewards.objectives import advantage_scale, constrained_weights, group_rewards, initial_state, next_state
from rewards.settings import ConstraintConfig
from rewards.verdict import Failure, Verdict, VerifierResult

CONSTRAINT = ConstraintConfig(
    verifier="safety", update="dual_ascent", floor=0.9, rate=0.5, proportional=0.0, initial=0.25, maximum=1.0
)


def verdicts(**scores: float | None) -> dict[str, VerifierResult]:
    return {name: Failure("lost") if score is None else Verdict(score, "x") for name, score in scores.items()}


def test_without_normalisation_a_reward_is_the_mix() -> None:
    group = [verdicts(a=1.0, b=0.5), verdicts(a=None, b=0.5)]
    assert group_rewards(group, {"a": 1.0, "b": 2.0}, "none") == [2.0, None]


def test_group_normalisation_is_the_formula_and_does_not_see_the_scale() -> None:
    a, b = [0.1, 0.2, 0.4, 0.9], [0.50, 0.51, 0.49, 0.52]
    weights = {"a": 1.0, "b": 0.5}
    rewards = group_rewards([verdicts(a=x, b=y) for x, y in zip(a, b, strict=True)], weights, "group")

    def normal(values: list[float]) -> list[float]:
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return [(v - mean) / deviation for v in values]

    assert rewards == pytest.approx([x + 0.5 * y for x, y in zip(normal(a), normal(b), strict=True)])
    stretched = [0.5 + 10 * (y - 0.5) for y in b]
    again = group_rewards([verdicts(a=x, b=y) for x, y in zip(a, stretched, strict=True)], weights, "group")
    assert again == pytest.approx(rewards)


def test_equal_scores_give_exactly_zero_and_a_failed_sample_is_not_in_the_mean() -> None:
    weights = {"a": 1.0, "b": 1.0}
    group = [verdicts(a=0.1, b=0.0), verdicts(a=0.1, b=1.0), verdicts(a=0.1, b=None), verdicts(a=None, b=1.0)]
    # The scores 0 and 1 have the mean 1/2 and the standard deviation 1/√2.
    one = pytest.approx(1 / math.sqrt(2))
    minus_one = pytest.approx(-1 / math.sqrt(2))
    assert group_rewards(group, weights, "group") == [minus_one, one, None, None]
    assert group_rewards([verdicts(a=0.1, b=0.3)] * 3, weights, "group") == [0.0] * 3


def test_the_constrained_mix_has_the_lagrangian_s_advantages() -> None:
    """(R + λ(S − floor)) / (1 + λ), where the constant moves no advantage."""
    weights, state = {"safety": 1.0, "help": 1.0}, {"multiplier": 0.6}
    safety, help_ = [0.1, 1.0, 0.0, 1.0], [1.0, 0.0, 0.5, 0.5]
    group = [verdicts(safety=s, help=h) for s, h in zip(safety, help_, strict=True)]
    mixed = group_rewards(group, constrained_weights(weights, CONSTRAINT, state), "none")
    lagrangian = [(s + h + 0.6 * (s - 0.9)) / 1.6 for s, h in zip(safety, help_, strict=True)]

    def advantages(rewards: Any) -> list[float]:
        values = torch.tensor([rewards], dtype=torch.float64)
        return dr_grpo(AdvantageInputs(values, torch.ones(1, 4, dtype=torch.long), torch.zeros(4))).tolist()[0]

    assert advantages(mixed) == pytest.approx(advantages(lagrangian), abs=1e-12)


def test_scaled_advantages_of_normalised_groups_are_the_lagrangian_s_between_labels() -> None:
    """A group's advantages are divided by its standard deviation, so that a multiplier in its rewards changes nothing.
    The scale puts it back for the label that has the verifier."""
    state = {"multiplier": 0.9, "applied": 0.6}
    constrained = {"safety": 1.0}
    free = {"help": 1.0}
    scores = [0.1, 1.0, 0.0, 1.0]

    def advantages(weights: dict[str, float], multiplier: float) -> torch.Tensor:
        (name,) = weights
        group = [verdicts(**{name: score}) for score in scores]
        mixed = group_rewards(group, constrained_weights(weights, CONSTRAINT, {"multiplier": multiplier}), "none")
        lengths = torch.ones(1, 4, dtype=torch.long)
        inputs = AdvantageInputs(torch.tensor([mixed], dtype=torch.float64), lengths, torch.zeros(4))
        return grpo(inputs, advantage_epsilon=1e-9)

    for weights, expected in ((constrained, 1.6), (free, 1.0)):
        torch.testing.assert_close(advantages(weights, 0.6), advantages(weights, 0.0))
        assert advantage_scale(weights, CONSTRAINT, state) == pytest.approx(expected)
    multiplicative = replace(CONSTRAINT, update="multiplicative_weights")
    assert advantage_scale(constrained, multiplicative, state) == 1.0
    assert advantage_scale(constrained, replace(CONSTRAINT, verifier=None), state) == 1.0


def test_a_multiplier_of_zero_and_a_mix_without_the_verifier_change_nothing() -> None:
    weights = {"safety": 1.0, "help": 0.5}
    assert constrained_weights(weights, CONSTRAINT, {"multiplier": 0.0}) == weights
    assert constrained_weights({"help": 0.5}, CONSTRAINT, {"multiplier": 0.7}) == {"help": 0.5}


def test_the_multiplier_rises_below_the_floor_falls_above_it_and_stays_in_its_bounds() -> None:
    state = initial_state(CONSTRAINT)
    assert state == {"multiplier": 0.25, "applied": 0.25, "integral": 0.25}
    below = [verdicts(safety=0.5), verdicts(safety=0.7), verdicts(safety=None), verdicts(help=0.0)]
    state = next_state(state, CONSTRAINT, below)
    assert state["multiplier"] == pytest.approx(0.25 + 0.5 * (0.9 - 0.6)) and state["applied"] == 0.25
    state = json.loads(json.dumps(state))
    above = next_state(state, CONSTRAINT, [verdicts(safety=1.0)])
    assert above["multiplier"] == pytest.approx(0.4 - 0.5 * 0.1)
    unjudged = next_state(state, CONSTRAINT, [verdicts(help=1.0)])
    assert unjudged == {**state, "applied": state["multiplier"]}
    for score, bound in ((0.0, 1.0), (1.0, 0.0)):
        for _ in range(40):
            state = next_state(state, CONSTRAINT, [verdicts(safety=score)])
        assert state["multiplier"] == bound


def test_the_multiplier_settles_where_the_floor_is_met() -> None:
    """A policy whose safety rises with the multiplier ends at the floor, not above."""
    state = initial_state(CONSTRAINT)
    safety = []
    for _ in range(200):
        safety.append(min(1.0, 0.7 + 0.4 * state["multiplier"]))
        state = next_state(state, CONSTRAINT, [verdicts(safety=safety[-1])])
    assert statistics.fmean(safety[-20:]) == pytest.approx(0.9, abs=1e-6)
    assert state["multiplier"] == pytest.approx(0.5, abs=1e-6)


def test_a_proportional_part_damps_a_policy_that_the_integral_alone_makes_oscillate() -> None:
    """Of a policy whose safety moves by what the multiplier is above 1/2, as weights do under an optimiser, the
    integral alone never comes to rest."""

    def safety(proportional: float) -> list[float]:
        damped = replace(CONSTRAINT, proportional=proportional, initial=0.5, maximum=5.0)
        state = initial_state(damped)
        scores = [0.7]
        for _ in range(300):
            state = next_state(state, damped, [verdicts(safety=scores[-1])])
            scores.append(min(max(scores[-1] + 0.2 * (state["multiplier"] - 0.5), 0.0), 1.0))
        return scores

    assert max(safety(0.0)[-50:]) - min(safety(0.0)[-50:]) > 0.1
    assert safety(2.0)[-50:] == pytest.approx([0.9] * 50, abs=1e-6)
    state = next_state(initial_state(CONSTRAINT), replace(CONSTRAINT, proportional=2.0), [verdicts(safety=0.7)])
    assert state["integral"] == pytest.approx(0.25 + 0.5 * 0.2)
    assert state["multiplier"] == pytest.approx(0.25 + (0.5 + 2.0) * 0.2)
    assert next_state(state, replace(CONSTRAINT, proportional=90.0), [verdicts(safety=0.7)])["multiplier"] == 1.0


def test_multiplicative_weights_are_the_closed_form() -> None:
    """λ after n steps of the same violation v is λ0 · exp(n · rate · v): up below the floor, down above it."""
    limit = replace(CONSTRAINT, update="multiplicative_weights", rate=0.5, initial=0.25, maximum=10.0)
    for score, steps in ((0.1, 4), (1.0, 7)):
        state = initial_state(limit)
        for _ in range(steps):
            state = next_state(state, limit, [verdicts(safety=score), verdicts(safety=score), verdicts(other=1.0)])
        assert state["multiplier"] == pytest.approx(0.25 * math.exp(steps * 0.5 * (0.9 - score)), rel=1e-12)
    assert next_state(state, limit, [verdicts(other=1.0)])["multiplier"] == state["multiplier"]
    near = dict.fromkeys(state, 9.9)
    assert next_state(near, limit, [verdicts(safety=0.0)])["multiplier"] == 10.0
    assert json.loads(json.dumps(state)) == state


def test_the_gated_reward_is_deliberative_search_s_formula() -> None:
    """r_format · (0.1·r_format + 0.9·r_acc + λ·r_reliability), over all outcomes."""
    limit = replace(CONSTRAINT, verifier="reliability", update="multiplicative_weights")
    mix = {"format": 0.1, "accuracy": 0.9, "reliability": 0.0}
    for multiplier in (0.0, 0.4, 3.0):
        weights = constrained_weights(mix, limit, {"multiplier": multiplier})
        for f, a, r in product((0.0, 1.0), repeat=3):
            group = [verdicts(format=f, accuracy=a, reliability=r)]
            expected = f * (0.1 * f + 0.9 * a + multiplier * r)
            assert group_rewards(group, weights, "none", "format") == pytest.approx([expected])
    lost = [verdicts(format=1.0, accuracy=None, reliability=1.0), verdicts(format=None, accuracy=1.0, reliability=1.0)]
    assert group_rewards(lost, mix, "none", "format") == [None, None]
    assert group_rewards([verdicts(a=0.5)], {"a": 1.0}, "none", "format") == [0.5], "a mix without the gate"
