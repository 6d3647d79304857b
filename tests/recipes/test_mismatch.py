"""Trainer against rollout: the report, the corrections and the alarm, on closed forms and on measured log-probs."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.algorithms import mismatch
from recipes.algorithms.sequences import Sequences
from tests.recipes.gradients import all_trained, draws, numbers

# Log-probs of 16 responses that SmolLM2-135M in BF16 sampled, and of the same tokens in one pass over the whole text:
# the same weights ("bf16"), the weights rounded to FP8 with one scale a tensor, and those of faulty weight syncs, which
# might be: in one layer the heads of V in another order, or gate and up exchanged; two layers exchanged.
MEASURED: dict[str, Any] = json.loads((Path(__file__).parent / "logprob_gaps.json").read_text())
ROLLOUT = numbers(*(x for row in MEASURED["rollout"] for x in row))
LENGTHS = [len(row) for row in MEASURED["rollout"]]


def measured(name: str) -> Tensor:
    return numbers(*(x for row in MEASURED["trainer"][name] for x in row))


def reported(
    trainer: Tensor, rollout: Tensor, lengths: list[int], split: list[list[int]] | None = None
) -> dict[str, float]:
    """The finished report of sequences in these micro-batches, added up as the trainer adds up its metrics."""
    total: dict[str, float] = {}
    for indices in split or [list(range(len(lengths)))]:
        t, r = (torch.cat([x.split(lengths)[i] for i in indices]) for x in (trainer, rollout))
        part = mismatch.sums(t, r, all_trained([lengths[i] for i in indices]), tis_cap=2.0)
        for name, value in part.items():
            before = total.get(name, -math.inf if name.endswith("/max") else 0.0)
            total[name] = max(before, value.item()) if name.endswith("/max") else before + value.item()
    return mismatch.report(total)


# ---- the report


def test_where_both_agree_nothing_is_reported_but_a_full_sample_size() -> None:
    found = reported(draws(20), draws(20), [5, 15])
    for name, value in found.items():
        assert value == (1.0 if "/ess" in name else 0.0), name


def test_the_report_of_known_ratios() -> None:
    """Trainer / rollout = 2.5, 1/2, 1, 1: Σw = 5, Σw² = 8.5."""
    ratios = numbers(2.5, 0.5, 1, 1)
    found = reported(ratios.log(), torch.zeros(4), [4])
    gap = math.log(2.5) + math.log(2)
    assert found["train_inference_mismatch/mean"] == pytest.approx(gap / 4)
    assert found["train_inference_mismatch/max"] == pytest.approx(math.log(2.5))
    assert found["train_inference_mismatch/k1"] == pytest.approx((math.log(2) - math.log(2.5)) / 4)
    assert found["train_inference_mismatch/k3"] == pytest.approx((5 - 4 - (math.log(2.5) - math.log(2))) / 4)
    assert found["train_inference_mismatch/clipped"] == 0.25
    assert found["train_inference_mismatch/ess"] == pytest.approx(25 / (4 * 8.5))


def test_k1_and_k3_estimate_the_divergence_of_the_trainer_from_the_rollout() -> None:
    """Their mean over the rollout's distribution is KL(rollout ‖ trainer), so tokens count as often as they come."""
    rollout, trainer = draws(8, 1).log_softmax(0), draws(8, 2).log_softmax(0)
    counts = (rollout.exp() * 1e5).round().long()
    exact = (rollout.exp() * (rollout - trainer)).sum().item()
    found = reported(trainer.repeat_interleave(counts), rollout.repeat_interleave(counts), [int(counts.sum())])
    assert found["train_inference_mismatch/k1"] == pytest.approx(exact, abs=1e-4)
    assert found["train_inference_mismatch/k3"] == pytest.approx(exact, abs=1e-4)


