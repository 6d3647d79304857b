"""Several objectives in one reward: each on the same scale, and one of them kept above a floor.

Pure functions over what the verifiers said; the multiplier's state is JSON, for the checkpoint.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from rewards import mixing
from rewards.settings import MULTIPLICATIVE_WEIGHTS, ConstraintConfig
from rewards.verdict import Failure, Judgement


def group_rewards(
    group: Sequence[Mapping[str, Judgement]], weights: Mapping[str, float], normalise: str, gate: str | None = None
) -> list[float | None]:
    """The rewards of a prompt's samples; None where a weighted verifier failed.

    With ``normalise`` "group" each verifier's scores are first brought to mean 0 and (population) standard deviation 1
    over those of the group that have a reward, so that a verifier whose scores lie close together weighs as much as one
    whose scores lie apart. Equal scores become exactly 0.

    The score of the verifier ``gate``, of a label whose mix has it, multiplies the sum: r_format · (0.1·r_format +
    0.9·r_acc + λ·r_reliability) (Deliberative Searcher, arXiv 2507.16727).
    """
    plain = [mixing.mix(verdicts, weights) for verdicts in group]
    if gate is not None and gate in weights:
        gated = zip(plain, group, strict=True)
        return [None if reward is None else _score(verdicts[gate]) * reward for reward, verdicts in gated]
    if normalise == "none":
        return plain
    judged = [i for i, reward in enumerate(plain) if reward is not None]
    rewards: list[float | None] = [None if reward is None else 0.0 for reward in plain]
    for name, weight in weights.items():
        scores = [_score(group[i][name]) for i in judged]
        if len(set(scores)) > 1:
            mean, deviation = fmean(scores), pstdev(scores)
            for i, score in zip(judged, scores, strict=True):
                rewards[i] = (rewards[i] or 0.0) + weight * (score - mean) / deviation
    return rewards


def _score(judgement: Judgement) -> float:
    assert not isinstance(judgement, Failure)  # its sample has no reward
    return judgement.score


def initial_state(constraint: ConstraintConfig) -> dict[str, Any]:
    return {"multiplier": constraint.initial}


def constrained_weights(
    weights: Mapping[str, float], constraint: ConstraintConfig, state: Mapping[str, Any]
) -> dict[str, float]:
    """The mix of the Lagrangian: (R + λ·S) / (1 + λ) with λ the multiplier and S the constrained verifier's score.

    Of a label whose mix has that verifier; others, and all without a constraint, are left as they are. The constant
    −λ·floor changes no advantage, and the division keeps the reward's scale (as in PPO-Lagrangian, Ray et al. 2019).
    With multiplicative weights R + λ·S, undivided: Deliberative Searcher's reward (arXiv 2507.16727).
    """
    if constraint.verifier is None or constraint.verifier not in weights:
        return dict(weights)
    multiplier = state["multiplier"]
    raised = {**weights, constraint.verifier: weights[constraint.verifier] + multiplier}
    if constraint.update == MULTIPLICATIVE_WEIGHTS:
        return raised
    return {name: weight / (1 + multiplier) for name, weight in raised.items()}


def next_state(
    state: Mapping[str, Any], constraint: ConstraintConfig, judged: Sequence[Mapping[str, Judgement]]
) -> dict[str, Any]:
    """The multiplier after a step, by the violation v = floor − mean score of the step's verdicts of that verifier.

    Dual ascent: λ ← clip(λ + rate · v, 0, maximum). Multiplicative weights (Arora, Hazan, Kale 2012; that λ is updated
    so is Deliberative Searcher's, rate and bounds are our choice): λ ← min(λ · exp(rate · v), maximum).
    A step without a verdict leaves it as it is.
    """
    mean = mixing.verifier_means(judged).get(constraint.verifier or "")
    if mean is None:
        return dict(state)
    violation = constraint.floor - mean
    if constraint.update == MULTIPLICATIVE_WEIGHTS:
        return {"multiplier": min(state["multiplier"] * math.exp(constraint.rate * violation), constraint.maximum)}
    moved = state["multiplier"] + constraint.rate * violation
    return {"multiplier": min(max(moved, 0.0), constraint.maximum)}
