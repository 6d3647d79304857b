"""Advantages against closed forms and an independent computation, and what they may not depend on."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recipes.algorithms import advantages, shaping, value_losses
from recipes.algorithms.advantages import AdvantageInputs
from tests.recipes.gradients import draws, finite_differences, gradient, numbers

NAN = math.nan
REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=8).filter(lambda r: len(set(r)) > 1)

ALL: dict[str, Callable[[AdvantageInputs], Tensor]] = {
    "grpo": lambda o: advantages.grpo(o, advantage_epsilon=1e-9),
    "dr_grpo": advantages.dr_grpo,
    "clip_filter": lambda o: advantages.clip_filter(o, clip_filter_cap=3.0),
    "rloo": advantages.rloo,
    "cale": lambda o: advantages.cale(o, cale_alpha=0.9, cale_mu=0.5),
    "reinforce_plus_plus": lambda o: advantages.reinforce_plus_plus(o, discount=0.9),
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
    "gae": lambda o: advantages.gae(o, discount=0.9, gae_lambda=0.8),
    "gae_whitened": lambda o: advantages.gae_whitened(o, discount=0.9, gae_lambda=0.8),
}
BY_NAME = pytest.mark.parametrize("name", ALL)


def outcomes(rewards: list[list[float]], lengths: list[list[int]] | None = None, **more: Tensor) -> AdvantageInputs:
    """Without rewards of tokens and without a critic, unless given; lengths 1, 2, 3, … within each group."""
    given = torch.tensor(rewards, dtype=torch.float64)
    counts = torch.tensor(lengths) if lengths else torch.arange(1, given.shape[1] + 1).expand(given.shape).clone()
    zeros = torch.zeros(int(counts.sum()), dtype=torch.float64)
    return AdvantageInputs(given, counts, more.get("token_rewards", zeros), more.get("values", zeros))


def tokens(name: str, given: AdvantageInputs) -> list[list[float]]:
    return split(advantages.broadcast_to_tokens(ALL[name](given), given.lengths), given)


def split(of_tokens: Tensor, given: AdvantageInputs) -> list[list[float]]:
    """[tokens] → those of each response."""
    return [part.tolist() for part in of_tokens.split(given.lengths.flatten().tolist())]


def random_outcomes() -> AdvantageInputs:
    """Six groups of four, lengths 1 to 9, with rewards and values of tokens, and a sample that was not judged."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 10, (6, 4), generator=generator)
    rewards = torch.randint(0, 3, (6, 4), generator=generator).double() / 2
    rewards[2, 1] = NAN
    n = int(lengths.sum())
    return AdvantageInputs(rewards, lengths, 0.1 * draws(n, 4), draws(n, 5))


# ---- group-relative ones


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "clip_filter", "rloo", "cale", "reinforce_plus_plus_baseline"])
def test_equal_rewards_give_exactly_zero(name: str) -> None:
    """Not nearly: a sample with an advantage of 0 is left out of the update, and a mean is rounded."""
    found = torch.tensor(tokens(name, outcomes([[0.1] * 3, [0.7] * 3], [[4] * 3] * 2)))
    assert torch.equal(found, torch.zeros_like(found))


def test_equal_returns_in_the_whole_rollout_are_whitened_to_zero() -> None:
    found = advantages.reinforce_plus_plus(outcomes([[0.1] * 3] * 2), discount=1.0)
    assert torch.equal(found, torch.zeros_like(found))


@given(REWARDS)
@settings(max_examples=50, deadline=None)
def test_grpo_has_mean_zero_and_deviation_one_and_is_dr_grpo_over_the_deviation(rewards: list[float]) -> None:
    given = outcomes([rewards, rewards[::-1]])
    found = advantages.grpo(given, advantage_epsilon=1e-9)
    assert found.mean(1).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert found.numpy().std(axis=1, ddof=1).tolist() == pytest.approx([1, 1], rel=1e-7)
    scaled = advantages.dr_grpo(given) / given.rewards.numpy().std(axis=1, ddof=1, keepdims=True)
    assert found.tolist()[0] == pytest.approx(scaled.tolist()[0], rel=1e-7)