def test_each_length_has_its_bucket_and_buckets_without_a_response_are_left_out() -> None:
    """Responses of 64 and 65 tokens and one of 20,000: a mismatch in the longest only shows there."""
    lengths = [64, 65, 20_000]
    trainer = torch.cat([torch.zeros(129, dtype=torch.float64), torch.full((20_000,), -0.5, dtype=torch.float64)])
    found = reported(trainer, torch.zeros_like(trainer), lengths)
    means = {name: value for name, value in found.items() if name.startswith("train_inference_mismatch/mean/")}
    assert means == {
        "train_inference_mismatch/mean/to_64": 0,
        "train_inference_mismatch/mean/to_256": 0,
        "train_inference_mismatch/mean/over_16384": 0.5,
    }
    assert found["train_inference_mismatch/mean"] == pytest.approx(0.5 * 20_000 / 20_129)


def test_the_report_depends_on_neither_order_nor_micro_batches() -> None:
    straight = reported(measured("bf16"), ROLLOUT, LENGTHS)
    split = [[15, 3], [0], [7, 8, 9, 1], [2, 4, 5, 6], [14, 13, 12, 11, 10]]
    assert reported(measured("bf16"), ROLLOUT, LENGTHS, split) == pytest.approx(straight, rel=1e-12)


def test_a_rank_without_tokens_of_a_micro_batch_has_no_part_in_it() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    assert mismatch.sums(nothing, nothing, all_trained([0, 0]), tis_cap=2.0) == {}


def test_the_sums_are_made_in_fp64() -> None:
    """The trainer's log-probs are FP32, in which counting ends at 2^24 tokens."""
    ones = torch.zeros(10, dtype=torch.float32)
    found = mismatch.sums(ones, ones, all_trained([10]), tis_cap=2.0)
    assert all(value.dtype == torch.float64 for value in found.values())


# ---- corrections


def test_equal_log_probs_have_the_weight_one() -> None:
    same = draws(50)
    weights = mismatch.token_truncated(same, same, all_trained([50]), tis_cap=2.0)
    assert torch.equal(weights, torch.ones_like(same))


def test_a_weight_is_trainer_over_rollout_up_to_the_cap_and_has_no_gradient() -> None:
    """The other way round, a cap would hold back the tokens that the trainer likes less than the rollout did."""
    trainer = numbers(0.5, 0.1, 0.9).log().requires_grad_()
    weights = mismatch.token_truncated(trainer, numbers(0.25, 0.2, 0.1).log(), all_trained([3]), tis_cap=3.0)
    assert weights.tolist() == pytest.approx([2, 0.5, 3])
    assert not weights.requires_grad


def test_the_weighted_mean_over_rollout_samples_is_the_trainer_s_mean() -> None:
    """What importance sampling is for, exactly: the mean over the rollout's distribution, the cap out of reach."""
    rollout, trainer, score = draws(8, 1).log_softmax(0), draws(8, 2).log_softmax(0), draws(8, 3)
    weights = mismatch.token_truncated(trainer, rollout, all_trained([8]), tis_cap=1e9)
    assert (rollout.exp() * weights * score).sum().item() == pytest.approx((trainer.exp() * score).sum().item())


def test_the_weight_of_a_sequence_is_the_product_of_its_ratios_up_to_the_cap() -> None:
    """min(Π ρ, C) over trained tokens, written again with NumPy."""
    lengths = [3, 1, 5, 2]
    trainer, rollout = 0.4 * draws(11, 1), 0.4 * draws(11, 2)
    mask = torch.tensor([True, False, True, True, True, True, True, False, True, False, False])
    found = mismatch.sequence_truncated(trainer, rollout, Sequences(lengths, mask), tis_cap=1.5)
    ratio = np.where(mask.numpy(), np.exp(trainer.numpy()) / np.exp(rollout.numpy()), 1.0)
    ends = np.cumsum(lengths)
    products = [ratio[end - n : end].prod() for end, n in zip(ends, lengths, strict=True)]
    assert min(products) < 0.9 and max(products) > 1.5
    assert found.tolist() == pytest.approx(np.repeat(np.minimum(products, 1.5), lengths).tolist(), rel=1e-12)
    assert not mismatch.sequence_truncated(
        trainer.requires_grad_(), rollout, Sequences(lengths, mask), tis_cap=1.5
    ).requires_grad


