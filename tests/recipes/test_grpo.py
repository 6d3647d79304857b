"""GRPO's advantages, its loss and their gradient, against closed forms and finite differences in FP64."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_ext.packing import MicroBatch, PackedSequence, pack
from recipes.algorithms import algorithm, grpo
from recipes.algorithms.losses import clipped_policy_loss, kl_k3, sequence_mean_token_mean
from recipes.config import AlgorithmConfig, ConfigError


def config(**changed: float) -> AlgorithmConfig:
    values = {"clip_ratio": 0.2, "kl_coefficient": 0.1, "advantage_epsilon": 1e-9, **changed}
    fields = dict.fromkeys(AlgorithmConfig.__dataclass_fields__)
    return AlgorithmConfig(**{**fields, **values})  # type: ignore[arg-type]


def micro_batch(reference: Tensor, advantages: Tensor) -> MicroBatch:
    """One packed sequence whose response tokens have these values."""
    made = pack([PackedSequence([1], [2] * len(reference))], [0], 1, 0, torch.device("cpu"))
    made.values = {"reference": reference, "advantage": advantages}
    return made


def finite_differences(function: Callable[[Tensor], Tensor], at: Tensor, h: float = 1e-6) -> Tensor:
    """Central differences of a scalar function, element by element."""
    steps = h * torch.eye(len(at), dtype=at.dtype)
    return torch.stack([(function(at + step) - function(at - step)) / (2 * h) for step in steps])


def gradient(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    x = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(function(x), x)
    return found


def draws(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_rewards_give_zero_advantages() -> None:
    rewards = torch.tensor([[0.5] * 4, [1.0] * 4], dtype=torch.float64)
    assert torch.equal(grpo.advantages(rewards, config()), torch.zeros(2, 4, dtype=torch.float64))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=8).filter(lambda r: len(set(r)) > 1))
@settings(max_examples=50, deadline=None)
def test_advantages_of_a_group_have_mean_zero_and_deviation_one(rewards: list[float]) -> None:
    found = grpo.advantages(torch.tensor([rewards, rewards[::-1]], dtype=torch.float64), config())
    assert found.mean(1).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert (found**2).mean(1).tolist() == pytest.approx([1, 1], rel=1e-7)


def test_advantages_of_a_known_group() -> None:
    """Rewards 1, 0, 0, 0: mean 1/4, population deviation √3/4, so (√3, −1/√3, −1/√3, −1/√3)."""
    found = grpo.advantages(torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64), config(advantage_epsilon=0.0))
    assert found[0].tolist() == pytest.approx([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_sequence_weights_sum_to_one_and_share_it_equally(lengths: list[int]) -> None:
    weights = sequence_mean_token_mean(lengths)
    assert [len(w) for w in weights] == lengths
    assert [sum(w) for w in weights] == pytest.approx([1 / len(lengths)] * len(lengths))
    assert all(len(set(w)) == 1 for w in weights)


def test_k3_is_zero_where_equal_and_never_negative() -> None:
    policy, reference = draws(1000, 1), draws(1000, 2)
    assert torch.equal(kl_k3(policy, policy), torch.zeros_like(policy))
    assert (kl_k3(policy, reference) > 0).all()
    assert kl_k3(torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))).item() == pytest.approx(
        0.5 + math.log(2) - 1
    )


def test_k3_is_an_unbiased_estimate_of_kl() -> None:
    """Its mean over the policy's distribution is KL(policy ‖ reference) in closed form."""
    policy, reference = draws(50, 3).log_softmax(0), draws(50, 4).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * kl_k3(policy, reference)).sum().item() == pytest.approx(exact.item(), rel=1e-12)


