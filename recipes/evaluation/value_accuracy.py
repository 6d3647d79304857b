"""The accuracy of a value model: its values against the final scores of the same responses, with intervals.

Intervals are from a bootstrap. Every measure takes a weight for each response, so that all resamples are computed at
once. Several responses to a prompt are not independent, so prompts are resampled with all their responses (the cluster
bootstrap; Davison and Hinkley, Bootstrap Methods and their Application, 1997, section 3.8). The resamples have a fixed
seed, so the same values and scores always give the same intervals.
"""

from collections.abc import Callable, Hashable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recipes.evaluation.statistics import mean_interval

RESAMPLES = 1000
BINS = 10  # for the calibration error
POSITIVE = 0.5  # for the AUC, a response is good if its score is at least this

type Array = NDArray[np.float64]
# (values [N], scores [N], weights [resamples, N]) → the measure of each resample, NaN where it is undefined
type Measure = Callable[[Array, Array, Array], Array]


def correlation(values: Array, scores: Array, weights: Array) -> Array:
    """Pearson's correlation. Undefined if all values or all scores are equal."""
    total = weights.sum(axis=1)
    # Centre first, since differences of large sums lose precision.
    values = values - values.mean()
    scores = scores - scores.mean()

    def covariance(first: Array, second: Array) -> Array:
        return weights @ (first * second) / total - (weights @ first) * (weights @ second) / total**2

    variances = covariance(values, values) * covariance(scores, scores)
    is_defined = variances > 1e-18
    return np.where(is_defined, covariance(values, scores) / np.sqrt(np.where(is_defined, variances, 1.0)), np.nan)


def auc(values: Array, scores: Array, weights: Array) -> Array:
    """The probability that a good response has a higher value than a bad one. Equal values count half.

    A response is good if its score is at least 0.5. Undefined without responses of both kinds.
    """
    order = np.argsort(values, kind="stable")
    starts = np.unique(values[order], return_index=True)[1]  # where each run of equal values starts
    is_good = scores[order] >= POSITIVE
    good = np.add.reduceat(weights[:, order] * is_good, starts, axis=1)
    bad = np.add.reduceat(weights[:, order] * ~is_good, starts, axis=1)
    below = np.cumsum(bad, axis=1) - bad / 2
    pairs = good.sum(axis=1) * bad.sum(axis=1)
    return np.where(pairs > 0, (good * below).sum(axis=1) / np.where(pairs > 0, pairs, 1.0), np.nan)


def calibration_error(values: Array, scores: Array, weights: Array) -> Array:
    """The expected calibration error (Naeini, Cooper and Hauskrecht, AAAI 2015) over ten bins of equal width.

    It is Σ_bins share of the responses · |mean score − mean value|. Its bootstrap intervals are slightly too high,
    because noise increases absolute differences.
    """
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    in_bin = np.eye(BINS)[bins]
    return np.abs((weights * (scores - values)) @ in_bin).sum(axis=1) / weights.sum(axis=1)


MEASURES: dict[str, Measure] = {"correlation": correlation, "auc": auc, "ece": calibration_error}


def accuracy(values: ArrayLike, scores: ArrayLike, prompts: Sequence[Hashable]) -> dict[str, Any]:
    """Measure the values of responses [N] against their final scores [N], both in [0, 1].

    Returns:
        - ``n`` and ``prompts``: the number of responses and of prompts;
        - ``value`` and ``score``: their means;
        - each of ``MEASURES``: {mean, interval}, or None if it is undefined. The interval is the middle 95 % of the
          resamples in which the measure is defined;
        - ``ranked``: see :func:`ranked`.
    """
    value_array = np.asarray(values, np.float64)
    score_array = np.asarray(scores, np.float64)
    resamples = resampled_weights(prompts)
    once = np.ones((1, len(value_array)))
    result: dict[str, Any] = {
        "n": len(value_array),
        "prompts": len(set(prompts)),
        "value": float(value_array.mean()),
        "score": float(score_array.mean()),
    }
    for name, measure in MEASURES.items():
        (mean,) = measure(value_array, score_array, once).tolist()
        result[name] = None
        if np.isfinite(mean):
            of_resamples = measure(value_array, score_array, resamples)
            low, high = np.nanquantile(of_resamples, [0.025, 0.975]).tolist()
            result[name] = {"mean": mean, "interval": [low, high]}
    result["ranked"] = ranked(value_array, score_array, prompts)
    return result


def resampled_weights(prompts: Sequence[Hashable]) -> Array:
    """[RESAMPLES, N]: how often each response is in each resample, which is how often its prompt was drawn."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    prompt_of = np.array([place[prompt] for prompt in prompts])
    drawn = np.random.default_rng(0).multinomial(len(place), [1 / len(place)] * len(place), RESAMPLES)
    return drawn[:, prompt_of].astype(np.float64)


def ranked(values: Array, scores: Array, prompts: Sequence[Hashable]) -> Any:
    """The share of pairs of responses whose values are in the right order, with its interval. Equal values count half.

    A pair is two responses to one prompt with different scores. The interval is that of ``mean_interval``. None if
    there is no such pair.
    """
    of_prompt: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        of_prompt.setdefault(prompt, []).append(i)
    is_right = []
    prompt_of_pair = []
    for prompt, responses in of_prompt.items():
        for first, second in combinations(responses, 2):
            if scores[first] != scores[second]:
                agreement = np.sign(values[first] - values[second]) * np.sign(scores[first] - scores[second])
                is_right.append(0.5 + 0.5 * float(agreement))
                prompt_of_pair.append(prompt)
    return mean_interval(is_right, prompt_of_pair) if is_right else None
