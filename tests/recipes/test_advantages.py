"""Advantages equal closed forms and an independent computation, and do not depend on order or on masked tokens."""

import math
from collections.abc import Callable
from functools import partial

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
# The rewards of one group, which are not all equal.
REWARDS = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=8).filter(lambda r: len(set(r)) > 1)

# Name → the advantage with its settings filled in.
ALL: dict[str, Callable[[AdvantageInputs], Tensor]] = {
    "grpo": partial(advantages.grpo, advantage_epsilon=1e-9),
    "dr_grpo": advantages.dr_grpo,
    "clip_filter": partial(advantages.clip_filter, clip_filter_cap=3.0),
    "rloo": advantages.rloo,
    "cale": partial(advantages.cale, cale_alpha=0.9, cale_mu=0.5),
    "reinforce_plus_plus": partial(advantages.reinforce_plus_plus, discount=0.9),
    "reinforce_plus_plus_baseline": advantages.reinforce_plus_plus_baseline,
    "gae": partial(advantages.gae, discount=0.9, gae_lambda=0.8),
    "gae_whitened": partial(advantages.gae_whitened, discount=0.9, gae_lambda=0.8),
}
BY_NAME = pytest.mark.parametrize("name", ALL)


def outcomes(
    rewards: list[list[float]],
    lengths: list[list[int]] | None = None,
    token_rewards: Tensor | None = None,
    values: Tensor | None = None,
) -> AdvantageInputs:
    """The inputs of an advantage, for rewards [prompts, samples].

    Unless they are given, the lengths are 1, 2, 3, … within each group, and rewards and values of tokens are 0.
    """
    sample_rewards = torch.tensor(rewards, dtype=torch.float64)
    if lengths is None:
        group_lengths = torch.arange(1, sample_rewards.shape[1] + 1)
        sample_lengths = group_lengths.expand(sample_rewards.shape).clone()
    else:
        sample_lengths = torch.tensor(lengths)
    zeros = torch.zeros(int(sample_lengths.sum()), dtype=torch.float64)
    return AdvantageInputs(
        sample_rewards,
        sample_lengths,
        zeros if token_rewards is None else token_rewards,
        zeros if values is None else values,
    )


def on_tokens(name: str, inputs: AdvantageInputs) -> Tensor:
    """The advantage of each token [tokens]."""
    of_name = ALL[name](inputs)
    return of_name if of_name.dim() == 1 else of_name.flatten().repeat_interleave(inputs.lengths.flatten())


def by_response(of_tokens: Tensor, lengths: Tensor) -> list[list[float]]:
    """[tokens] → the values of each response's tokens."""
    return [part.tolist() for part in of_tokens.split(lengths.flatten().tolist())]


def response_advantages(name: str, inputs: AdvantageInputs) -> list[list[float]]:
    """The advantages of each response's tokens."""
    return by_response(on_tokens(name, inputs), inputs.lengths)