@given(REWARDS)
@settings(max_examples=50, deadline=None)
def test_rloo_is_the_reward_minus_the_mean_of_the_others_and_dr_grpo_scaled(rewards: list[float]) -> None:
    n = len(rewards)
    found = advantages.rloo(outcomes([rewards]))[0]
    others = [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    assert found.tolist() == pytest.approx(others, abs=1e-12)
    assert found.tolist() == pytest.approx((advantages.dr_grpo(outcomes([rewards]))[0] * n / (n - 1)).tolist())


def test_a_known_group() -> None:
    """Rewards 1, 0, 0, 0: mean 1/4, squares (9 + 3)/16 = 3/4, deviation over n − 1 = 3: 1/2."""
    given = outcomes([[1.0, 0, 0, 0]])
    assert advantages.grpo(given, advantage_epsilon=0.0)[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert advantages.dr_grpo(given)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert advantages.rloo(given)[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_clip_filter_makes_up_for_the_groups_without_a_gradient_up_to_the_cap() -> None:
    """One useful group of four: weight 4, capped to 3; two of four: weight 2."""
    useful, equal = [1.0, 0.0], [1.0, 1.0]
    one = advantages.clip_filter(outcomes([useful, equal, equal, equal]), clip_filter_cap=3.0)
    assert one.tolist() == [[1.5, -1.5]] + [[0, 0]] * 3
    two = advantages.clip_filter(outcomes([useful, equal, useful, equal]), clip_filter_cap=3.0)
    assert two.tolist() == [[1, -1], [0, 0]] * 2
    none = advantages.clip_filter(outcomes([equal, equal]), clip_filter_cap=3.0)
    assert none.tolist() == [[0, 0]] * 2


# ---- length-conditioned


@given(REWARDS.filter(lambda r: len(r) % 2 == 0))
@settings(max_examples=50, deadline=None)
def test_cale_with_alpha_one_and_equal_weights_is_dr_grpo(rewards: list[float]) -> None:
    given = outcomes([rewards])
    found = advantages.cale(given, cale_alpha=1.0, cale_mu=0.5)
    assert found[0].tolist() == pytest.approx(advantages.dr_grpo(given)[0].tolist(), abs=1e-12)


def test_cale_of_a_known_group() -> None:
    """Lengths 4, 1, 3, 2 with rewards 1, 1, 0, 1. Short: the answers of 1 and 2 tokens, mean 1; long: mean 1/2.

    Inter, α = 0.9: long 0.9 R − 1 → −0.1, −1; short R − 0.9/2 → 0.55. Intra: long ±0.5, short 0. μ = 1/4.
    """
    given = outcomes([[1.0, 1.0, 0.0, 1.0]], [[4, 1, 3, 2]])
    found = advantages.cale(given, cale_alpha=0.9, cale_mu=0.25)[0].tolist()
    assert found == pytest.approx([0.25 * -0.1 + 0.75 * 0.5, 0.25 * 0.55, 0.25 * -1 + 0.75 * -0.5, 0.25 * 0.55])


def test_cale_prefers_the_shorter_of_two_right_answers_and_blames_no_length_where_all_are_wrong() -> None:
    right = advantages.cale(outcomes([[1.0] * 4]), cale_alpha=0.9, cale_mu=0.5)[0]
    assert right.tolist() == pytest.approx([0.05, 0.05, -0.05, -0.05])
    wrong = advantages.cale(outcomes([[0.0] * 4]), cale_alpha=0.9, cale_mu=0.5)
    assert torch.equal(wrong, torch.zeros_like(wrong))


def test_cale_has_no_halves_where_all_lengths_are_equal_and_an_odd_group_has_a_larger_shorter_half() -> None:
    truncated = outcomes([[1.0, 1.0, 0.0, 0.0]], [[8] * 4])
    assert advantages.cale(truncated, cale_alpha=0.9, cale_mu=0.5).tolist() == [[0.5, 0.5, -0.5, -0.5]]
    odd = advantages.cale(outcomes([[1.0, 1.0, 1.0]]), cale_alpha=0.9, cale_mu=1.0)[0]
    assert odd.tolist() == pytest.approx([0.1, 0.1, -0.1])


# ---- per token


def test_reinforce_plus_plus_is_the_whitened_discounted_return() -> None:
    """Lengths 2 and 1, rewards 1 and 0, γ = 1/2, a token reward of −0.2: returns 0.3, 1 and 0."""
    given = outcomes([[1.0, 0.0]], [[2, 1]], token_rewards=numbers(-0.2, 0.0, 0.0))
    returns = numbers(0.3, 1.0, 0.0)
    expected = (returns - 1.3 / 3) / returns.numpy().std(ddof=1)
    assert advantages.reinforce_plus_plus(given, discount=0.5).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae_whitened"])
def test_whitened_ones_have_mean_zero_and_deviation_one_over_the_judged_tokens(name: str) -> None:
    given = random_outcomes()
    judged = given.judged.flatten().repeat_interleave(given.lengths.flatten())
    found = ALL[name](given)[judged]
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.numpy().std(ddof=1) == pytest.approx(1)


def test_gae_is_the_sum_that_defines_it() -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l}, sequence by sequence, against the plain double sum."""
    given = random_outcomes()
    found = split(advantages.gae(given, discount=0.9, gae_lambda=0.8), given)
    assert given.values is not None
    parts = zip(
        given.rewards.flatten().tolist(),
        given.token_rewards.split(given.lengths.flatten().tolist()),
        given.values.split(given.lengths.flatten().tolist()),
        found,
        strict=True,
    )
    for reward, token_rewards, values, row in parts:
        n = len(row)
        if math.isnan(reward):
            assert row == [0] * n
            continue
        r = [*token_rewards.tolist()[:-1], token_rewards.tolist()[-1] + reward]
        v = [*values.tolist(), 0.0]
        errors = [r[t] + 0.9 * v[t + 1] - v[t] for t in range(n)]
        assert row == pytest.approx([sum(0.72 ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)])


def test_gae_with_lambda_one_is_the_return_minus_the_value_and_with_zero_one_step_s_error() -> None:
    given = outcomes([[1.0, 0.5]], [[3, 2]], values=numbers(0.1, 0.2, 0.3, 0.4, 0.5))
    assert advantages.gae(given, discount=1.0, gae_lambda=1.0).tolist() == pytest.approx([0.9, 0.8, 0.7, 0.1, 0.0])
    assert advantages.gae(given, discount=1.0, gae_lambda=0.0).tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1, 0.0])


def test_gae_without_values_is_refused() -> None:
    given = outcomes([[1.0, 0.0]])
    without = AdvantageInputs(given.rewards, given.lengths, given.token_rewards)
    with pytest.raises(ValueError, match=r"algorithm\.advantage=gae: needs a critic's values"):
        advantages.gae(without, discount=1.0, gae_lambda=1.0)


# ---- for all


@BY_NAME
def test_one_dimension_is_refused_and_never_zeros(name: str) -> None:
    """A peer's estimator returns all zeros for rewards in one dimension, and trains on nothing."""
    with pytest.raises(ValueError, match=r"rewards \[4\] and lengths \[4\]: both must be \[prompts, samples\]"):
        ALL[name](AdvantageInputs(numbers(1, 0, 1, 0), torch.tensor([1, 1, 1, 1]), torch.zeros(4)))


def test_token_rewards_and_values_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match=r"token_rewards \[2\]: the lengths add up to \[3\]"):
        outcomes([[1.0, 0.0]], token_rewards=numbers(0, 0))
    with pytest.raises(ValueError, match=r"values \[4\]: the lengths add up to \[3\]"):
        outcomes([[1.0, 0.0]], values=numbers(0, 0, 0, 0))


@BY_NAME
def test_a_sample_without_a_reward_counts_nowhere(name: str) -> None:
    """It gets 0, and the others get what they would without it."""
    full, without = [[0.0, 1.0, 0.5, NAN], [1.0, 0.0, 0.0, NAN]], [[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]]
    found, expected = tokens(name, outcomes(full)), tokens(name, outcomes(without))
    assert [row for i, row in enumerate(found) if i % 4 != 3] == [pytest.approx(row) for row in expected]
    assert found[3] == found[7] == [0, 0, 0, 0]


@BY_NAME
def test_nothing_judged_gives_zeros_and_no_nan(name: str) -> None:
    assert tokens(name, outcomes([[NAN, NAN]])) == [[0], [0, 0]]


@BY_NAME
def test_a_group_of_which_one_was_judged_gives_finite_numbers(name: str) -> None:
    found = [value for row in tokens(name, outcomes([[1.0, NAN], [0.0, 1.0]])) for value in row]
    assert all(map(math.isfinite, found))


@BY_NAME
def test_the_order_of_prompts_and_samples_does_not_matter(name: str) -> None:
    """Prompts and samples are shuffled; each sequence keeps its tokens' advantages. Lengths in a group differ."""
    generator = torch.Generator().manual_seed(9)
    lengths = torch.stack([torch.randperm(9, generator=generator)[:4] + 1 for _ in range(6)])
    rewards = torch.randint(0, 3, (6, 4), generator=generator).double() / 2
    n, count = int(lengths.sum()), lengths.flatten().tolist()
    token_rewards, values = 0.1 * draws(n, 4), draws(n, 5)
    straight = tokens(name, AdvantageInputs(rewards, lengths, token_rewards, values))
    places = torch.arange(24).view(6, 4)[torch.randperm(6, generator=generator)]
    places = torch.stack([row[torch.randperm(4, generator=generator)] for row in places])
    order = places.flatten().tolist()

    def moved(packed: Tensor) -> Tensor:
        return torch.cat([packed.split(count)[i] for i in order])

    shuffled = AdvantageInputs(
        rewards.flatten()[places], lengths.flatten()[places], moved(token_rewards), moved(values)
    )
    assert tokens(name, shuffled) == [pytest.approx(straight[i], abs=1e-12) for i in order]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "clip_filter", "cale"])
