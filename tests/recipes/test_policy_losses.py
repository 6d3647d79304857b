"""Policy losses against closed forms and finite differences; sequence-level ones also across context-parallel ranks."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from recipes.algorithms import policy_losses
from recipes.algorithms.aggregation import sequence_mean_token_mean
from recipes.algorithms.sequences import Sequences
from tests.recipes.gradients import all_trained, draws, finite_differences, gradient, numbers

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
DRIFT = {"drift_coefficient": 0.1, "drift_cap": 0.2}

Loss = Callable[[Tensor, Tensor, Tensor, Sequences], Tensor]
LOSSES: dict[str, Loss] = {
    "reinforce": lambda *a: policy_losses.reinforce(*a[:3]),
    "ppo_clip": lambda *a: policy_losses.ppo_clip(*a[:3], **CLIP),
    "cispo": lambda *a: policy_losses.cispo(*a[:3], **CLIP),
    "ppo_dual_clip": lambda *a: policy_losses.ppo_dual_clip(*a[:3], **CLIP, dual_clip=3.0),
    "gspo": lambda *a: policy_losses.gspo(*a, **CLIP),
    "cpgd": lambda *a: policy_losses.cpgd(*a[:3], **CLIP, **DRIFT),
    "cpgd_sequence": lambda *a: policy_losses.cpgd_sequence(*a, **CLIP, **DRIFT),
}
BY_NAME = pytest.mark.parametrize("name", LOSSES)
LENGTHS = [3, 1, 5, 2]


def loss(name: str, log_probs: Tensor, old: Tensor, advantages: Tensor, lengths: list[int] | None = None) -> Tensor:
    return LOSSES[name](log_probs, old, advantages, all_trained(lengths or [len(log_probs)]))


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs, advantages (one for each sequence) of ``LENGTHS``: in and out of every clip."""
    old = draws(11, seed) - 2
    advantages = draws(4, seed + 1).repeat_interleave(torch.tensor(LENGTHS))
    shifts = numbers(0.05, -0.6, 0.5, -0.1).repeat_interleave(torch.tensor(LENGTHS))
    return old + shifts + 0.3 * draws(11, seed + 2), old, advantages


# ---- closed forms


def test_the_clipped_loss() -> None:
    """Ratios 0.5, 1, 2 with both signs of the advantage, clipped at 0.8 and 1.3: −min(r A, clip(r) A)."""
    ratios, advantages = numbers(0.5, 1, 2, 0.5, 1, 2), numbers(3, 3, 3, -3, -3, -3)
    found = loss("ppo_clip", ratios.log(), torch.zeros(6), advantages)
    assert found.tolist() == pytest.approx([-1.5, -3.0, -3.9, 2.4, 3.0, 6.0])


def test_the_dual_clipped_loss_bounds_what_a_bad_sample_costs() -> None:
    """c = 3: at a ratio of 10 with A = −1 the loss is 3 and not 10; good samples and mild ratios are as before."""
    ratios, advantages = numbers(10, 2, 10, 0.5), numbers(-1, -1, 1, -1)
    found = loss("ppo_dual_clip", ratios.log(), torch.zeros(4), advantages)
    assert found.tolist() == pytest.approx([3, 2, -1.3, 0.8])
    steep = gradient(lambda x: loss("ppo_dual_clip", x, torch.zeros(4), advantages).sum(), ratios.log())
    assert steep.tolist() == pytest.approx([0, 2, 0, 0])


def test_the_cispo_loss_bounds_the_weight_of_each_token_and_drops_none() -> None:
    """−stopgrad(clip(r, 0.8, 1.3)) A ln π, written again with NumPy; its gradient is −clip(r) A where r is clipped
    too."""
    log_probs, old, advantages = case()
    ratio = np.exp(log_probs.numpy() - old.numpy())
    weight = np.minimum(np.maximum(ratio, 0.8), 1.3)
    assert (ratio < 0.8).any() and (ratio > 1.3).any()
    found = loss("cispo", log_probs, old, advantages)
    assert found.tolist() == pytest.approx((-weight * advantages.numpy() * log_probs.numpy()).tolist(), rel=1e-12)
    steep = gradient(lambda x: loss("cispo", x, old, advantages).sum(), log_probs)
    assert steep.tolist() == pytest.approx((-weight * advantages.numpy()).tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "cpgd"])