def random_outcomes() -> AdvantageInputs:
    """Six groups of four samples with 1 to 9 tokens. Tokens have rewards and values; one sample was not judged."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 10, (6, 4), generator=generator)
    rewards = torch.randint(0, 3, (6, 4), generator=generator).double() / 2
    rewards[2, 1] = NAN
    num_tokens = int(lengths.sum())
    return AdvantageInputs(rewards, lengths, token_rewards=0.1 * draws(num_tokens, 4), values=draws(num_tokens, 5))


# ---- group-relative ones


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "clip_filter", "rloo", "cale", "reinforce_plus_plus_baseline"])
def test_equal_rewards_give_exactly_zero(name: str) -> None:
    """Exactly, though a mean is rounded: the update leaves out samples whose advantage is 0."""
    inputs = outcomes([[0.1] * 3, [0.7] * 3], lengths=[[4] * 3] * 2)
    token_advantages = on_tokens(name, inputs)
    assert torch.equal(token_advantages, torch.zeros_like(token_advantages))


def test_equal_returns_in_the_whole_rollout_are_whitened_to_zero() -> None:
    token_advantages = advantages.reinforce_plus_plus(outcomes([[0.1] * 3] * 2), discount=1.0)
    assert torch.equal(token_advantages, torch.zeros_like(token_advantages))


@given(REWARDS)
@settings(max_examples=50, deadline=None)
def test_grpo_has_mean_zero_and_deviation_one_and_is_dr_grpo_over_the_deviation(rewards: list[float]) -> None:
    inputs = outcomes([rewards, rewards[::-1]])
    grpo = advantages.grpo(inputs, advantage_epsilon=1e-9).numpy()
    assert grpo.mean(axis=1).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert grpo.std(axis=1, ddof=1).tolist() == pytest.approx([1, 1], rel=1e-7)
    deviations = inputs.rewards.numpy().std(axis=1, ddof=1, keepdims=True)
    scaled = advantages.dr_grpo(inputs).numpy() / deviations
    assert grpo[0].tolist() == pytest.approx(scaled[0].tolist(), rel=1e-7)


@given(REWARDS)
@settings(max_examples=50, deadline=None)
def test_rloo_is_the_reward_minus_the_mean_of_the_others_and_dr_grpo_scaled(rewards: list[float]) -> None:
    n = len(rewards)
    inputs = outcomes([rewards])
    rloo = advantages.rloo(inputs)[0].tolist()
    means_of_others = [(sum(rewards) - reward) / (n - 1) for reward in rewards]
    expected = [reward - mean for reward, mean in zip(rewards, means_of_others, strict=True)]
    assert rloo == pytest.approx(expected, abs=1e-12)
    scaled = advantages.dr_grpo(inputs)[0] * n / (n - 1)
    assert rloo == pytest.approx(scaled.tolist())


def test_rloo_counts_the_others_of_each_group_for_itself() -> None:
    """Three of the first group have a reward, two of the second."""
    inputs = outcomes([[1.0, 0.0, 0.5, math.nan], [1.0, 0.0, math.nan, math.nan]])
    assert advantages.rloo(inputs)[0].tolist() == pytest.approx([0.75, -0.75, 0, 0])
    assert advantages.rloo(inputs)[1].tolist() == pytest.approx([1, -1, 0, 0])


def test_a_known_group() -> None:
    """Rewards 1, 0, 0, 0: mean 1/4, squares (9 + 3)/16 = 3/4, deviation over n − 1 = 3: 1/2."""
    inputs = outcomes([[1.0, 0, 0, 0]])
    assert advantages.grpo(inputs, advantage_epsilon=0.0)[0].tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5])
    assert advantages.dr_grpo(inputs)[0].tolist() == [0.75, -0.25, -0.25, -0.25]
    assert advantages.rloo(inputs)[0].tolist() == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3])


def test_clip_filter_makes_up_for_the_groups_without_a_gradient_up_to_the_cap() -> None:
    """One useful group of four has the weight 4, which is capped to 3; two of four have the weight 2."""
    useful = [1.0, 0.0]
    equal = [1.0, 1.0]
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
    inputs = outcomes([rewards])
    cale = advantages.cale(inputs, cale_alpha=1.0, cale_mu=0.5)[0]
    dr_grpo = advantages.dr_grpo(inputs)[0]
    assert cale.tolist() == pytest.approx(dr_grpo.tolist(), abs=1e-12)


def test_cale_of_a_known_group() -> None:
    """Lengths 4, 1, 3, 2 with rewards 1, 1, 0, 1. The answers of 1 and 2 tokens are the short half.

    The mean reward of the short half is 1, that of the long half is 1/2. Between the halves, with α = 0.9, a long
    answer gets 0.9 R − 1 and a short one R − 0.9/2. Within a half an answer gets R minus the half's mean. The result
    is their sum with the weights μ = 1/4 and 3/4.
    """
    inputs = outcomes([[1.0, 1.0, 0.0, 1.0]], lengths=[[4, 1, 3, 2]])
    between_halves = np.array([-0.1, 0.55, -1, 0.55])
    within_half = np.array([0.5, 0, -0.5, 0])
    expected = 0.25 * between_halves + 0.75 * within_half
    cale = advantages.cale(inputs, cale_alpha=0.9, cale_mu=0.25)[0]
    assert cale.tolist() == pytest.approx(expected.tolist())


def test_cale_prefers_the_shorter_of_two_right_answers_and_blames_no_length_where_all_are_wrong() -> None:
    right = advantages.cale(outcomes([[1.0] * 4]), cale_alpha=0.9, cale_mu=0.5)[0]
    assert right.tolist() == pytest.approx([0.05, 0.05, -0.05, -0.05])
    wrong = advantages.cale(outcomes([[0.0] * 4]), cale_alpha=0.9, cale_mu=0.5)
    assert torch.equal(wrong, torch.zeros_like(wrong))


def test_cale_has_no_halves_where_all_lengths_are_equal_and_an_odd_group_has_a_larger_shorter_half() -> None:
    truncated = outcomes([[1.0, 1.0, 0.0, 0.0]], lengths=[[8] * 4])
    assert advantages.cale(truncated, cale_alpha=0.9, cale_mu=0.5).tolist() == [[0.5, 0.5, -0.5, -0.5]]
    odd = advantages.cale(outcomes([[1.0, 1.0, 1.0]]), cale_alpha=0.9, cale_mu=1.0)[0]
    assert odd.tolist() == pytest.approx([0.1, 0.1, -0.1])


# ---- per token


def test_reinforce_plus_plus_is_the_whitened_discounted_return() -> None:
    """Lengths 2 and 1, rewards 1 and 0, γ = 1/2, and a token reward of −0.2: the returns are 0.3, 1 and 0."""
    inputs = outcomes([[1.0, 0.0]], lengths=[[2, 1]], token_rewards=numbers(-0.2, 0.0, 0.0))
    returns = np.array([0.3, 1.0, 0.0])
    expected = (returns - returns.mean()) / returns.std(ddof=1)
    assert advantages.reinforce_plus_plus(inputs, discount=0.5).tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae_whitened"])
def test_whitened_ones_have_mean_zero_and_deviation_one_over_the_judged_tokens(name: str) -> None:
    inputs = random_outcomes()
    is_judged = inputs.judged.flatten().repeat_interleave(inputs.lengths.flatten())
    whitened = ALL[name](inputs)[is_judged]
    assert whitened.mean().item() == pytest.approx(0, abs=1e-12)
    assert whitened.numpy().std(ddof=1) == pytest.approx(1)


def test_gae_is_the_sum_that_defines_it() -> None:
    """A_t = Σ_l (γλ)^l δ_{t+l} with γ = 0.9 and λ = 0.8, written as a double sum for each response."""
    inputs = random_outcomes()
    assert inputs.values is not None
    responses = zip(
        inputs.rewards.flatten().tolist(),
        by_response(inputs.token_rewards, inputs.lengths),
        by_response(inputs.values, inputs.lengths),
        by_response(advantages.gae(inputs, discount=0.9, gae_lambda=0.8), inputs.lengths),
        strict=True,
    )
    for reward, rewards, values, gae in responses:
        n = len(gae)
        if math.isnan(reward):
            assert gae == [0] * n
            continue
        rewards[-1] += reward
        next_values = [*values[1:], 0.0]
        errors = [rewards[t] + 0.9 * next_values[t] - values[t] for t in range(n)]
        expected = [sum(0.72 ** (later - t) * errors[later] for later in range(t, n)) for t in range(n)]
        assert gae == pytest.approx(expected)


def test_gae_with_lambda_one_is_the_return_minus_the_value_and_with_zero_one_step_s_error() -> None:
    inputs = outcomes([[1.0, 0.5]], lengths=[[3, 2]], values=numbers(0.1, 0.2, 0.3, 0.4, 0.5))
    with_lambda_one = advantages.gae(inputs, discount=1.0, gae_lambda=1.0)
    assert with_lambda_one.tolist() == pytest.approx([0.9, 0.8, 0.7, 0.1, 0.0])
    with_lambda_zero = advantages.gae(inputs, discount=1.0, gae_lambda=0.0)
    assert with_lambda_zero.tolist() == pytest.approx([0.1, 0.1, 0.7, 0.1, 0.0])


def test_gae_without_values_is_refused() -> None:
    inputs = outcomes([[1.0, 0.0]])
    without = AdvantageInputs(inputs.rewards, inputs.lengths, inputs.token_rewards)
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
    with_failed = response_advantages(name, outcomes([[0.0, 1.0, 0.5, NAN], [1.0, 0.0, 0.0, NAN]]))
    without_failed = response_advantages(name, outcomes([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]]))
    judged = [*with_failed[:3], *with_failed[4:7]]
    assert judged == [pytest.approx(row) for row in without_failed]
    assert with_failed[3] == with_failed[7] == [0, 0, 0, 0]


@BY_NAME
def test_nothing_judged_gives_zeros_and_no_nan(name: str) -> None:
    assert on_tokens(name, outcomes([[NAN, NAN]])).tolist() == [0, 0, 0]


@BY_NAME
def test_a_group_of_which_one_was_judged_gives_finite_numbers(name: str) -> None:
    token_advantages = on_tokens(name, outcomes([[1.0, NAN], [0.0, 1.0]]))
    assert token_advantages.isfinite().all()


@BY_NAME
def test_the_order_of_prompts_and_samples_does_not_matter(name: str) -> None:
    """Prompts and samples are shuffled; each sequence keeps its tokens' advantages. Lengths in a group differ."""
    generator = torch.Generator().manual_seed(9)
    lengths = torch.stack([torch.randperm(9, generator=generator)[:4] + 1 for _ in range(6)])
    rewards = torch.randint(0, 3, (6, 4), generator=generator).double() / 2
    num_tokens = int(lengths.sum())
    token_rewards = 0.1 * draws(num_tokens, 4)
    values = draws(num_tokens, 5)
    in_order = response_advantages(name, AdvantageInputs(rewards, lengths, token_rewards, values))

    # places [6, 4]: where each of the shuffled samples stood before.
    shuffled_groups = torch.arange(24).view(6, 4)[torch.randperm(6, generator=generator)]
    places = torch.stack([group[torch.randperm(4, generator=generator)] for group in shuffled_groups])
    order = places.flatten().tolist()

    def reordered(of_tokens: Tensor) -> Tensor:
        responses = of_tokens.split(lengths.flatten().tolist())
        return torch.cat([responses[place] for place in order])

    shuffled = AdvantageInputs(
        rewards.flatten()[places], lengths.flatten()[places], reordered(token_rewards), reordered(values)
    )
    assert response_advantages(name, shuffled) == [pytest.approx(in_order[place], abs=1e-12) for place in order]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "clip_filter", "cale"])