def test_a_reward_of_tokens_counts_as_part_of_the_sample_s(name: str) -> None:
    """KL in the reward: −0.5 in all on the second sample is its reward lowered by 0.5."""
    with_tokens = outcomes([[1.0, 1.0]], [[1, 2]], token_rewards=numbers(0, -0.2, -0.3))
    assert ALL[name](with_tokens)[0].tolist() == pytest.approx(ALL[name](outcomes([[1.0, 0.5]], [[1, 2]]))[0].tolist())


@pytest.mark.parametrize(("name", "shift"), [("grpo", 5.0), ("dr_grpo", 5.0), ("rloo", 5.0), ("clip_filter", 5.0)])
def test_a_constant_in_all_rewards_changes_nothing(name: str, shift: float) -> None:
    given = [[1.0, 0.0, 0.5, 0.5], [0.25, 1.0, 0.0, 0.0]]
    moved = [[r + shift for r in row] for row in given]
    assert ALL[name](outcomes(moved)).flatten().tolist() == pytest.approx(ALL[name](outcomes(given)).flatten().tolist())


# ---- what the loss mask leaves out


def masked_rollout() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rewards and lengths of six groups of four, and of their tokens the loss mask, rewards and values. Forced tokens
    begin, end and interrupt responses; a sample has no reward and so no trained token, another is forced as a whole."""
    given = random_outcomes()
    assert given.values is not None
    n = len(given.values)
    mask = draws(n, 6) > -0.5
    of_sample = mask.split(given.lengths.flatten().tolist())
    of_sample[9].fill_(False)  # without a reward
    of_sample[14].fill_(False)
    return given.rewards, given.lengths, mask, given.token_rewards, given.values


@BY_NAME
def test_masked_tokens_are_as_if_they_had_never_been(name: str) -> None:
    """Exactly: what the trained tokens get is what they get in the same batch with the others cut out by hand; the
    others get 0, whatever their rewards and values are."""
    rewards, lengths, mask, token_rewards, values = masked_rollout()
    inputs = advantages.trained_inputs(rewards, lengths, mask, token_rewards, values)
    found = advantages.at_response_tokens(advantages.broadcast_to_tokens(ALL[name](inputs), inputs.lengths), mask)

    places = [i for i, trained in enumerate(mask.tolist()) if trained]
    counts = [sum(part) for part in split(mask, AdvantageInputs(rewards, lengths, token_rewards))]
    cut = AdvantageInputs(rewards, torch.tensor(counts).view(6, 4), token_rewards[places], values[places])
    expected = advantages.broadcast_to_tokens(ALL[name](cut), cut.lengths)
    assert found.dtype == torch.float64
    assert torch.equal(found[places], expected) and (expected != 0).any()
    assert not found[~mask].any()

    noise = mask.logical_not() * 1e6
    other = advantages.trained_inputs(rewards, lengths, mask, token_rewards + noise, values - noise)
    again = advantages.at_response_tokens(advantages.broadcast_to_tokens(ALL[name](other), other.lengths), mask)
    assert torch.equal(again, found)


def test_gae_goes_from_one_trained_token_to_the_next() -> None:
    """Five tokens, the second and the fifth an environment's: against the sum over the three others, by hand. The
    reward is at the last trained token."""
    mask = torch.tensor([True, False, True, True, False])
    token_rewards, values = numbers(-0.1, 9, -0.2, -0.3, 9), numbers(0.5, 9, 0.25, -0.5, 9)
    inputs = advantages.trained_inputs(numbers(1.0).view(1, 1), torch.tensor([[5]]), mask, token_rewards, values)
    found = advantages.at_response_tokens(advantages.gae(inputs, discount=0.9, gae_lambda=0.8), mask)
    errors = np.array([-0.1 + 0.9 * 0.25 - 0.5, -0.2 + 0.9 * -0.5 - 0.25, 1 - 0.3 + 0.5])
    decay = 0.9 * 0.8
    last, second = errors[2], errors[1] + decay * errors[2]
    assert found.tolist() == pytest.approx([errors[0] + decay * second, 0, second, last, 0], rel=1e-12)


def test_whitening_divides_by_the_deviation_of_the_trained_tokens_alone() -> None:
    rewards, lengths, mask, token_rewards, values = masked_rollout()
    inputs = advantages.trained_inputs(rewards, lengths, mask, token_rewards, values)
    plain = advantages.gae(inputs, discount=0.9, gae_lambda=0.8).numpy()
    found = advantages.gae_whitened(inputs, discount=0.9, gae_lambda=0.8)
    expected = (plain - plain.mean()) / plain.std(ddof=1)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# ---- overlong answers and groups that teach nothing


def test_the_soft_overlong_punishment_is_dapo_s() -> None:
    """The paper's setting: 20,480 tokens, of which the last 4,096 are the buffer."""
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    found = shaping.overlong_penalty(lengths, longest=20480, overlong_fraction=0.2)
    assert found.tolist() == [0, 0, -0.5, -1, -1]
    off = shaping.overlong_penalty(lengths, longest=20480, overlong_fraction=0.0)
    assert torch.equal(off, torch.zeros(5, dtype=torch.float64))


