"""Policy losses equal closed forms and finite differences; sequence-level ones also across context-parallel ranks."""

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
from tests.recipes.gradients import all_trained, draws, finite_differences, gradient, numbers, sequences

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
DRIFT = {"drift_coefficient": 0.1, "drift_cap": 0.2}

# (log-probs, old log-probs, advantages, sequences) → each token's loss
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
    """Each token's loss. Without ``lengths`` the tokens are one sequence."""
    return LOSSES[name](log_probs, old, advantages, all_trained(lengths or [len(log_probs)]))


def loss_gradient(
    name: str, log_probs: Tensor, old: Tensor, advantages: Tensor, lengths: list[int] | None = None
) -> Tensor:
    """Autograd's gradient of the summed loss in ``log_probs``."""
    return gradient(lambda x: loss(name, x, old, advantages, lengths).sum(), log_probs)


def case(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs, old log-probs and advantages of the tokens of sequences of ``LENGTHS``.

    All tokens of a sequence have one advantage. Ratios lie inside and outside of every clip.
    """
    lengths = torch.tensor(LENGTHS)
    old = draws(11, seed) - 2
    advantages = draws(4, seed + 1).repeat_interleave(lengths)
    sequence_shifts = numbers(0.05, -0.6, 0.5, -0.1).repeat_interleave(lengths)
    token_shifts = 0.3 * draws(11, seed + 2)
    return old + sequence_shifts + token_shifts, old, advantages


# ---- closed forms


def test_the_clipped_loss() -> None:
    """Ratios 0.5, 1, 2 with both signs of the advantage, clipped at 0.8 and 1.3: −min(r A, clip(r) A)."""
    ratios = numbers(0.5, 1, 2, 0.5, 1, 2)
    advantages = numbers(3, 3, 3, -3, -3, -3)
    losses = loss("ppo_clip", ratios.log(), torch.zeros(6), advantages)
    assert losses.tolist() == pytest.approx([-1.5, -3.0, -3.9, 2.4, 3.0, 6.0])


def test_the_dual_clipped_loss_bounds_what_a_bad_sample_costs() -> None:
    """c = 3: at a ratio of 10 with A = −2 the loss is 6 and not 20. Elsewhere it is the clipped loss."""
    ratios = numbers(10, 2, 10, 0.5)
    advantages = numbers(-2, -2, 2, -2)
    losses = loss("ppo_dual_clip", ratios.log(), torch.zeros(4), advantages)
    assert losses.tolist() == pytest.approx([6, 4, -2.6, 1.6])
    by_autograd = loss_gradient("ppo_dual_clip", ratios.log(), torch.zeros(4), advantages)
    assert by_autograd.tolist() == pytest.approx([0, 4, 0, 0])


def test_the_cispo_loss_bounds_the_weight_of_each_token_and_drops_none() -> None:
    """−stopgrad(clip(r, 0.8, 1.3)) A ln π, written again with NumPy; its gradient is −clip(r) A where r is clipped
    too."""
    log_probs, old, advantages = case()
    ratio = np.exp(log_probs.numpy() - old.numpy())
    weight = np.minimum(np.maximum(ratio, 0.8), 1.3)
    assert (ratio < 0.8).any() and (ratio > 1.3).any()
    expected_gradient = -weight * advantages.numpy()
    expected_losses = expected_gradient * log_probs.numpy()
    losses = loss("cispo", log_probs, old, advantages)
    assert losses.tolist() == pytest.approx(expected_losses.tolist(), rel=1e-12)
    by_autograd = loss_gradient("cispo", log_probs, old, advantages)
    assert by_autograd.tolist() == pytest.approx(expected_gradient.tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["ppo_clip", "cispo", "cpgd"])
def test_a_low_clip_of_one_is_no_lower_bound(name: str) -> None:
    """A token whose ratio is exp(−20), with A = −1."""
    function = getattr(policy_losses, name)
    drift = {"drift_coefficient": 0.0, "drift_cap": 1.0} if name == "cpgd" else {}
    log_probs = numbers(-20.0).requires_grad_()
    token_loss = function(log_probs, numbers(0.0), numbers(-1.0), clip_low=1.0, clip_high=0.2, **drift)
    unclipped = {"ppo_clip": math.exp(-20), "cispo": -20 * math.exp(-20), "cpgd": -20.0}
    assert token_loss.item() == pytest.approx(unclipped[name])


@pytest.mark.parametrize("name", ["gspo", "cpgd_sequence"])
def test_tokens_that_are_not_trained_on_have_no_part_in_a_sequences_ratio(name: str) -> None:
    """The trained tokens' losses are those of the sequences without the other tokens, bit for bit. The others' losses
    are finite, because NaN and infinity times a weight of 0 are NaN."""
    log_probs, old, advantages = case()
    mask = torch.tensor([True, False, True, True, False, True, True, False, True, False, False])
    losses = LOSSES[name](log_probs, old, advantages, sequences(LENGTHS, mask))
    assert losses.isfinite().all()
    trained_lengths = [int(sequence_mask.sum()) for sequence_mask in mask.split(LENGTHS)]
    assert trained_lengths == [2, 1, 3, 0]
    expected = LOSSES[name](log_probs[mask], old[mask], advantages[mask], all_trained(trained_lengths))
    assert torch.equal(losses[mask], expected)


def test_the_gspo_loss_clips_by_the_geometric_mean_of_the_ratios() -> None:
    """Ratios 4 and 1/4 have the mean 1. Ratios 2 and 8 have the mean 4, which is clipped for A > 0, not for A < 0."""
    ratios = numbers(4, 0.25, 2, 8, 2, 8)
    advantages = numbers(1, 1, 1, 1, -1, -1)
    losses = loss("gspo", ratios.log(), torch.zeros(6), advantages, [2, 2, 2])
    assert losses.tolist() == pytest.approx([-1, -1, -1.3, -1.3, 4, 4])


def test_the_cpgd_loss() -> None:
    """Ratios 1/2, 1, 2: −min(l A, clip(l) A) + 0.1 min(r − 1, 0.2) l, with l = ln r clipped at ln 0.8 and ln 1.3."""
    ratios = numbers(0.5, 1, 2, 0.5, 1, 2)
    advantages = numbers(3, 3, 3, -3, -3, -3)
    low = math.log(0.8)
    high = math.log(1.3)
    two = math.log(2)
    surrogate = np.array([3 * two, 0, -3 * high, -3 * -low, 0, 3 * two])
    drift = np.array([0.5 * two, 0, 0.2 * two] * 2)
    losses = loss("cpgd", ratios.log(), torch.zeros(6), advantages)
    assert losses.tolist() == pytest.approx((surrogate + 0.1 * drift).tolist())


# ---- gradients


def with_constants(name: str, at: Tensor, old: Tensor, lengths: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """(log-probs, advantages) → the loss whose true derivative at ``at`` is the gradient that autograd should give.

    What a loss detaches from its gradient is a constant here, computed at ``at``: CISPO's weight and the factor of
    CPGD's drift. GSPO and sequence-level CPGD are their token-level loss of the sequence's mean log-ratio.
    """
    token_level = {"gspo": "ppo_clip", "cpgd_sequence": "cpgd"}
    ratio = (at - old).exp()
    cispo_weight = ratio.clamp(1 - CLIP["clip_low"], 1 + CLIP["clip_high"])
    drift_factor = (ratio - 1).clamp(max=DRIFT["drift_cap"])

    def losses(log_probs: Tensor, advantages: Tensor) -> Tensor:
        log_ratio = log_probs - old
        if name in token_level:
            means = torch.stack([part.mean() for part in log_ratio.split(lengths)])
            log_ratio = means.repeat_interleave(torch.tensor(lengths))
        zeros = torch.zeros_like(log_probs)
        if name == "cispo":
            return -cispo_weight * advantages * log_probs
        if name == "reinforce":
            return policy_losses.reinforce(log_probs, zeros, advantages)
        if name in ("cpgd", "cpgd_sequence"):
            surrogate = policy_losses.cpgd(log_ratio, zeros, advantages, **CLIP, drift_coefficient=0.0, drift_cap=0.0)
            return surrogate + DRIFT["drift_coefficient"] * drift_factor * (log_probs - old)
        return loss(token_level.get(name, name), log_ratio, zeros, advantages, lengths)

    return losses


@BY_NAME
@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_is_that_of_finite_differences(name: str, seed: int) -> None:
    """Of the sequence mean of token means: sequence-level losses are defined for its weights."""
    log_probs, old, advantages = case(seed)
    weights = numbers(*sequence_mean_token_mean(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    reference = with_constants(name, log_probs, old, LENGTHS)
    by_autograd = gradient(lambda x: (loss(name, x, old, advantages, LENGTHS) * weights).sum(), log_probs)
    by_differences = finite_differences(lambda x: (reference(x, advantages) * weights).sum(), log_probs)
    assert by_autograd.tolist() == pytest.approx(by_differences.tolist(), abs=1e-8)
    assert (by_autograd != 0).any()


@BY_NAME
def test_with_one_update_the_gradient_is_the_policy_gradient(name: str) -> None:
    """Where the policy that is updated is the one that sampled, every loss has the gradient −A ∇ ln π."""
    log_probs, _, advantages = case()
    by_autograd = gradient(lambda x: loss(name, x, x.detach(), advantages, LENGTHS).sum(), log_probs)
    assert by_autograd.tolist() == pytest.approx((-advantages).tolist(), rel=1e-12)


def test_the_clipped_gradient_is_zero_where_clipped_and_minus_the_ratio_times_the_advantage_elsewhere() -> None:
    ratios = numbers(0.5, 0.9, 1.1, 2, 0.5, 0.9, 1.1, 2)
    advantages = numbers(1.5, 1.5, 1.5, 1.5, -1.5, -1.5, -1.5, -1.5)
    by_autograd = loss_gradient("ppo_clip", ratios.log(), torch.zeros(8), advantages)
    assert by_autograd.tolist() == pytest.approx([-0.75, -1.35, -1.65, 0, 0, 1.35, 1.65, 3.0])


def test_inside_the_clip_cpgd_is_the_policy_gradient_and_its_drift_pulls_back() -> None:
    """The gradient is −A + α min(r − 1, c), and not r times that of PPO. Outside the clip only the drift's is left."""
    ratios = numbers(0.9, 1.1, 1.25, 2, 0.5)
    advantages = numbers(1.5, 1.5, -1.5, 1.5, -1.5)
    surrogate = np.array([-1.5, -1.5, 1.5, 0, 0])
    drift = np.array([-0.1, 0.1, 0.2, 0.2, -0.5])
    by_autograd = loss_gradient("cpgd", ratios.log(), torch.zeros(5), advantages)
    assert by_autograd.tolist() == pytest.approx((surrogate + 0.1 * drift).tolist())


def test_the_drift_is_zero_where_both_policies_agree_and_else_positive() -> None:
    log_probs = draws(1000, 3)

    def drift(log_probs: Tensor, old: Tensor) -> Tensor:
        return policy_losses.cpgd(log_probs, old, torch.zeros(1000), **CLIP, drift_coefficient=1.0, drift_cap=2)

    assert torch.equal(drift(log_probs, log_probs), torch.zeros_like(log_probs))
    assert (drift(log_probs, draws(1000, 4)) > 0).all()


# ---- identities


@pytest.mark.parametrize(("of_sequences", "of_tokens"), [("gspo", "ppo_clip"), ("cpgd_sequence", "cpgd")])
def test_for_sequences_of_one_token_both_levels_are_the_same(of_sequences: str, of_tokens: str) -> None:
    log_probs, old, advantages = case()
    lengths = [1] * 11
    sequence_losses = loss(of_sequences, log_probs, old, advantages, lengths)
    token_losses = loss(of_tokens, log_probs, old, advantages, lengths)
    assert sequence_losses.tolist() == pytest.approx(token_losses.tolist(), rel=1e-12)
    sequence_gradient = loss_gradient(of_sequences, log_probs, old, advantages, lengths)
    token_gradient = loss_gradient(of_tokens, log_probs, old, advantages, lengths)
    assert sequence_gradient.tolist() == pytest.approx(token_gradient.tolist(), rel=1e-12)


def test_without_a_ratio_above_the_dual_clip_both_clips_are_the_same() -> None:
    log_probs, old, advantages = case()
    dual_clipped = loss("ppo_dual_clip", log_probs, old, advantages)
    clipped = loss("ppo_clip", log_probs, old, advantages)
    assert torch.equal(dual_clipped, clipped)


def test_the_gradient_in_the_logits_is_the_score_function() -> None:
    """d loss / d logits = −A (onehot(sample) − softmax)."""
    logits = draws(12, 11)
    sample = 4
    advantage = numbers(1.7)
    one_hot = torch.nn.functional.one_hot(torch.tensor(sample), 12)
    expected = -advantage * (one_hot - logits.softmax(0))

    def loss_of_logits(x: Tensor) -> Tensor:
        log_prob = x.log_softmax(0)[sample : sample + 1]
        return loss("ppo_clip", log_prob, log_prob.detach(), advantage).sum()

    assert gradient(loss_of_logits, logits).tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# ---- what the loss may not depend on


def by_sequence(name: str, micro_batches: list[list[int]]) -> dict[int, tuple[list[float], list[float]]]:
    """Sequence → the losses and the gradient of its tokens, where ``micro_batches`` are packed of these sequences."""
    by_column = [column.split(LENGTHS) for column in case()]
    result = {}
    for indices in micro_batches:
        lengths = [LENGTHS[i] for i in indices]
        log_probs, old, advantages = (torch.cat([column[i] for i in indices]) for column in by_column)
        losses = loss(name, log_probs, old, advantages, lengths).split(lengths)
        gradients = loss_gradient(name, log_probs, old, advantages, lengths).split(lengths)
        for i, sequence_losses, sequence_gradient in zip(indices, losses, gradients, strict=True):
            result[i] = (sequence_losses.tolist(), sequence_gradient.tolist())
    return result


@BY_NAME
@pytest.mark.parametrize("micro_batches", [[[3, 1, 0, 2]], [[0], [1], [2], [3]], [[2, 0], [1, 3]]])
def test_order_packing_and_the_micro_batch_split_change_no_bit(name: str, micro_batches: list[list[int]]) -> None:
    assert by_sequence(name, micro_batches) == by_sequence(name, [[0, 1, 2, 3]])


# The places of each sequence's tokens on two context-parallel ranks. Rank 1 has none of the second sequence.
PARTS = [[[0, 2], [3], [4, 7, 8], [9]], [[1], [], [5, 6], [10]]]


def context_rank(rank: int, folder: Path) -> None:
    """One of two ranks: it saves the losses and gradients of its tokens, and what it knows of whole sequences."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    places = torch.tensor([place for part in PARTS[rank] for place in part])
    log_probs, old, advantages = (column[places] for column in case())
    shared = all_trained([len(part) for part in PARTS[rank]], dist.group.WORLD)
    by_loss = {}
    for name, function in LOSSES.items():
        leaf = log_probs.clone().requires_grad_()
        losses = function(leaf, old, advantages, shared)
        losses.sum().backward()
        by_loss[name] = (losses.detach(), leaf.grad)
    torch.save((places, by_loss, shared.minimum(log_probs)), folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def test_context_parallel_ranks_that_share_a_sequence_get_the_whole_sequence_s_ratio(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(context_rank, (tmp_path,), nprocs=2)
    log_probs, old, advantages = case()
    for rank in range(2):
        places, by_loss, least = torch.load(tmp_path / f"rank{rank}.pt")
        for name, (losses, by_autograd) in by_loss.items():
            whole_losses = loss(name, log_probs, old, advantages, LENGTHS)
            whole_gradient = loss_gradient(name, log_probs, old, advantages, LENGTHS)
            assert losses.tolist() == pytest.approx(whole_losses[places].tolist(), rel=1e-12)
            assert by_autograd.tolist() == pytest.approx(whole_gradient[places].tolist(), rel=1e-12)
        assert least.tolist() == [part.min().item() for part in log_probs.split(LENGTHS)]
