"""The KL estimators against the exact divergence of two distributions, and their gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recipes.algorithms.kl import k1, k2, k3
from tests.recipes.gradients import draws, finite_differences, gradient, numbers

Estimator = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_an_estimator_is_exactly_zero_where_both_agree(estimator: Estimator) -> None:
    policy = draws(1000, 1)
    assert torch.equal(estimator(policy, policy), torch.zeros_like(policy))


def test_k2_and_k3_are_never_negative_and_k1_is_of_either_sign() -> None:
    policy, reference = draws(1000, 1), draws(1000, 2)
    assert (k2(policy, reference) > 0).all()
    assert (k3(policy, reference) > 0).all()
    assert (k1(policy, reference) < 0).any()
    assert (k1(policy, reference) > 0).any()


def test_the_values_of_a_known_ratio() -> None:
    """Policy 1/2, reference 1/4: d = −ln 2."""
    policy, reference = numbers(math.log(0.5)), numbers(math.log(0.25))
    assert k1(policy, reference).item() == pytest.approx(math.log(2))
    assert k2(policy, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(policy, reference).item() == pytest.approx(0.5 + math.log(2) - 1)


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator: Estimator) -> None:
    """Their mean over the policy's distribution is KL(policy ‖ reference) in closed form."""
    policy, reference = draws(50, 3).log_softmax(0), draws(50, 4).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * estimator(policy, reference)).sum().item() == pytest.approx(exact.item(), rel=1e-12)


def test_k2_is_the_divergence_to_second_order() -> None:
    """Halving the distance between the distributions divides its error by eight, and the divergence by four."""
    policy, direction = draws(50, 3), draws(50, 4)

    def error(step: float) -> float:
        a, b = policy.log_softmax(0), (policy + step * direction).log_softmax(0)
        return abs(((a.exp() * (k2(a, b) - (a - b))).sum()).item())

    assert error(0.02) / error(0.01) == pytest.approx(8, rel=0.05)


@pytest.mark.parametrize(
    ("estimator", "derivative"),
    [
        (k1, lambda d: torch.ones_like(d)),
        (k2, lambda d: -d),
        (k3, lambda d: 1 - d.exp()),
    ],
)
def test_the_gradient_is_its_closed_form_and_that_of_finite_differences(
    estimator: Estimator, derivative: Estimator
) -> None:
    policy, reference = draws(20, 5), draws(20, 6)
    by_autograd = gradient(lambda x: estimator(x, reference).sum(), policy)
    assert by_autograd.tolist() == pytest.approx(derivative(reference - policy).tolist(), rel=1e-12)
    differences = finite_differences(lambda x: estimator(x, reference).sum(), policy)
    assert by_autograd.tolist() == pytest.approx(differences.tolist(), abs=1e-7)


def test_as_a_loss_k2_has_the_divergence_s_gradient_and_k1_has_none() -> None:
    """In the logits of the policy, exactly: the mean over its own samples of each estimator's gradient."""
    logits, reference = draws(12, 7), draws(12, 8).log_softmax(0)
    weights = logits.softmax(0)

    def divergence(x: Tensor) -> Tensor:
        return (x.softmax(0) * (x.log_softmax(0) - reference)).sum()

    def sampled(estimator: Estimator) -> Tensor:
        return gradient(lambda x: (weights * estimator(x.log_softmax(0), reference)).sum(), logits)

    assert sampled(k2).tolist() == pytest.approx(gradient(divergence, logits).tolist(), abs=1e-12)
    assert sampled(k1).tolist() == pytest.approx([0] * 12, abs=1e-12)


def test_nothing_is_clamped() -> None:
    """A peer clamps k3 to ±10, and so reports another divergence under the same name."""
    assert k3(numbers(-20.0), numbers(0.0)).item() == pytest.approx(math.exp(20) - 21)
