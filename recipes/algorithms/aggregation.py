"""How token losses become one: a weight for each response token.

``lengths`` counts the response tokens of all sequences of the update, on all ranks, so neither the micro-batch split
nor the number of ranks changes an update: the weighted losses are summed over both.
"""


def token_mean(lengths: list[int]) -> list[list[float]]:
    """The mean over all tokens (DAPO, Yu et al. 2025, eq. 8): a long response counts more."""
    total = sum(lengths)
    return [[1.0 / total] * n for n in lengths]


def sequence_mean_token_mean(lengths: list[int]) -> list[list[float]]:
    """The mean over sequences of their token means (GRPO, and SafeWork-R1's): every response counts alike."""
    return [[1.0 / (len(lengths) * n)] * n for n in lengths]


def sequence_sum(lengths: list[int], *, token_divisor: float) -> list[list[float]]:
    """The mean over sequences of their token sums, divided by a constant (Dr. GRPO, Liu et al. 2025, section 3.2).

    ``token_divisor``: the longest response allowed, as in the paper; it scales the loss alone.
    """
    return [[1.0 / (len(lengths) * token_divisor)] * n for n in lengths]


# Of supervised stages, by name; those of RL, which may take settings, are in ``parts.PARTS``.
AGGREGATIONS = {function.__name__: function for function in (token_mean, sequence_mean_token_mean)}
