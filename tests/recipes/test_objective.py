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
from megatron_ext.packing import MicroBatch
from recipes.algorithms import advantages, aggregation, kl, objective, policy_losses
from recipes.algorithms.advantages import AdvantageInputs
from recipes.algorithms.needs import Needs, needs
from recipes.algorithms.registry import REGISTRY, requirements, resolve
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
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("config", overrides=["recipe=demo", f"algorithm={name}"])).algorithm
    return replace(config, **changed)


def micro_batches(split: list[list[int]]) -> tuple[list[MicroBatch], list[Tensor]]:
    """Packed sequences of ``LENGTHS`` with random values, FP64, and log-probs for their tokens."""
    names = ["logprobs", "old", "reference", "advantages"]
    values = {name: draws(11, seed).mul(0.3).split(LENGTHS) for seed, name in enumerate([*names, "now"])}
    weights = [[weight] * n for weight, n in zip(aggregation.sequence_mean_token_mean(LENGTHS), LENGTHS, strict=True)]
    sequences = [
        PlainSequence([1], [2] * n, {**{k: values[k][i].tolist() for k in names}, "weights": weights[i]})
        for i, n in enumerate(LENGTHS)
    ]
    made = [pack(sequences, indices, 1, 0, torch.device("cpu")) for indices in split]
    for batch in made:
        batch.values = {
            **{k: torch.cat([values[k][i] for i in batch.indices]) for k in names},
            "weights": numbers(*(w for i in batch.indices for w in weights[i])),
            "loss_mask": torch.ones(sum(batch.lengths), dtype=torch.float64),
        }
    return made, [torch.cat([values["now"][i] for i in batch.indices]) for batch in made]


def outputs(log_probs: Tensor, entropies: Tensor | None = None) -> Tensor:
    """[2, R]: what a loss gets; entropies of 0 where a test does not look at them."""
    return torch.stack([log_probs, torch.zeros_like(log_probs) if entropies is None else entropies])


def test_grpo_s_loss_and_gradient_have_their_closed_form() -> None:
    """One update: −A + β k3, weighted; gradient −A + β (1 − reference / policy): the policy gradient and k3's."""
    config = configured(kl_coefficient=0.1)
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    del batch.values["old"]
    v, d = batch.values, batch.values["reference"] - now
    loss = objective.loss(config, None)
    expected = ((-v["advantages"] + 0.1 * (d.exp() - d - 1)) * v["weights"]).sum()
    assert loss(outputs(now), batch)[0].item() == pytest.approx(expected.item())
    steep = (-v["advantages"] + 0.1 * (1 - d.exp())) * v["weights"]
    assert gradient(lambda x: loss(outputs(x), batch)[0], now).tolist() == pytest.approx(steep.tolist(), rel=1e-12)


def test_the_corrections_the_entropy_and_a_kl_in_the_reward_are_put_together() -> None:
    config = configured(
        importance_sampling="token_truncated", tis_cap=1.2, sequence_ratio_bounds=[0.8, 1.1], entropy_coefficient=0.01,
        kl_in="reward", kl_coefficient=0.5,
    )  # fmt: skip
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    v, entropy = batch.values, draws(11, 9).abs()
    gap = v["old"] - v["logprobs"]
    keep = torch.cat([torch.full((len(x),), 0.8 <= x.mean().exp() <= 1.1) for x in gap.split(LENGTHS)])
    assert keep.any()
    assert not keep.all()
    losses = policy_losses.ppo_clip(now, v["old"], v["advantages"], clip_low=0.2, clip_high=0.2)
    losses = losses * gap.exp().clamp(max=1.2) * keep - 0.01 * entropy
    found, measured = objective.loss(config, None)(outputs(now, entropy), batch)
    assert found.item() == pytest.approx((losses * v["weights"]).sum().item())
    assert measured["entropy"].item() == pytest.approx(entropy.sum().item())
    assert measured["train_inference_mismatch/gap"].item() == pytest.approx(gap.abs().sum().item())


@pytest.mark.parametrize("name", NAMES)
def test_the_update_depends_on_neither_order_nor_micro_batches(name: str) -> None:
    """Sum of the losses, and each token's gradient, by its place in the whole batch."""
    config = configured(name, importance_sampling="sequence_truncated", sequence_ratio_bounds=[0.5, 1.5])
    loss = objective.loss(config, None)

    def update(split: list[list[int]]) -> tuple[float, Tensor]:
        total, steep = 0.0, torch.zeros(11, dtype=torch.float64)
        for batch, now in zip(*micro_batches(split), strict=True):
            total += loss(outputs(now), batch)[0].item()
            steep[batch.places] = gradient(lambda x, batch=batch: loss(outputs(x), batch)[0], now)  # type: ignore[misc]
        return total, steep

    total, steep = update([[0, 1, 2, 3]])
    assert (steep != 0).any()
    for split in ([[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2, 0], [3, 1]]):
        other, gradients = update(split)
        assert other == pytest.approx(total, rel=1e-12)
        assert torch.equal(gradients, steep)


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_s_parts_are_found_and_set(name: str) -> None:
    config = configured(name)
    found = {kind: resolve(kind, config) for kind in REGISTRY}
    assert {kind: function.func.__name__ for kind, function in found.items()} == {  # type: ignore[attr-defined]
        kind: getattr(config, kind) for kind in REGISTRY
    }
    log_probs = draws(11)
    further = {"sequences": all_trained(LENGTHS)} if requirements(config).sequences else {}
    assert found["policy_loss"](log_probs, log_probs, log_probs, **further).shape == (11,)
    assert len(found["aggregation"](LENGTHS)) == 4


