"""The parts of an algorithm, found by name, and the loss of a micro-batch that they make."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from megatron_ext import forward_backward
from megatron_ext.forward_backward import LossFunction
from megatron_ext.packing import MicroBatch
from recipes.algorithms import advantages, aggregation, kl, objective, policy_losses
from recipes.algorithms.advantages import AdvantageInputs
from recipes.algorithms.needs import Needs, needs
from recipes.algorithms.registry import REGISTRY, reference_interval, requirements, resolve
from recipes.algorithms.settings import AlgorithmConfig
from recipes.config import parse
from recipes.errors import ConfigError
from tests.recipes.gradients import all_trained, draws, gradient, numbers
from tests.sequences import PlainSequence, pack

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [3, 1, 5, 2]
NAMES = sorted(path.stem for path in (ROOT / "conf/algorithm").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's data paths are relative to it."""
    monkeypatch.chdir(ROOT)


def configured(name: str = "grpo", **changed: Any) -> AlgorithmConfig:
    """``conf/algorithm/NAME.yaml`` with changed settings."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", overrides=["recipe=demo", f"algorithm={name}"])).algorithm
    return replace(config, **changed)


def micro_batches(split: list[list[int]]) -> tuple[list[MicroBatch], list[Tensor]]:
    """Micro-batches of sequences of ``LENGTHS``, and the present policy's log-probs of each micro-batch's tokens.

    All values are random and in FP64. ``split`` has the sequences' indices by micro-batch.
    """
    names = ["logprobs", "old", "reference", "advantages"]
    columns = {name: draws(11, seed).mul(0.3).split(LENGTHS) for seed, name in enumerate([*names, "now"])}
    sequence_weights = numbers(*aggregation.sequence_mean_token_mean(LENGTHS))
    columns["weights"] = sequence_weights.repeat_interleave(torch.tensor(LENGTHS)).split(LENGTHS)
    packed_names = [*names, "weights"]
    sequences = []
    for i, length in enumerate(LENGTHS):
        values = {name: columns[name][i].tolist() for name in packed_names}
        sequences.append(PlainSequence([1], [2] * length, values))

    batches = []
    log_probs = []
    for indices in split:
        batch = pack(sequences, indices, 1, 0, torch.device("cpu"))
        # Packing rounds them to FP32.
        batch.values = {name: torch.cat([columns[name][i] for i in batch.indices]) for name in packed_names}
        batch.values["loss_mask"] = torch.ones(len(batch.places), dtype=torch.float64)
        batches.append(batch)
        log_probs.append(torch.cat([columns["now"][i] for i in batch.indices]))
    return batches, log_probs


def whole_batch() -> tuple[MicroBatch, Tensor]:
    """All sequences in one micro-batch, and the present policy's log-probs of their tokens."""
    (batch,), (log_probs,) = micro_batches([[0, 1, 2, 3]])
    return batch, log_probs


def outputs(log_probs: Tensor, entropies: Tensor | None = None) -> Tensor:
    """[2, R]: what a loss gets. Tests that do not look at entropies leave them 0."""
    return torch.stack([log_probs, torch.zeros_like(log_probs) if entropies is None else entropies])


def test_grpo_s_loss_and_gradient_have_their_closed_form() -> None:
    """With one update a token's loss is −A + β k3, and its gradient −A + β (1 − reference / policy)."""
    batch, log_probs = whole_batch()
    del batch.values["old"]
    advantages = batch.values["advantages"]
    weights = batch.values["weights"]
    log_ratio = batch.values["reference"] - log_probs
    k3 = log_ratio.exp() - log_ratio - 1
    expected_loss = ((-advantages + 0.1 * k3) * weights).sum()
    expected_gradient = (-advantages + 0.1 * (1 - log_ratio.exp())) * weights

    loss = objective.loss(configured(kl_coefficient=0.1), None)
    assert loss(outputs(log_probs), batch)[0].item() == pytest.approx(expected_loss.item())
    by_autograd = gradient(lambda x: loss(outputs(x), batch)[0], log_probs)
    assert by_autograd.tolist() == pytest.approx(expected_gradient.tolist(), rel=1e-12)