def test_a_low_clip_of_one_is_no_lower_bound(name: str) -> None:
    function = getattr(policy_losses, name)
    drift = {"drift_coefficient": 0.0, "drift_cap": 1.0} if name == "cpgd" else {}
    at, old, advantages = numbers(-20.0).requires_grad_(), numbers(0.0), numbers(-1.0)
    value = function(at, old, advantages, clip_low=1.0, clip_high=0.2, **drift)
    unclipped = {"ppo_clip": math.exp(-20), "cispo": -20 * math.exp(-20), "cpgd": -20.0}[name]
    assert value.item() == pytest.approx(unclipped)


@pytest.mark.parametrize("name", ["gspo", "cpgd_sequence"])
def test_tokens_that_are_not_trained_on_have_no_part_in_a_sequences_ratio(name: str) -> None:
    """The trained tokens' losses are those of the sequences without the others, bit for bit."""
    log_probs, old, advantages = case()
    mask = torch.tensor([True, False, True, True, False, True, True, False, True, False, False])
    everywhere = LOSSES[name](log_probs, old, advantages, Sequences(LENGTHS, mask))
    assert everywhere.isfinite().all(), "a weight of 0 makes no number of what is none"
    lengths = [int(part.sum()) for part in mask.split(LENGTHS)]
    assert lengths == [2, 1, 3, 0]
    expected = LOSSES[name](log_probs[mask], old[mask], advantages[mask], all_trained(lengths))
    assert torch.equal(everywhere[mask], expected)


def test_the_gspo_loss_clips_by_the_geometric_mean_of_the_ratios() -> None:
    """Ratios 4 and 1/4 have the mean 1, ratios 2 and 8 the mean 4: clipped for A > 0, not for A < 0."""
    ratios, advantages = numbers(4, 0.25, 2, 8, 2, 8), numbers(1, 1, 1, 1, -1, -1)
    found = loss("gspo", ratios.log(), torch.zeros(6), advantages, [2, 2, 2])
    assert found.tolist() == pytest.approx([-1, -1, -1.3, -1.3, 4, 4])


def test_the_cpgd_loss() -> None:
    """Ratios 1/2, 1, 2: −min(l A, clip(l) A) + 0.1 min(r − 1, 0.2) l, with l = ln r clipped at ln 0.8 and ln 1.3."""
    ratios, advantages = numbers(0.5, 1, 2, 0.5, 1, 2), numbers(3, 3, 3, -3, -3, -3)
    low, high, two = math.log(0.8), math.log(1.3), math.log(2)
    surrogate = [3 * two, 0, -3 * high, -3 * -low, 0, 3 * two]
    drift = [0.5 * two, 0, 0.2 * two] * 2
    expected = [s + 0.1 * d for s, d in zip(surrogate, drift, strict=True)]
    assert loss("cpgd", ratios.log(), torch.zeros(6), advantages).tolist() == pytest.approx(expected)


# ---- gradients