def test_settings_reach_the_functions() -> None:
    outcomes = AdvantageInputs(numbers(1.0, 0.0).view(1, 2), torch.tensor([[1, 2]]), torch.zeros(3))
    config = configured("cale", cale_alpha=0.5, cale_mu=1.0)
    assert (
        resolve("advantage", config)(outcomes).tolist() == advantages.cale(outcomes, cale_alpha=0.5, cale_mu=1).tolist()
    )
    config = configured("dr_grpo", token_divisor=8.0)
    assert resolve("aggregation", config)([2]) == aggregation.sequence_sum([2], token_divisor=8.0)


def thirds(lengths: list[int], *, share: float) -> list[float]:
    """An aggregation of one's own."""
    return [share] * len(lengths)


def test_a_function_of_one_s_own_is_found_by_its_path_with_its_own_keywords() -> None:
    path = f"{__name__}.thirds"
    assert resolve("kl_estimator", configured(kl_estimator="recipes.algorithms.kl.k2")).func is kl.k2  # type: ignore[attr-defined]
    assert resolve("aggregation", configured(aggregation=path, kwargs={"share": 0.3}))([2]) == [0.3]
    with pytest.raises(ConfigError, match=r"thirds': needs 'share'; give algorithm\.kwargs\.share"):
        resolve("aggregation", configured(aggregation=path))


@pytest.mark.parametrize("chosen", ["ppo", "no_such_package.loss", "recipes.algorithms.kl.k4", "k4."])
def test_an_unknown_function_is_told_with_the_known_ones(chosen: str) -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.kl_estimator='.*': no such function; use one of k1, k2, k3 or"):
        resolve("kl_estimator", configured(kl_estimator=chosen))


def test_a_forced_token_counts_in_no_measure() -> None:
    """Its recorded log-prob is 0, which is nobody's; its weight is 0 (``aggregation.token_weights``)."""
    config = configured(importance_sampling="token_truncated", kl_coefficient=0.1)
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    batch.values["loss_mask"][4], batch.values["weights"][4] = 0.0, 0.0
    found = []
    for recorded in (0.0, -7.0):
        batch.values["logprobs"][4] = recorded
        value, measured = objective.loss(config, None)(outputs(now), batch)
        found.append((value.item(), {name: float(number) for name, number in measured.items()}))
    assert found[0] == found[1]
    batch.values["loss_mask"][4] = 1.0
    assert objective.loss(config, None)(outputs(now), batch)[1]["kl/reference"] > found[0][1]["kl/reference"]


@needs(values=True)
def returns_minus_values(inputs: AdvantageInputs) -> Tensor:
    """An advantage of one's own that wants a critic."""
    assert inputs.values is not None
    return inputs.rewards.flatten().repeat_interleave(inputs.lengths.flatten()) - inputs.values


@needs(reference=True)
def pull_to_reference(log_probs: Tensor, old: Tensor, advantages: Tensor, reference: Tensor) -> Tensor:
    """A policy loss of one's own that wants the reference's log-probs."""
    return -advantages * log_probs + (log_probs - reference) ** 2


def test_a_run_has_what_its_parts_need() -> None:
    assert requirements(configured()) == Needs(reference=True)
    assert requirements(configured(kl_coefficient=0.0)) == Needs()
    assert requirements(configured("ppo")) == Needs(values=True, reference=True)
    assert requirements(configured("gspo")) == Needs(sequences=True)
    own = configured(kl_coefficient=0.0, advantage=f"{__name__}.returns_minus_values")
    assert requirements(own) == Needs(values=True)
    own = configured(kl_coefficient=0.0, policy_loss=f"{__name__}.pull_to_reference")
    assert requirements(own) == Needs(reference=True)


def test_without_a_reference_the_loss_reads_none_and_measures_no_kl() -> None:
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    with_reference = objective.loss(configured(), None)(outputs(now), batch)[1]
    del batch.values["reference"]
    value, measured = objective.loss(configured(kl_coefficient=0.0), None)(outputs(now), batch)
    assert value.isfinite()
    assert set(with_reference) - set(measured) == {"kl/reference"}


def test_a_loss_of_one_s_own_gets_the_reference_that_it_needs() -> None:
    config = configured(kl_coefficient=0.0, policy_loss=f"{__name__}.pull_to_reference")
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    v = batch.values
    expected = (pull_to_reference(now, v["old"], v["advantages"], v["reference"]) * v["weights"]).sum()
    assert objective.loss(config, None)(outputs(now), batch)[0].item() == pytest.approx(expected.item())