def test_the_corrections_the_entropy_and_a_kl_in_the_reward_are_put_together() -> None:
    config = configured(
        importance_sampling="token_truncated", tis_cap=1.2, sequence_ratio_bounds=[0.8, 1.1], entropy_coefficient=0.01,
        kl_in="reward", kl_coefficient=0.5,
    )  # fmt: skip
    batch, log_probs = whole_batch()
    entropies = draws(11, 9).abs()
    old = batch.values["old"]
    advantages = batch.values["advantages"]
    weights = batch.values["weights"]
    gap = old - batch.values["logprobs"]
    sequence_ratios = torch.stack([sequence_gap.mean().exp() for sequence_gap in gap.split(LENGTHS)])
    is_kept = (sequence_ratios >= 0.8) & (sequence_ratios <= 1.1)
    assert is_kept.any()
    assert not is_kept.all()
    kept_tokens = is_kept.repeat_interleave(torch.tensor(LENGTHS))
    correction = gap.exp().clamp(max=1.2) * kept_tokens
    clipped = policy_losses.ppo_clip(log_probs, old, advantages, clip_low=0.2, clip_high=0.2)
    expected = ((clipped * correction - 0.01 * entropies) * weights).sum()

    loss, sums = objective.loss(config, None)(outputs(log_probs, entropies), batch)
    assert loss.item() == pytest.approx(expected.item())
    assert sums["entropy"].item() == pytest.approx(entropies.sum().item())
    assert sums["train_inference_mismatch/gap"].item() == pytest.approx(gap.abs().sum().item())


