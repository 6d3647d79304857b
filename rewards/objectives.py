"""Combine several objectives into one reward, with a common scale, and keep one of them above a floor.

The functions are pure functions of the verifiers' results. The state of the constraint's multiplier is plain JSON, so
that it can be stored in the checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rewards import mixing
from rewards.settings import MULTIPLICATIVE_WEIGHTS, ConstraintConfig
from rewards.verdict import Failure, VerifierResult


def group_rewards(
    group: Sequence[Mapping[str, VerifierResult]], weights: Mapping[str, float], normalise: str, gate: str | None = None
) -> list[float | None]:
    """The rewards of a prompt's samples. The reward is None where a weighted verifier failed.

    ``group`` has one mapping from verifier name to result per sample.

    With ``normalise`` "group", each verifier's scores are first normalised to mean 0 and standard deviation 1 (with
    n − 1) over the samples of the group that have a reward. So the spread of a verifier's scores does not change its
    weight. Equal scores become exactly 0.

    If the mix has the verifier ``gate``, its score multiplies the weighted sum, and no scores are normalised. This is
    r_format · (0.1·r_format + 0.9·r_acc + λ·r_reliability) of Deliberative Searcher (arXiv 2507.16727).
    """
    mixed = [mixing.mix(results, weights) for results in group]
    if gate is not None and gate in weights:
        return [
            None if reward is None else _score(results[gate]) * reward
            for reward, results in zip(mixed, group, strict=True)
        ]
    if normalise == "none":
        return mixed
    rewarded = [i for i, reward in enumerate(mixed) if reward is not None]
    rewards: list[float | None] = [None if reward is None else 0.0 for reward in mixed]
    for name, weight in weights.items():
        scores = [_score(group[i][name]) for i in rewarded]
        if len(set(scores)) > 1:
            mean = fmean(scores)
            deviation = stdev(scores)
            for i, score in zip(rewarded, scores, strict=True):
                rewards[i] = (rewards[i] or 0.0) + weight * (score - mean) / deviation
    return rewards


def _score(result: VerifierResult) -> float:
    assert not isinstance(result, Failure)  # samples with a failed verifier have no reward and are left out
    return result.score


def initial_state(constraint: ConstraintConfig) -> dict[str, Any]:
    """The multiplier's state before the first step.

    "multiplier" is the value for the next step, "applied" the value that the rewards of the latest step were computed
    with, and "integral" the part of the multiplier that accumulates over the steps.
    """
    return dict.fromkeys(("multiplier", "applied", "integral"), constraint.initial)


def constrained_weights(
    weights: Mapping[str, float], constraint: ConstraintConfig, state: Mapping[str, Any]
) -> dict[str, float]:
    """The weights of a label's mix under the constraint.

    They give the Lagrangian (R + λ·S) / (1 + λ), where R is the mix's reward, λ the multiplier and S the constrained
    verifier's score. The division keeps the reward's scale (as in PPO-Lagrangian, Ray et al. 2019). The Lagrangian's
    constant −λ·floor is left out, since it changes no advantage. With multiplicative weights the reward is R + λ·S,
    without the division, as in Deliberative Searcher (arXiv 2507.16727).

    A mix without the constrained verifier is returned unchanged.
    """
    if constraint.verifier is None or constraint.verifier not in weights:
        return dict(weights)
    multiplier = state["multiplier"]
    raised = {**weights, constraint.verifier: weights[constraint.verifier] + multiplier}
    if constraint.update == MULTIPLICATIVE_WEIGHTS:
        return raised
    return {name: weight / (1 + multiplier) for name, weight in raised.items()}


def advantage_scale(weights: Mapping[str, float], constraint: ConstraintConfig, state: Mapping[str, Any]) -> float:
    """The factor by which to multiply the advantages of a label's samples.

    It is 1 + λ if the label's mix has the constrained verifier, with the λ that was applied to their rewards, and 1
    otherwise. It restores the factor that :func:`constrained_weights` divides by and that normalisation over a group
    would cancel. Without it, if only some labels have the constrained verifier, the constraint would not give these
    labels more weight. With multiplicative weights it is 1, so that the reward is the paper's.
    """
    if constraint.verifier not in weights or constraint.update == MULTIPLICATIVE_WEIGHTS:
        return 1.0
    return 1.0 + state["applied"]


def next_state(
    state: Mapping[str, Any], constraint: ConstraintConfig, results: Sequence[Mapping[str, VerifierResult]]
) -> dict[str, Any]:
    """The multiplier's state after a step. ``results`` has one mapping per sample of the step.

    The step's violation is v = floor − mean score of the constrained verifier.

    Dual ascent: I ← clip(I + rate · v, 0, maximum) for the integral I, and λ = clip(I + proportional · v, 0, maximum).
    The proportional term damps the oscillations that the integral alone causes (PID Lagrangian, arXiv 2007.03964).

    Multiplicative weights: λ ← min(λ · exp(rate · v), maximum) (Arora, Hazan, Kale 2012). Deliberative Searcher updates
    λ in this way. The rate and the bounds are our choice.

    A step without a verdict of the constrained verifier leaves λ unchanged.
    """
    applied = state["multiplier"]
    mean = mixing.verifier_means(results).get(constraint.verifier or "")
    if mean is None:
        return {**state, "applied": applied}
    violation = constraint.floor - mean
    if constraint.update == MULTIPLICATIVE_WEIGHTS:
        integral = state["integral"] * math.exp(constraint.rate * violation)
    else:
        integral = state["integral"] + constraint.rate * violation
    integral = min(max(integral, 0.0), constraint.maximum)
    multiplier = min(max(integral + constraint.proportional * violation, 0.0), constraint.maximum)
    return {"multiplier": multiplier, "applied": applied, "integral": integral}