def test_the_sequence_weighted_mean_over_rollout_samples_is_the_trainer_s_mean() -> None:
    """For a score of a sequence of two tokens, exactly: over all pairs, with the rollout's probabilities. The token
    weights do not have this property."""
    rollout, trainer = draws(6, 1).log_softmax(0), draws(6, 2).log_softmax(0)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    score = draws(36, 3)
    sequences = all_trained([2] * 36)
    weights = mismatch.sequence_truncated(
        trainer[pairs].flatten(), rollout[pairs].flatten(), sequences, tis_cap=math.inf
    )[::2]
    expected = (trainer[pairs].sum(1).exp() * score).sum()
    assert (rollout[pairs].sum(1).exp() * weights * score).sum().item() == pytest.approx(expected.item())


def test_icepop_keeps_the_ratio_within_its_bounds_and_drops_tokens_outside() -> None:
    """M(k; α, β) = k in [α, β], else 0: both bounds are inside."""
    ratios = [0.4999, 0.5, 1.0, 3.0, 5.0, 5.001, 0.0]
    log_ratios = torch.tensor([-math.inf if k == 0 else math.log(k) for k in ratios], dtype=torch.float64)
    trainer = log_ratios.requires_grad_()
    # exp(ln 5) may round beyond 5.
    low, high = math.exp(math.log(0.5)), math.exp(math.log(5.0))
    weights = mismatch.icepop(trainer, torch.zeros(7), all_trained([7]), icepop_low=low, icepop_high=high)
    expected = np.where((np.array(ratios) >= 0.5) & (np.array(ratios) <= 5), ratios, 0.0)
    assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert not weights.requires_grad


def test_without_importance_sampling_every_weight_is_one() -> None:
    assert torch.equal(mismatch.none(draws(5), draws(5, 1), all_trained([5])), torch.ones(5, dtype=torch.float64))


def test_tokens_that_are_not_trained_on_count_in_no_sum_and_no_mask() -> None:
    """The sums, and which sequences are kept, are those of the sequences without these tokens, bit for bit; the bucket
    is that of the whole response."""
    lengths = [70, 3, 20]
    trainer, rollout = 0.3 * draws(93, 1), 0.3 * draws(93, 2)
    mask = draws(93, 3) > -0.2
    mask[70:73] = False
    rollout[~mask] = 0.0  # as a forced token is recorded
    trainer[~mask] = -9.0
    masked = Sequences(lengths, mask)
    remaining = all_trained([int(part.sum()) for part in mask.split(lengths)])
    found = mismatch.sums(trainer, rollout, masked, tis_cap=1.2)
    expected = mismatch.sums(trainer[mask], rollout[mask], remaining, tis_cap=1.2)
    of_all = [name for name in found if name.count("/") == 1]
    assert {name: found[name] for name in of_all} == {name: expected[name] for name in of_all}
    assert {name.split("/")[1] for name in found} - {name.split("/")[1] for name in of_all} == {"to_64", "to_256"}
    settings: dict[str, Any] = {"sequence_ratio_bounds": [0.98, 1.5], "token_ratio_veto": 0.1}
    keeps = mismatch.kept_sequences(trainer, rollout, masked, **settings)[mask]
    assert torch.equal(keeps, mismatch.kept_sequences(trainer[mask], rollout[mask], remaining, **settings))
    assert set(keeps.tolist()) == {0, 1}