@pytest.mark.parametrize("name", NAMES)
def test_the_update_depends_on_neither_order_nor_micro_batches(name: str) -> None:
    """Neither the sum of the losses, nor the gradient of each token, at its place in the whole batch."""
    config = configured(name, importance_sampling="sequence_truncated", sequence_ratio_bounds=[0.5, 1.5])
    loss = objective.loss(config, None)

    def update(split: list[list[int]]) -> tuple[float, Tensor]:
        total_loss = 0.0
        gradients = torch.zeros(11, dtype=torch.float64)
        for batch, log_probs in zip(*micro_batches(split), strict=True):
            leaf = log_probs.clone().requires_grad_()
            batch_loss, _ = loss(outputs(leaf), batch)
            (batch_gradient,) = torch.autograd.grad(batch_loss, leaf)
            gradients[batch.places] = batch_gradient
            total_loss += batch_loss.item()
        return total_loss, gradients

    expected_loss, expected_gradients = update([[0, 1, 2, 3]])
    assert (expected_gradients != 0).any()
    for split in ([[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        total_loss, gradients = update(split)
        assert total_loss == pytest.approx(expected_loss, rel=1e-12)
        assert torch.equal(gradients, expected_gradients)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_s_parts_are_found_and_set(name: str) -> None:
    config = configured(name)
    parts = {kind: resolve(kind, config) for kind in REGISTRY}
    for kind, part in parts.items():
        assert part.func.__name__ == getattr(config, kind)  # type: ignore[attr-defined]
    log_probs = draws(11)
    sequences = {"sequences": all_trained(LENGTHS)} if requirements(config).sequences else {}
    assert parts["policy_loss"](log_probs, log_probs, log_probs, **sequences).shape == (11,)
    assert len(parts["aggregation"](LENGTHS)) == 4


def test_settings_reach_the_functions() -> None:
    outcomes = AdvantageInputs(numbers(1.0, 0.0).view(1, 2), torch.tensor([[1, 2]]), torch.zeros(3))
    advantage = resolve("advantage", configured("cale", cale_alpha=0.5, cale_mu=1.0))
    assert torch.equal(advantage(outcomes), advantages.cale(outcomes, cale_alpha=0.5, cale_mu=1))
    token_weights = resolve("aggregation", configured("dr_grpo", token_divisor=8.0))
    assert token_weights([2]) == aggregation.sequence_sum([2], token_divisor=8.0)


def thirds(lengths: list[int], *, share: float) -> list[float]:
    """A user's own aggregation."""
    return [share] * len(lengths)


def test_a_function_of_one_s_own_is_found_by_its_path_with_its_own_keywords() -> None:
    estimator = resolve("kl_estimator", configured(kl_estimator="recipes.algorithms.kl.k2"))
    assert estimator.func is kl.k2  # type: ignore[attr-defined]
    path = f"{__name__}.thirds"
    own_aggregation = resolve("aggregation", configured(aggregation=path, kwargs={"share": 0.3}))
    assert own_aggregation([2]) == [0.3]
    with pytest.raises(ConfigError, match=r"thirds': needs 'share'; give algorithm\.kwargs\.share"):
        resolve("aggregation", configured(aggregation=path))


@pytest.mark.parametrize("chosen", ["ppo", "no_such_package.loss", "recipes.algorithms.kl.k4", "k4."])
def test_an_unknown_function_is_told_with_the_known_ones(chosen: str) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.kl_estimator='.*': no such function; use one of k1, k2, k3 or"):
        resolve("kl_estimator", configured(kl_estimator=chosen))


def test_a_forced_token_counts_in_no_measure() -> None:
    """Its recorded log-prob of 0 is no policy's. Its weight is 0 (``aggregation.token_weights``)."""
    loss = objective.loss(configured(importance_sampling="token_truncated", kl_coefficient=0.1), None)
    batch, log_probs = whole_batch()
    forced = 4
    batch.values["loss_mask"][forced] = 0.0
    batch.values["weights"][forced] = 0.0
    expected_loss, expected_sums = loss(outputs(log_probs), batch)
    batch.values["logprobs"][forced] = -7.0
    value, sums = loss(outputs(log_probs), batch)
    assert torch.equal(value, expected_loss)
    assert sums == expected_sums
    batch.values["loss_mask"][forced] = 1.0
    assert loss(outputs(log_probs), batch)[1]["kl/reference"] > expected_sums["kl/reference"]


@pytest.mark.parametrize("far", [-200.0, 200.0])
def test_a_forced_token_that_no_policy_would_write_leaves_loss_and_gradient_finite(far: float) -> None:
    """Its ratio to the reference, to the old policy or to the engine overflows FP32."""
    loss = objective.loss(configured(kl_coefficient=0.1), None)
    batch, log_probs = whole_batch()
    forced = 4
    batch.values["loss_mask"][forced] = 0.0
    batch.values["weights"][forced] = 0.0
    expected, expected_gradient = with_gradient(loss, log_probs, batch)
    for name in ("reference", "old", "logprobs"):
        batch.values[name][forced] = log_probs[forced] + far
    batch.values = {name: column.float() for name, column in batch.values.items()}
    value, gradient = with_gradient(loss, log_probs.float(), batch)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)


def with_gradient(loss: LossFunction, log_probs: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """A loss, and its gradient by the log-probs."""
    leaf = log_probs.detach().requires_grad_()
    value, _ = loss(outputs(leaf), batch)
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


@needs(values=True)
def returns_minus_values(inputs: AdvantageInputs) -> Tensor:
    """A user's own advantage that needs a critic."""
    assert inputs.values is not None
    returns = inputs.rewards.flatten().repeat_interleave(inputs.lengths.flatten())
    return returns - inputs.values


@needs(reference=True)
def pull_to_reference(log_probs: Tensor, old: Tensor, advantages: Tensor, reference: Tensor) -> Tensor:
    """A user's own policy loss that needs the reference's log-probs."""
    return -advantages * log_probs + (log_probs - reference) ** 2


def test_a_run_has_what_its_parts_need() -> None:
    assert requirements(configured()) == Needs(reference=True)
    assert requirements(configured(kl_coefficient=0.0)) == Needs()
    assert requirements(configured("ppo")) == Needs(values=True, reference=True)
    assert requirements(configured("gspo")) == Needs(sequences=True)
    own_advantage = configured(kl_coefficient=0.0, advantage=f"{__name__}.returns_minus_values")
    assert requirements(own_advantage) == Needs(values=True)
    own_loss = configured(kl_coefficient=0.0, policy_loss=f"{__name__}.pull_to_reference")
    assert requirements(own_loss) == Needs(reference=True)


def test_the_reference_is_for_a_coefficient_a_part_or_the_metrics_interval() -> None:
    own_loss = {"kl_coefficient": 0.0, "policy_loss": f"{__name__}.pull_to_reference"}
    for interval in (None, 10):
        assert reference_interval(configured(reference_every=interval)) == 1
        assert reference_interval(configured("ppo", reference_every=interval)) == 1
        assert reference_interval(configured(**own_loss, reference_every=interval)) == 1
        assert reference_interval(configured(kl_coefficient=0.0, reference_every=interval)) == interval


def test_without_a_reference_the_loss_reads_none_and_measures_no_kl() -> None:
    batch, log_probs = whole_batch()
    _, with_reference = objective.loss(configured(), None)(outputs(log_probs), batch)
    del batch.values["reference"]
    value, without_reference = objective.loss(configured(kl_coefficient=0.0), None)(outputs(log_probs), batch)
    assert value.isfinite()
    assert set(with_reference) - set(without_reference) == {"kl/reference"}


def test_a_loss_of_one_s_own_gets_the_reference_that_it_needs() -> None:
    config = configured(kl_coefficient=0.0, policy_loss=f"{__name__}.pull_to_reference")
    batch, log_probs = whole_batch()
    columns = [batch.values[name] for name in ("old", "advantages", "reference")]
    expected = (pull_to_reference(log_probs, *columns) * batch.values["weights"]).sum()
    value, _ = objective.loss(config, None)(outputs(log_probs), batch)
    assert value.item() == pytest.approx(expected.item())


# ---- the metrics of an update

# The loss mask of sequences of ``LENGTHS``.
MASK = [True, False, True, True, True, True, True, False, True, True, False]


def reported(config: AlgorithmConfig, split: list[list[int]], entropies: Tensor) -> dict[str, float]:
    """The metrics of an update on these micro-batches with the loss mask ``MASK``."""
    loss = objective.loss(config, None)
    total: dict[str, float] = {}
    for batch, log_probs in zip(*micro_batches(split), strict=True):
        loss_mask = torch.tensor(MASK)[batch.places].double()
        batch.values["loss_mask"] = loss_mask
        batch.values["weights"] *= loss_mask
        batch.values["logprobs"] *= loss_mask  # as forced tokens are recorded
        _, sums = loss(outputs(log_probs, entropies[batch.places]), batch)
        forward_backward.add_metrics(total, {name: float(value) for name, value in sums.items()})
    return objective.report(total)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[3, 1], [0, 2]]])