def test_a_reward_of_tokens_counts_as_part_of_the_sample_s(name: str) -> None:
    """KL in the reward: −0.5 in all on the second sample's tokens lowers its reward by 0.5."""
    with_token_rewards = outcomes([[1.0, 1.0]], lengths=[[1, 2]], token_rewards=numbers(0, -0.2, -0.3))
    with_lower_reward = outcomes([[1.0, 0.5]], lengths=[[1, 2]])
    assert ALL[name](with_token_rewards).tolist()[0] == pytest.approx(ALL[name](with_lower_reward).tolist()[0])


@pytest.mark.parametrize(("name", "shift"), [("grpo", 5.0), ("dr_grpo", 5.0), ("rloo", 5.0), ("clip_filter", 5.0)])
def test_a_constant_in_all_rewards_changes_nothing(name: str, shift: float) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.5, 0.5], [0.25, 1.0, 0.0, 0.0]])
    expected = ALL[name](outcomes(rewards.tolist()))
    shifted = ALL[name](outcomes((rewards + shift).tolist()))
    assert shifted.flatten().tolist() == pytest.approx(expected.flatten().tolist())


# ---- what the loss mask leaves out


def masked_rollout() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rewards and lengths of :func:`random_outcomes`, and of its tokens the loss mask, rewards and values.

    Forced tokens begin, end and interrupt responses. Two samples have no trained token: one has no reward, and every
    token of the other is forced.
    """
    inputs = random_outcomes()
    assert inputs.values is not None
    mask = draws(len(inputs.values), 6) > -0.5
    response_masks = mask.split(inputs.lengths.flatten().tolist())
    response_masks[9].fill_(False)  # the one without a reward
    response_masks[14].fill_(False)
    return inputs.rewards, inputs.lengths, mask, inputs.token_rewards, inputs.values


@BY_NAME
def test_masked_tokens_are_as_if_they_had_never_been(name: str) -> None:
    """Trained tokens get exactly what they get in the same batch with the other tokens cut out by hand. The other
    tokens get 0, whatever their rewards and values are."""
    rewards, lengths, mask, token_rewards, values = masked_rollout()
    inputs = advantages.trained_inputs(rewards, lengths, mask, token_rewards, values)
    token_advantages = advantages.at_response_tokens(on_tokens(name, inputs), mask)

    trained_counts = [sum(response_mask) for response_mask in by_response(mask, lengths)]
    trained_lengths = torch.tensor(trained_counts).view(6, 4)
    places = [place for place, is_trained in enumerate(mask.tolist()) if is_trained]
    cut_by_hand = AdvantageInputs(rewards, trained_lengths, token_rewards[places], values[places])
    expected = on_tokens(name, cut_by_hand)
    assert token_advantages.dtype == torch.float64
    assert (expected != 0).any()
    assert torch.equal(token_advantages[places], expected)
    assert not token_advantages[~mask].any()

    noise = mask.logical_not() * 1e6
    noisy = advantages.trained_inputs(rewards, lengths, mask, token_rewards + noise, values - noise)
    assert torch.equal(advantages.at_response_tokens(on_tokens(name, noisy), mask), token_advantages)


def test_gae_goes_from_one_trained_token_to_the_next() -> None:
    """Of five tokens the second and the fifth are an environment's. The others' advantages are computed by hand; the
    reward of 1 is at the last trained token."""
    mask = torch.tensor([True, False, True, True, False])
    token_rewards = numbers(-0.1, 9, -0.2, -0.3, 9)
    values = numbers(0.5, 9, 0.25, -0.5, 9)
    inputs = advantages.trained_inputs(numbers(1.0).view(1, 1), torch.tensor([[5]]), mask, token_rewards, values)
    token_advantages = advantages.at_response_tokens(advantages.gae(inputs, discount=0.9, gae_lambda=0.8), mask)
    # reward + γ next value − value
    first_error = -0.1 + 0.9 * 0.25 - 0.5
    second_error = -0.2 + 0.9 * -0.5 - 0.25
    third_error = 1 - 0.3 + 0.5
    decay = 0.9 * 0.8
    third = third_error
    second = second_error + decay * third
    first = first_error + decay * second
    assert token_advantages.tolist() == pytest.approx([first, 0, second, third, 0], rel=1e-12)


def test_whitening_divides_by_the_deviation_of_the_trained_tokens_alone() -> None:
    rewards, lengths, mask, token_rewards, values = masked_rollout()
    inputs = advantages.trained_inputs(rewards, lengths, mask, token_rewards, values)
    plain = advantages.gae(inputs, discount=0.9, gae_lambda=0.8).numpy()
    whitened = advantages.gae_whitened(inputs, discount=0.9, gae_lambda=0.8)
    expected = (plain - plain.mean()) / plain.std(ddof=1)
    assert whitened.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# ---- overlong answers and groups that teach nothing


def test_the_soft_overlong_punishment_is_dapo_s() -> None:
    """The paper's setting: at most 20,480 tokens, of which the last 4,096 are the buffer."""
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    penalty = shaping.overlong_penalty(lengths, longest=20480, overlong_fraction=0.2)
    assert penalty.tolist() == [0, 0, -0.5, -1, -1]
    off = shaping.overlong_penalty(lengths, longest=20480, overlong_fraction=0.0)
    assert off.tolist() == [0, 0, 0, 0, 0]
    assert off.dtype == penalty.dtype == torch.float64