def kept(trainer: Tensor, lengths: list[int], **settings: Any) -> list[float]:
    options = {"sequence_ratio_bounds": None, "token_ratio_veto": None, **settings}
    return mismatch.kept_sequences(trainer, torch.zeros_like(trainer), all_trained(lengths), **options).tolist()


def test_a_sequence_outside_the_bounds_of_its_geometric_mean_is_left_out() -> None:
    """Ratios (4, 1/4): mean 1, kept. (2, 1): √2, left out. (0.4): left out; (0.5), at the bound, kept."""
    ratios = numbers(4, 0.25, 2, 1, 0.4, 0.5)
    assert kept(ratios.log(), [2, 2, 1, 1], sequence_ratio_bounds=[0.5, 1.25]) == [1, 1, 0, 0, 0, 1]


def test_the_bounds_are_for_trainer_over_rollout() -> None:
    """A peer's apply to rollout / train: its bounds are the inverse of these."""
    assert kept(numbers(1.5).log(), [1], sequence_ratio_bounds=[0.9, 2.0]) == [1]
    assert kept(numbers(1 / 1.5).log(), [1], sequence_ratio_bounds=[0.9, 2.0]) == [0]


def test_one_token_that_the_trainer_would_hardly_sample_vetoes_its_sequence() -> None:
    ratios = numbers(1, 1e-5, 1, 1, 1e3)
    assert kept(ratios.log(), [3, 2], token_ratio_veto=1e-4) == [0, 0, 0, 1, 1]


def test_without_bounds_and_veto_all_is_kept() -> None:
    assert kept(numbers(1e-9, 1e9).log(), [1, 1]) == [1, 1]


def test_the_masks_depend_on_neither_order_nor_micro_batches() -> None:
    trainer, settings = measured("layers_swapped"), {"sequence_ratio_bounds": [0.7, 1.1], "token_ratio_veto": 0.2}
    whole = kept(trainer - ROLLOUT, LENGTHS, **settings)
    parts = [kept(x, [len(x)], **settings) for x in (trainer - ROLLOUT).split(LENGTHS)]
    assert [value for part in parts for value in part] == whole
    assert Counter(whole).keys() == {0, 1}


# ---- the alarm

ALARM = 0.2


@pytest.mark.parametrize(("name", "mean"), [("bf16", 0.041), ("fp8", 0.131)])
def test_rounding_raises_no_alarm(name: str, mean: float) -> None:
    found = reported(measured(name), ROLLOUT, LENGTHS)
    assert found["train_inference_mismatch/mean"] == pytest.approx(mean, abs=5e-4)
    mismatch.check(found, max_mismatch=ALARM)


@pytest.mark.parametrize(
    ("name", "mean"), [("gate_up_swapped", 0.243), ("v_heads_permuted", 0.303), ("layers_swapped", 0.505)]
)
def test_weights_that_are_not_the_trainer_s_do(name: str, mean: float) -> None:
    found = reported(measured(name), ROLLOUT, LENGTHS)
    assert found["train_inference_mismatch/mean"] == pytest.approx(mean, abs=5e-4)
    with pytest.raises(
        RuntimeError, match=rf"train_inference_mismatch/mean={mean} is above algorithm\.max_mismatch=0\.2: the engi"
    ):
        mismatch.check(found, max_mismatch=ALARM)


def test_a_gap_that_is_no_number_raises_the_alarm() -> None:
    with pytest.raises(RuntimeError, match="train_inference_mismatch/mean=nan"):
        mismatch.check({"train_inference_mismatch/mean": math.nan}, max_mismatch=ALARM)


def test_the_effective_sample_size_falls_with_the_mismatch() -> None:
    order = ["bf16", "fp8", "gate_up_swapped", "layers_swapped"]
    sizes = [reported(measured(name), ROLLOUT, LENGTHS)["train_inference_mismatch/ess"] for name in order]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(0.996, abs=1e-3)
    assert sizes[-1] == pytest.approx(0.654, abs=1e-3)