def test_metrics_are_means_over_the_trained_tokens_of_all_micro_batches(split: list[list[int]]) -> None:
    """Each metric is written again with NumPy; the entropies are made up."""
    entropies = draws(11, 9).abs()
    config = configured(importance_sampling="icepop", icepop_low=0.8, icepop_high=1.5, clip_low=0.05)
    metrics = reported(config, split, entropies)

    batch, log_probs = whole_batch()
    trained = {name: column.numpy()[MASK] for name, column in batch.values.items()}
    old = trained["old"]
    ratio = np.exp(log_probs.numpy()[MASK] - old)
    clipped_low = (ratio < 0.95) & (trained["advantages"] < 0)
    clipped_high = (ratio > 1.2) & (trained["advantages"] > 0)
    correction = np.exp(old - trained["logprobs"])
    left_out = (correction < 0.8) | (correction > 1.5)
    assert 0 < clipped_low.mean() < 1
    assert 0 < clipped_high.mean() < 1
    assert 0 < left_out.mean() < 1
    to_reference = trained["reference"] - log_probs.numpy()[MASK]
    expected = {
        "clip_fraction/low": clipped_low.mean(),
        "clip_fraction/high": clipped_high.mean(),
        # Schulman's k3 with samples of the old policy: E_old[r − 1 − ln r] = KL(old ‖ policy).
        "kl/old": (ratio - 1 - np.log(ratio)).mean(),
        "kl/reference": (np.exp(to_reference) - to_reference - 1).mean(),
        "perplexity/policy": np.exp(-old.mean()),
        "perplexity/sampler": np.exp(-trained["logprobs"].mean()),
        "entropy": entropies.numpy()[MASK].mean(),
        "train_inference_mismatch/left_out": left_out.mean(),
        "train_inference_mismatch/mean": np.abs(old - trained["logprobs"]).mean(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_clip_fractions_count_what_a_loss_clips() -> None:
    """CISPO bounds a token's weight whatever the sign of its advantage. GSPO and sequence-level CPGD clip whole
    sequences. REINFORCE clips nothing, and so has no clip fraction."""
    batch, log_probs = whole_batch()
    advantages = batch.values["advantages"].numpy()
    log_ratio = log_probs - batch.values["old"]
    mask = torch.tensor(MASK)
    sequences = zip(log_ratio.split(LENGTHS), mask.split(LENGTHS), strict=True)
    means = [sequence[sequence_mask].mean().item() for sequence, sequence_mask in sequences]
    token_ratios = np.exp(log_ratio.numpy())
    sequence_ratios = np.exp(np.repeat(means, LENGTHS))
    for name, depends_on_sign, ratios in (
        ("ppo_clip", True, token_ratios),
        ("cpgd", True, token_ratios),
        ("cispo", False, token_ratios),
        ("gspo", True, sequence_ratios),
        ("cpgd_sequence", True, sequence_ratios),
    ):
        metrics = reported(configured(policy_loss=name, clip_low=0.05, clip_high=0.05), [[0, 1, 2, 3]], draws(11))
        clipped_low = ratios < 0.95
        clipped_high = ratios > 1.05
        if depends_on_sign:
            clipped_low &= advantages < 0
            clipped_high &= advantages > 0
        low_fraction = clipped_low[MASK].mean()
        high_fraction = clipped_high[MASK].mean()
        assert low_fraction + high_fraction > 0, name
        assert metrics["clip_fraction/low"] == low_fraction, name
        assert metrics["clip_fraction/high"] == high_fraction, name
    without_a_clip = reported(configured(policy_loss="reinforce"), [[0]], draws(11))
    assert not any(name.startswith("clip") for name in without_a_clip)


def test_before_the_first_update_nothing_is_clipped_and_the_old_policy_is_the_policy() -> None:
    batch, log_probs = whole_batch()
    del batch.values["old"]
    _, sums = objective.loss(configured(), None)(outputs(log_probs), batch)
    metrics = objective.report({name: float(value) for name, value in sums.items()})
    assert (metrics["clip_fraction/low"], metrics["clip_fraction/high"], metrics["kl/old"]) == (0, 0, 0)


def test_an_update_without_a_trained_token_reports_nothing() -> None:
    batch, log_probs = whole_batch()
    batch.values["loss_mask"] *= 0
    batch.values["weights"] *= 0
    value, sums = objective.loss(configured(), None)(outputs(log_probs), batch)
    assert value.item() == 0
    assert objective.report({name: float(number) for name, number in sums.items()}) == {}