def test_the_clipped_loss_has_its_closed_form() -> None:
    """Ratios 0.5, 1, 2 with both signs of the advantage, ε = 0.2: −min(r A, clip(r) A)."""
    ratios = torch.tensor([0.5, 1.0, 2.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    advantages = torch.tensor([3.0, 3.0, 3.0, -3.0, -3.0, -3.0], dtype=torch.float64)
    found = clipped_policy_loss(ratios.log(), torch.zeros(6, dtype=torch.float64), advantages, 0.2)
    assert found.tolist() == pytest.approx([-1.5, -3.0, -3.6, 2.4, 3.0, 6.0])


def test_the_clipped_gradient_is_that_of_finite_differences_and_zero_where_clipped() -> None:
    ratios = torch.tensor([0.5, 0.9, 1.1, 2.0] * 2, dtype=torch.float64)
    advantages = torch.tensor([1.5] * 4 + [-1.5] * 4, dtype=torch.float64)

    def total(log_probs: Tensor) -> Tensor:
        return clipped_policy_loss(log_probs, torch.zeros(8, dtype=torch.float64), advantages, 0.2).sum()

    found = gradient(total, ratios.log())
    assert found.tolist() == pytest.approx(finite_differences(total, ratios.log()).tolist(), abs=1e-8)
    # −r A where the surrogate is not clipped: too high with A > 0 and too low with A < 0 are.
    assert found.tolist() == pytest.approx([-0.75, -1.35, -1.65, 0, 0, 1.35, 1.65, 3.0])


def test_the_loss_is_minus_the_advantage_plus_the_penalty() -> None:
    """The policy that sampled is the one that is updated: the ratio is 1, whatever the log-probs."""
    log_probs, reference, advantages = draws(9, 5), draws(9, 6), draws(9, 7)
    batch = micro_batch(reference, advantages)
    d = reference - log_probs
    expected = -advantages + 0.1 * (d.exp() - d - 1)
    assert grpo.token_loss(log_probs, batch, config()).tolist() == pytest.approx(expected.tolist())
    without = grpo.token_loss(log_probs, batch, config(kl_coefficient=0.0))
    assert without.tolist() == pytest.approx((-advantages).tolist())


def test_the_gradient_is_the_policy_gradient() -> None:
    """d loss / d log-prob = −A + β (1 − reference/policy): REINFORCE with the group's baseline, and k3's derivative.

    The finite differences hold the old log-probs fixed, as the loss does by cutting the gradient.
    """
    log_probs, reference, advantages = draws(9, 8), draws(9, 9), draws(9, 10)
    batch = micro_batch(reference, advantages)
    found = gradient(lambda x: grpo.token_loss(x, batch, config()).sum(), log_probs)
    closed = -advantages + 0.1 * (1 - (reference - log_probs).exp())
    assert found.tolist() == pytest.approx(closed.tolist(), rel=1e-12)

    def with_fixed_old(x: Tensor) -> Tensor:
        return (clipped_policy_loss(x, log_probs, advantages, 0.2) + 0.1 * kl_k3(x, reference)).sum()

    assert found.tolist() == pytest.approx(finite_differences(with_fixed_old, log_probs).tolist(), abs=1e-7)


def test_the_gradient_in_the_logits_raises_the_likelihood_of_good_samples() -> None:
    """Through the softmax: d loss / d logits = −A (onehot(sample) − softmax), the score function."""
    logits, sample, advantage = draws(12, 11), 4, 1.7
    batch = micro_batch(torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64))

    def loss(x: Tensor) -> Tensor:
        return grpo.token_loss(x.log_softmax(0)[sample : sample + 1], batch, config(kl_coefficient=0.0)).sum()

    onehot = torch.nn.functional.one_hot(torch.tensor(sample), 12)
    expected = -advantage * (onehot - logits.softmax(0))
    assert gradient(loss, logits).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_an_algorithm_is_found_by_name_and_by_path() -> None:
    assert algorithm("grpo") is grpo
    assert algorithm("recipes.algorithms.grpo") is grpo
    with pytest.raises(ConfigError, match=r"algorithm\.name='ppo': no module recipes\.algorithms\.ppo"):
        algorithm("ppo")
