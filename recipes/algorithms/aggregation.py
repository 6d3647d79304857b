"""How token losses become one: the weight of each response token.

An aggregation gets the number of trained tokens of each sequence of the update, on all ranks, and gives the weight that
every trained token of that sequence has. So neither the micro-batch split nor the number of ranks changes an update:
the weighted losses are summed over both.
"""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_ext.batch import Array, TokenBatch

# Trained tokens of each sequence [S] → the weight of each of its tokens [S].
Aggregation = Callable[[Sequence[int]], Sequence[float]]


def token_mean(lengths: Sequence[int]) -> list[float]:
    """The mean over all tokens (DAPO, Yu et al. 2025, eq. 8): a long response counts more."""
    weight = 1.0 / sum(lengths)
    return [weight] * len(lengths)


def sequence_mean_token_mean(lengths: Sequence[int]) -> list[float]:
    """The mean over sequences of their token means (GRPO, and SafeWork-R1's): every response counts alike."""
    return [1.0 / (len(lengths) * length) for length in lengths]


def sequence_sum(lengths: Sequence[int], *, token_divisor: float) -> list[float]:
    """The mean over sequences of their token sums, divided by a constant (Dr. GRPO, Liu et al. 2025, section 3.2).

    ``token_divisor``: the longest response allowed, as in the paper; it scales the loss alone.
    """
    return [1.0 / (len(lengths) * token_divisor)] * len(lengths)


def token_weights(aggregation: Aggregation, batch: TokenBatch) -> Array:
    """float64 [S]: the weight of each trained token's loss in an update on ``batch``, 0 for a response without any.
    Tokens that the loss mask leaves out count as if they were not there."""
    trained = np.flatnonzero(batch.trained_lengths)
    weights = np.zeros(len(batch))
    if len(trained):
        weights[trained] = aggregation(batch.trained_lengths[trained].tolist())
    return weights


# The aggregations of supervised stages, by name. Those of RL, which may take settings, are in ``registry.REGISTRY``.
AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
}