def test_groups_of_equal_rewards_are_replaced_in_order_and_fill_up_what_is_missing() -> None:
    rewards = torch.tensor([[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [0.0, 1.0], [NAN, NAN], [1.0, 0.5]])
    assert shaping.has_reward_variance(rewards).tolist() == [False, True, False, True, False, True]
    assert shaping.select_groups(rewards, 2) == [1, 3]
    assert shaping.select_groups(rewards, 3) == [1, 3, 5]
    assert shaping.select_groups(rewards, 5) == [0, 1, 2, 3, 5]


# ---- a critic's loss


def test_the_clipped_value_loss_has_its_closed_form_and_gradient() -> None:
    """ε = 0.2, old 0, return 1: 0.1 is free, 0.5 is held at 0.2, −0.5 is further off than its clipped −0.2."""
    old, returns = numbers(0, 0, 0, 0), numbers(1, 1, 1, -1)
    values = numbers(0.1, 0.5, -0.5, 0.5)

    def total(x: Tensor) -> Tensor:
        return value_losses.clipped(x, old, returns, value_clip=0.2).sum()

    found = value_losses.clipped(values, old, returns, value_clip=0.2)
    assert found.tolist() == pytest.approx([0.405, 0.32, 1.125, 1.125])
    assert gradient(total, values).tolist() == pytest.approx([-0.9, 0, -1.5, 1.5])
    assert gradient(total, values).tolist() == pytest.approx(finite_differences(total, values).tolist(), abs=1e-8)
