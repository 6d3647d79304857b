"""Confidence intervals for evaluation scores in [0, 1].

The intervals are in closed form, so the same scores always give the same interval. The unit is the prompt: several
samples of one prompt are not independent, so they are averaged first. The intervals of a mean score and of a paired
difference add a few pseudo-prompts. Without them the interval would have no width if every answer is right, or if no
answer changed.
"""

from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray


class Interval(TypedDict):
    """`mean` over prompts, its confidence `interval` [low, high] and `n`, the number of prompts."""

    mean: float
    interval: list[float]
    n: int


def mean_interval(scores: ArrayLike, prompts: Sequence[Hashable] | None = None, confidence: float = 0.95) -> Interval:
    """Mean score over prompts with the Agresti-Coull interval, extended to several samples per prompt.

    Let m_g be the mean score of prompt g, G the number of prompts and z the normal quantile. z^2 / 2 pseudo-prompts
    with score 0 and as many with score 1 are added. The interval is the normal one of the enlarged set, clipped to
    [0, 1]: p = (sum m_g + z^2 / 2) / (G + z^2) and p +- z * sqrt(v / (G + z^2)), with v the enlarged set's variance.

    For one 0/1 score per prompt this is exactly Agresti and Coull, "Approximate is better than 'exact' for interval
    estimation of binomial proportions", The American Statistician 52 (1998) 119-126. Averaging within the prompt first
    is our choice. The interval always contains the observed mean.

    Args:
        scores: [number of samples], each in [0, 1].
        prompts: the prompt of each sample, [number of samples]; None means one sample per prompt.
        confidence: the interval's nominal coverage, in (0, 1).

    Raises:
        ValueError: no scores, a score outside [0, 1] or not finite, lengths that differ, or an impossible confidence.
    """
    means = _prompt_means(_unit_scores("scores", scores), prompts)
    z = _normal_quantile(confidence)
    pseudo = z**2
    size = len(means) + pseudo
    centre = float(means.sum() + pseudo / 2) / size
    squares = np.square(means - centre).sum()
    pseudo_squares = pseudo / 2 * (centre**2 + (1 - centre) ** 2)
    variance = float(squares + pseudo_squares) / size
    half = z * (variance / size) ** 0.5
    return {
        "mean": float(means.mean()),
        "interval": [max(0.0, centre - half), min(1.0, centre + half)],
        "n": len(means),
    }


def normal_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Mean of unbounded values such as lengths, [number of prompts], with the normal interval mean ± z s / sqrt(n).

    Raises:
        ValueError: fewer than two values, or an impossible confidence.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) < 2:
        raise ValueError(f"values have shape {array.shape}: pass a flat list of at least two")
    mean = float(array.mean())
    deviation = float(array.std(ddof=1))
    half = _normal_quantile(confidence) * deviation / len(array) ** 0.5
    return {"mean": mean, "interval": [mean - half, mean + half], "n": len(array)}


def paired_difference(
    before: ArrayLike, after: ArrayLike, prompts: Sequence[Hashable] | None = None, confidence: float = 0.95
) -> Interval:
    """Mean of (after - before) over the same prompts, with the Agresti-Min interval for matched pairs.

    Two pseudo-prompts are added to the differences of the prompts' means: half a one at +1, half a one at -1 and one at
    0. The interval is the normal one of the enlarged set, clipped to [-1, 1].

    For one 0/1 score per prompt this is exactly Agresti and Min, "Simple improved confidence intervals for comparing
    matched proportions", Statistics in Medicine 24 (2005) 729-740 (one half added to each cell of the two-by-two
    table). Averaging within the prompt first is our choice.

    Args:
        before: [number of samples], each in [0, 1].
        after: [number of samples]; entry i answers the same prompt as entry i of `before`.
        prompts: the prompt of each sample, [number of samples]; None means one sample per prompt.
        confidence: the interval's nominal coverage, in (0, 1).

    Raises:
        ValueError: as `mean_interval`, and when `before` and `after` differ in length.
    """
    first = _unit_scores("before", before)
    second = _unit_scores("after", after)
    if len(first) != len(second):
        raise ValueError(
            f"before has {len(first)} scores and after has {len(second)}: a paired difference needs the same prompts "
            "in the same order in both"
        )
    differences = _prompt_means(second, prompts) - _prompt_means(first, prompts)
    z = _normal_quantile(confidence)
    size = len(differences) + 2
    centre = float(differences.sum()) / size
    variance = float(np.square(differences).sum() + 1) / size - centre**2
    half = z * (variance / size) ** 0.5
    return {
        "mean": float(differences.mean()),
        "interval": [max(-1.0, centre - half), min(1.0, centre + half)],
        "n": len(differences),
    }


def _unit_scores(name: str, scores: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} has shape {values.shape}: pass a flat list of at least one score")
    outside = values[~((values >= 0) & (values <= 1))]
    if len(outside):
        raise ValueError(f"{name} holds {outside[0]}: scores must lie in [0, 1]; rescale the verifier's output first")
    return values


def _prompt_means(values: NDArray[np.float64], prompts: Sequence[Hashable] | None) -> NDArray[np.float64]:
    if prompts is None:
        return values
    if len(prompts) != len(values):
        raise ValueError(f"prompts has {len(prompts)} entries for {len(values)} scores: pass one prompt id per score")
    position = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    indices = np.array([position[prompt] for prompt in prompts])
    return np.bincount(indices, weights=values) / np.bincount(indices)


def _normal_quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}: it must lie strictly between 0 and 1, for example 0.95")
    return NormalDist().inv_cdf((1 + confidence) / 2)
