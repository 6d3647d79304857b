"""The token weights: closed forms, and an update that neither order, split nor ranks change."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.algorithms.aggregation import sequence_mean_token_mean, sequence_sum, token_mean
from tests.recipes.gradients import draws

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=20)


@given(LENGTHS)
@settings(max_examples=50, deadline=None)
def test_the_weights_of_the_means_sum_to_one(lengths: list[int]) -> None:
    for aggregation in (token_mean, sequence_mean_token_mean):
        weights = aggregation(lengths)
        assert len(weights) == len(lengths)
        assert np.dot(weights, lengths) == pytest.approx(1)
    of_sequences = np.multiply(sequence_mean_token_mean(lengths), lengths)
    assert of_sequences.tolist() == pytest.approx([1 / len(lengths)] * len(lengths))
    assert len(set(token_mean(lengths))) == 1


@given(LENGTHS)
@settings(max_examples=50, deadline=None)
def test_the_weighted_loss_is_what_the_name_says(lengths: list[int]) -> None:
    losses = [draws(n, seed) for seed, n in enumerate(lengths)]

    def total(weights: Sequence[float]) -> float:
        return sum((weight * of_sequence).sum().item() for weight, of_sequence in zip(weights, losses, strict=True))

    assert total(token_mean(lengths)) == pytest.approx(torch.cat(losses).mean().item())
    means = torch.stack([of_sequence.mean() for of_sequence in losses])
    assert total(sequence_mean_token_mean(lengths)) == pytest.approx(means.mean().item())
    sums = torch.stack([of_sequence.sum() for of_sequence in losses])
    assert total(sequence_sum(lengths, token_divisor=32)) == pytest.approx(sums.mean().item() / 32)


@given(st.integers(1, 50), st.integers(1, 20))
@settings(max_examples=20, deadline=None)
def test_equal_lengths_make_all_three_one(length: int, count: int) -> None:
    lengths = [length] * count
    assert sequence_mean_token_mean(lengths) == pytest.approx(token_mean(lengths))
    assert sequence_sum(lengths, token_divisor=length) == pytest.approx(token_mean(lengths))


@given(LENGTHS, st.randoms())
@settings(max_examples=20, deadline=None)
def test_a_sequence_s_weights_go_with_it_in_any_order(lengths: list[int], random: object) -> None:
    order = list(range(len(lengths)))
    random.shuffle(order)  # type: ignore[attr-defined]
    for aggregation in (token_mean, sequence_mean_token_mean, lambda x: sequence_sum(x, token_divisor=7)):
        straight = aggregation(lengths)
        assert aggregation([lengths[i] for i in order]) == [straight[i] for i in order]