# ---- the metrics of an update

MASK = [True, False, True, True, True, True, True, False, True, True, False]  # of 3, 1, 5 and 2 tokens


def reported(config: AlgorithmConfig, split: list[list[int]], entropies: Tensor) -> dict[str, float]:
    """What is reported of the packed sequences, whose trained tokens are ``MASK``'s."""
    total: dict[str, float] = {}
    for batch, now in zip(*micro_batches(split), strict=True):
        batch.values["loss_mask"] = torch.tensor(MASK)[batch.places].double()
        batch.values["weights"] *= batch.values["loss_mask"]
        batch.values["logprobs"] *= batch.values["loss_mask"]  # as forced tokens are recorded
        sums = objective.loss(config, None)(outputs(now, entropies[batch.places]), batch)[1]
        forward_backward.add_metrics(total, {name: float(value) for name, value in sums.items()})
    return objective.report(total)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[3, 1], [0, 2]]])
def test_metrics_are_means_over_the_trained_tokens_of_all_micro_batches(split: list[list[int]]) -> None:
    """Each written again with NumPy; the entropies are given."""
    entropies = draws(11, 9).abs()
    config = configured(importance_sampling="icepop", icepop_low=0.8, icepop_high=1.5, clip_low=0.05)
    found = reported(config, split, entropies)
    (batch,), (at,) = micro_batches([[0, 1, 2, 3]])
    v = {name: value.numpy()[MASK] for name, value in batch.values.items()}
    now = at.numpy()[MASK]
    ratio, advantages = np.exp(now - v["old"]), v["advantages"]
    low, high = (ratio < 0.95) & (advantages < 0), (ratio > 1.2) & (advantages > 0)
    correction = np.exp(v["old"] - v["logprobs"])
    outside = (correction < 0.8) | (correction > 1.5)
    assert all(0 < x.mean() < 1 for x in (low, high, outside))
    to_reference = v["reference"] - now
    expected = {
        "clip_fraction/low": low.mean(),
        "clip_fraction/high": high.mean(),
        # Schulman's k3 with samples of the old policy: E_old[r − 1 − ln r] = KL(old ‖ policy).
        "kl/old": (ratio - 1 - np.log(ratio)).mean(),
        "kl/reference": (np.exp(to_reference) - to_reference - 1).mean(),
        "perplexity/policy": np.exp(-v["old"].mean()),
        "perplexity/sampler": np.exp(-v["logprobs"].mean()),
        "entropy": entropies.numpy()[MASK].mean(),
        "train_inference_mismatch/left_out": outside.mean(),
        "train_inference_mismatch/mean": np.abs(v["old"] - v["logprobs"]).mean(),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)


def test_clip_fractions_count_what_a_loss_clips() -> None:
    """CISPO bounds a weight of either sign's; GSPO and sequence-level CPGD clip whole sequences; REINFORCE clips
    nothing, and so has none."""
    (batch,), (at,) = micro_batches([[0, 1, 2, 3]])
    log_ratio = (at - batch.values["old"]).numpy()
    advantages = batch.values["advantages"].numpy()
    mask = np.array(MASK)
    ends = np.cumsum(LENGTHS)
    means = [log_ratio[end - n : end][mask[end - n : end]].mean() for end, n in zip(ends, LENGTHS, strict=True)]
    of_sequences = np.repeat(means, LENGTHS)
    for name, signed, used in (
        ("ppo_clip", True, log_ratio),
        ("cpgd", True, log_ratio),
        ("cispo", False, log_ratio),
        ("gspo", True, of_sequences),
        ("cpgd_sequence", True, of_sequences),
    ):
        found = reported(configured(policy_loss=name, clip_low=0.05, clip_high=0.05), [[0, 1, 2, 3]], draws(11))
        low, high = np.exp(used) < 0.95, np.exp(used) > 1.05
        if signed:
            low, high = low & (advantages < 0), high & (advantages > 0)
        expected = [low[mask].mean(), high[mask].mean()]
        assert [found["clip_fraction/low"], found["clip_fraction/high"]] == expected and any(expected), name
    assert not any(name.startswith("clip") for name in reported(configured(policy_loss="reinforce"), [[0]], draws(11)))


def test_before_the_first_update_nothing_is_clipped_and_the_old_policy_is_the_policy() -> None:
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    del batch.values["old"]
    sums = objective.loss(configured(), None)(outputs(now), batch)[1]
    found = objective.report({name: float(value) for name, value in sums.items()})
    assert (found["clip_fraction/low"], found["clip_fraction/high"], found["kl/old"]) == (0, 0, 0)


def test_an_update_without_a_trained_token_reports_nothing() -> None:
    (batch,), (now,) = micro_batches([[0, 1, 2, 3]])
    batch.values["loss_mask"] *= 0
    batch.values["weights"] *= 0
    value, sums = objective.loss(configured(), None)(outputs(now), batch)
    assert value.item() == 0
    assert objective.report({name: float(number) for name, number in sums.items()}) == {}
