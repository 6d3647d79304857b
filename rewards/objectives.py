"""Several objectives in one reward: normalised to one scale, and one of them kept above a floor.

Pure functions of the verifiers' results. The multiplier's state is JSON, for the checkpoint.
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
    """The rewards of a prompt's samples; None where a weighted verifier failed. ``group``: one mapping per sample.

    With ``normalise`` "group" the scores of each verifier are first normalised to mean 0 and standard deviation 1 (with
    n − 1) over the group's samples with a reward, so that the spread of a verifier's scores does not change its weight.
    Equal scores become exactly 0.

    The score of the verifier ``gate``, if the mix has it, multiplies the sum: r_format · (0.1·r_format + 0.9·r_acc +
    λ·r_reliability) (Deliberative Searcher, arXiv 2507.16727).
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
    assert not isinstance(result, Failure)  # its sample has no reward
    return result.score


def initial_state(constraint: ConstraintConfig) -> dict[str, Any]:
    """The "multiplier" before the first step; as it was "applied" to the rewards of the newest step; and its
    "integral", the part that remembers former steps."""
    return dict.fromkeys(("multiplier", "applied", "integral"), constraint.initial)


def constrained_weights(
    weights: Mapping[str, float], constraint: ConstraintConfig, state: Mapping[str, Any]
) -> dict[str, float]:
    """The weights of a label's mix under the constraint: the Lagrangian (R + λ·S) / (1 + λ), with λ the multiplier and
    S the constrained verifier's score.

    A mix without that verifier is left as it is. The Lagrangian's constant −λ·floor changes no advantage and is left
    out; the division keeps the reward's scale (as in PPO-Lagrangian, Ray et al. 2019). With multiplicative weights
    R + λ·S, undivided: Deliberative Searcher's reward (arXiv 2507.16727).
    """
    if constraint.verifier is None or constraint.verifier not in weights:
        return dict(weights)
    multiplier = state["multiplier"]
    raised = {**weights, constraint.verifier: weights[constraint.verifier] + multiplier}
    if constraint.update == MULTIPLICATIVE_WEIGHTS:
        return raised
    return {name: weight / (1 + multiplier) for name, weight in raised.items()}


def advantage_scale(weights: Mapping[str, float], constraint: ConstraintConfig, state: Mapping[str, Any]) -> float:
    """What the advantages of a label's samples have to be multiplied by: 1 + λ where its mix has the constrained
    verifier, with λ as applied to their rewards, and 1 elsewhere.

    It puts back what :func:`constrained_weights` divides by and what normalisation over a group would cancel: else a
    constraint on a verifier that not all labels have would not make these labels count for more. With multiplicative
    weights it is 1: that reward is as in its paper.
    """
    if constraint.verifier not in weights or constraint.update == MULTIPLICATIVE_WEIGHTS:
        return 1.0
    return 1.0 + state["applied"]


def next_state(
    state: Mapping[str, Any], constraint: ConstraintConfig, results: Sequence[Mapping[str, VerifierResult]]
) -> dict[str, Any]:
    """The multiplier after a step. ``results``: one mapping per sample of the step.

    v = floor − mean score of the constrained verifier is the step's violation. Dual ascent: the integral I ← clip(I +
    rate · v, 0, maximum), and λ = clip(I + proportional · v, 0, maximum): what is proportional to the violation damps
    the oscillations that the integral alone makes (PID Lagrangian, arXiv 2007.03964). Multiplicative weights: λ ← min(λ
    · exp(rate · v), maximum) (Arora, Hazan, Kale 2012; Deliberative Searcher updates λ in this way, the rate and the
    bounds are our choice). A step without a verdict leaves λ as it is.
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