def test_groups_of_equal_rewards_are_replaced_in_order_and_fill_up_what_is_missing() -> None:
    groups = [[1.0, 1.0], [1.0, 0.0], [NAN, 1.0], [0.0, 1.0], [NAN, NAN], [1.0, 0.5], [0.5, 0.5]]
    rewards = torch.tensor(groups)
    assert shaping.has_reward_variance(rewards).tolist() == [False, True, False, True, False, True, False]
    assert shaping.select_groups(rewards, 2) == [1, 3]
    assert shaping.select_groups(rewards, 3) == [1, 3, 5]
    assert shaping.select_groups(rewards, 5) == [0, 1, 2, 3, 5]


# ---- a critic's loss


def test_the_clipped_value_loss_has_its_closed_form_and_gradient() -> None:
    """With ε = 0.2. The old value of the first four is 0. Of the values with the return 1, 0.1 is not clipped, 0.5 is
    clipped to 0.2, and −0.5 is further from the return than its clipped −0.2, so that its own loss counts. The last
    value has fallen from 0.5 to 0.1 and is clipped to 0.3."""
    old_values = numbers(0, 0, 0, 0, 0.5)
    returns = numbers(1, 1, 1, -1, 0)
    values = numbers(0.1, 0.5, -0.5, 0.5, 0.1)

    def total_loss(new_values: Tensor) -> Tensor:
        return value_losses.clipped(new_values, old_values, returns, value_clip=0.2).sum()

    losses = value_losses.clipped(values, old_values, returns, value_clip=0.2)
    assert losses.tolist() == pytest.approx([0.405, 0.32, 1.125, 1.125, 0.045])
    by_autograd = gradient(total_loss, values)
    assert by_autograd.tolist() == pytest.approx([-0.9, 0, -1.5, 1.5, 0])
    assert by_autograd.tolist() == pytest.approx(finite_differences(total_loss, values).tolist(), abs=1e-8)
