"""Aggregation of token losses to one loss: the weight of each response token.

An aggregation gets the number of trained tokens of each sequence of the update, over all ranks. It returns for each
sequence the weight of each of its trained tokens. The weighted losses are summed over micro-batches and ranks, so
neither the micro-batch split nor the number of ranks changes an update.
"""

from collections.abc import Callable, Sequence

import numpy as np

from megatron_ext.batch import Array, TokenBatch

# Trained tokens of each sequence [S] → the weight of each of its tokens [S].
Aggregation = Callable[[Sequence[int]], Sequence[float]]


def token_mean(lengths: Sequence[int]) -> list[float]:
    """The mean over all tokens (DAPO, Yu et al. 2025, eq. 8). A longer response has more weight."""
    weight = 1.0 / sum(lengths)
    return [weight] * len(lengths)


def sequence_mean_token_mean(lengths: Sequence[int]) -> list[float]:
    """The mean over sequences of their token means (GRPO, and SafeWork-R1's). Every response has the same weight."""
    return [1.0 / (len(lengths) * length) for length in lengths]


def sequence_sum(lengths: Sequence[int], *, token_divisor: float) -> list[float]:
    """The mean over sequences of their token sums, divided by a constant (Dr. GRPO, Liu et al. 2025, section 3.2).

    ``token_divisor`` is the longest response allowed, as in the paper. It only scales the loss.
    """
    return [1.0 / (len(lengths) * token_divisor)] * len(lengths)


def token_weights(aggregation: Aggregation, batch: TokenBatch) -> Array:
    """float64 [S]: the weight of each trained token's loss in an update on ``batch``, by response.

    Tokens that the loss mask leaves out do not count. A response without trained tokens has the weight 0.
    """
    trained = np.flatnonzero(batch.trained_lengths)
    weights = np.zeros(len(batch))
    if len(trained):
        weights[trained] = aggregation(batch.trained_lengths[trained].tolist())
    return weights


# The aggregations of supervised stages, by name. Those of RL are in ``registry.REGISTRY`` and may take settings.
AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "sequence_mean_token_mean": sequence_mean_token_mean,
}