def fixed(name: str, at: Tensor, old: Tensor, lengths: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss whose true derivative autograd's should be: what the source cuts out of the gradient is held at ``at``.

    GSPO and sequence-level CPGD: the sequence's own term (one ratio a sequence) times its tokens' share. CISPO's weight
    and the drift's factor are constants.
    """
    from_one = {"gspo": "ppo_clip", "cpgd_sequence": "cpgd"}
    factor = (at - old).expm1().clamp(max=DRIFT["drift_cap"])
    weight = (at - old).exp().clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])

    def total(x: Tensor, advantages: Tensor) -> Tensor:
        log_ratio = x - old
        if name in from_one:
            means = torch.stack([part.mean() for part in log_ratio.split(lengths)])
            log_ratio = means.repeat_interleave(torch.tensor(lengths))
        zeros = torch.zeros_like(x)
        if name == "cispo":
            return -weight * advantages * x
        if not name.startswith("cpgd"):
            token_level = from_one.get(name, name)
            return LOSSES[token_level](x if name == "reinforce" else log_ratio, zeros, advantages, all_trained(lengths))
        surrogate = policy_losses.cpgd(log_ratio, zeros, advantages, **CLIP, drift_coefficient=0.0, drift_cap=0.0)
        return surrogate + DRIFT["drift_coefficient"] * factor * (x - old)

    return total


@BY_NAME
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_that_of_finite_differences(name: str, seed: int) -> None:
    """Of the sequence mean of token means, whose weights the sequence-level losses are made for."""
    log_probs, old, advantages = case(seed)
    weights = numbers(*sequence_mean_token_mean(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    held = fixed(name, log_probs, old, LENGTHS)
    found = gradient(lambda x: (loss(name, x, old, advantages, LENGTHS) * weights).sum(), log_probs)
    expected = finite_differences(lambda x: (held(x, advantages) * weights).sum(), log_probs)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-8)
    assert (found != 0).any()


@BY_NAME
def test_with_one_update_the_gradient_is_the_policy_gradient(name: str) -> None:
    """Where the sampling policy is the one that is updated: −A ∇ ln π, for every one of them."""
    log_probs, _, advantages = case()
    found = gradient(lambda x: loss(name, x, x.detach(), advantages, LENGTHS).sum(), log_probs)
    assert found.tolist() == pytest.approx((-advantages).tolist(), rel=1e-12)


def test_the_clipped_gradient_is_zero_where_clipped_and_minus_the_ratio_times_the_advantage_elsewhere() -> None:
    ratios, advantages = numbers(0.5, 0.9, 1.1, 2, 0.5, 0.9, 1.1, 2), numbers(*[1.5] * 4, *[-1.5] * 4)
    found = gradient(lambda x: loss("ppo_clip", x, torch.zeros(8), advantages).sum(), ratios.log())
    assert found.tolist() == pytest.approx([-0.75, -1.35, -1.65, 0, 0, 1.35, 1.65, 3.0])


def test_inside_the_clip_cpgd_is_the_policy_gradient_and_its_drift_pulls_back() -> None:
    """−A + α min(r − 1, c), whatever the ratio multiplies in PPO; outside, only the drift stays."""
    ratios, advantages = numbers(0.9, 1.1, 1.25, 2, 0.5), numbers(1.5, 1.5, -1.5, 1.5, -1.5)
    found = gradient(lambda x: loss("cpgd", x, torch.zeros(5), advantages).sum(), ratios.log())
    assert found.tolist() == pytest.approx(
        [-1.5 + 0.1 * -0.1, -1.5 + 0.1 * 0.1, 1.5 + 0.1 * 0.2, 0.1 * 0.2, 0.1 * -0.5]
    )


def test_the_drift_is_zero_where_both_policies_agree_and_else_positive() -> None:
    at = draws(1000, 3)

    def drift(x: Tensor, old: Tensor) -> Tensor:
        return policy_losses.cpgd(x, old, torch.zeros(1000), **CLIP, drift_coefficient=1.0, drift_cap=2)

    assert torch.equal(drift(at, at), torch.zeros_like(at))
    assert (drift(at, draws(1000, 4)) > 0).all()


# ---- identities


@pytest.mark.parametrize(("of_sequences", "of_tokens"), [("gspo", "ppo_clip"), ("cpgd_sequence", "cpgd")])
def test_for_sequences_of_one_token_both_levels_are_the_same(of_sequences: str, of_tokens: str) -> None:
    log_probs, old, advantages = case()
    ones = [1] * 11

    def total(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: loss(name, x, old, advantages, ones).sum()

    found, expected = loss(of_sequences, log_probs, old, advantages, ones), loss(of_tokens, log_probs, old, advantages)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert gradient(total(of_sequences), log_probs).tolist() == pytest.approx(
        gradient(total(of_tokens), log_probs).tolist(), rel=1e-12
    )


def test_without_a_ratio_above_the_dual_clip_both_clips_are_the_same() -> None:
    log_probs, old, advantages = case()
    assert torch.equal(loss("ppo_dual_clip", log_probs, old, advantages), loss("ppo_clip", log_probs, old, advantages))


def test_the_gradient_in_the_logits_is_the_score_function() -> None:
    """d loss / d logits = −A (onehot(sample) − softmax)."""
    logits, sample, advantage = draws(12, 11), 4, numbers(1.7)
    expected = -advantage * (torch.nn.functional.one_hot(torch.tensor(sample), 12) - logits.softmax(0))

    def total(x: Tensor) -> Tensor:
        log_prob = x.log_softmax(0)[sample : sample + 1]
        return loss("ppo_clip", log_prob, log_prob.detach(), advantage).sum()

    assert gradient(total, logits).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# ---- what the loss may not depend on


def by_sequence(name: str, micro_batches: list[list[int]]) -> dict[int, list[tuple[float, float]]]:
    """Sequence → (loss, gradient) of each token, where the sequences are packed like this."""
    log_probs, old, advantages = (x.split(LENGTHS) for x in case())
    found = {}
    for indices in micro_batches:
        lengths = [LENGTHS[i] for i in indices]
        x, o, a = (torch.cat([values[i] for i in indices]) for values in (log_probs, old, advantages))
        value = loss(name, x, o, a, lengths)
        steep = gradient(lambda y, o=o, a=a, lengths=lengths: loss(name, y, o, a, lengths).sum(), x)  # type: ignore[misc]
        parts = zip(indices, value.split(lengths), steep.split(lengths), strict=True)
        found |= {i: list(zip(v.tolist(), g.tolist(), strict=True)) for i, v, g in parts}
    return found


@BY_NAME
@pytest.mark.parametrize("micro_batches", [[[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2, 0], [1, 3]]])
def test_order_packing_and_the_micro_batch_split_change_no_bit(name: str, micro_batches: list[list[int]]) -> None:
    assert by_sequence(name, micro_batches) == by_sequence(name, [[0, 1, 2, 3]])


# Each sequence's tokens on two context-parallel ranks: of the second, rank 1 has none.
PARTS = [[[0, 2], [3], [4, 7, 8], [9]], [[1], [], [5, 6], [10]]]


def context_rank(rank: int, folder: Path) -> None:
    """One of two ranks: the losses and gradients of its part of the tokens, and the sums over whole sequences."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    places = torch.tensor([place for part in PARTS[rank] for place in part])
    log_probs, old, advantages = (x[places] for x in case())
    sequences = all_trained([len(part) for part in PARTS[rank]], dist.group.WORLD)
    found = {}
    for name, function in LOSSES.items():
        x = log_probs.clone().requires_grad_()
        value = function(x, old, advantages, sequences)
        value.sum().backward()
        found[name] = (value.detach(), x.grad)
    sums = {"least": sequences.minimum(log_probs), "lengths": sequences.total_lengths()}
    torch.save((places, found, sums), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_context_parallel_ranks_that_share_a_sequence_get_the_whole_sequence_s_ratio(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(context_rank, (tmp_path,), nprocs=2)
    log_probs, old, advantages = case()
    for rank in range(2):
        places, found, sums = torch.load(tmp_path / f"rank{rank}.pt")
        for name, (value, steep) in found.items():
            whole = loss(name, log_probs, old, advantages, LENGTHS)
            expected = gradient(lambda x, name=name: loss(name, x, old, advantages, LENGTHS).sum(), log_probs)  # type: ignore[misc]
            assert value.tolist() == pytest.approx(whole[places].tolist(), rel=1e-12)
            assert steep.tolist() == pytest.approx(expected[places].tolist(), rel=1e-12)
        assert sums["lengths"].tolist() == LENGTHS
        assert sums["least"].tolist() == [part.min().item() for part in log_probs.split(LENGTHS)]
