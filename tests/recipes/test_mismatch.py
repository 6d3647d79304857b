"""The mismatch of trainer and rollout: the report, the corrections and the alarm.

They are compared with closed forms and tried on measured log-probs.
"""

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from recipes.algorithms import mismatch
from tests.recipes.gradients import all_trained, draws, numbers, sequences

# "rollout": log-probs of 16 responses that SmolLM2-135M sampled in BF16. "trainer": log-probs of the same tokens from
# one pass over the whole text, by the name of the weights: the same ones ("bf16"), the same rounded to FP8 with one
# scale a tensor, and what a faulty weight sync might leave. "v_heads_permuted" and "gate_up_swapped" change one layer,
# "layers_swapped" exchanges two.
MEASURED: dict[str, Any] = json.loads((Path(__file__).parent / "logprob_gaps.json").read_text())
LENGTHS = [len(response) for response in MEASURED["rollout"]]


def joined(responses: list[list[float]]) -> Tensor:
    """[tokens] of all responses, one after another."""
    return numbers(*itertools.chain.from_iterable(responses))


ROLLOUT = joined(MEASURED["rollout"])


def measured(name: str) -> Tensor:
    """The trainer's log-probs [tokens] with these weights."""
    return joined(MEASURED["trainer"][name])


def reported(
    trainer: Tensor, rollout: Tensor, lengths: list[int], micro_batches: list[list[int]] | None = None
) -> dict[str, float]:
    """The report of sequences in these micro-batches, or in a single one.

    Sums of micro-batches are added up as the trainer adds up its metrics.
    """
    if micro_batches is None:
        micro_batches = [list(range(len(lengths)))]
    trainer_sequences = trainer.split(lengths)
    rollout_sequences = rollout.split(lengths)
    total: dict[str, float] = {}
    for indices in micro_batches:
        sums = mismatch.sums(
            torch.cat([trainer_sequences[i] for i in indices]),
            torch.cat([rollout_sequences[i] for i in indices]),
            all_trained([lengths[i] for i in indices]),
            tis_cap=2.0,
        )
        for name, value in sums.items():
            if name.endswith("/max"):
                total[name] = max(total.get(name, -math.inf), value.item())
            else:
                total[name] = total.get(name, 0.0) + value.item()
    return mismatch.report(total)


# ---- the report


def test_where_both_agree_nothing_is_reported_but_a_full_sample_size() -> None:
    metrics = reported(draws(20), draws(20), [5, 15])
    for name, value in metrics.items():
        assert value == (1.0 if "/ess" in name else 0.0), name


def test_the_report_of_known_ratios() -> None:
    """The ratios trainer / rollout are 2.5, 1/2, 1 and 1, so that Σw = 5 and Σw² = 8.5."""
    ratios = numbers(2.5, 0.5, 1, 1)
    metrics = reported(ratios.log(), torch.zeros(4), [4])
    log_ratios = np.array([math.log(2.5), -math.log(2), 0, 0])
    assert metrics["train_inference_mismatch/mean"] == pytest.approx(np.abs(log_ratios).mean())
    assert metrics["train_inference_mismatch/max"] == pytest.approx(math.log(2.5))
    assert metrics["train_inference_mismatch/k1"] == pytest.approx(-log_ratios.mean())
    assert metrics["train_inference_mismatch/k3"] == pytest.approx((5 - 4 - log_ratios.sum()) / 4)
    assert metrics["train_inference_mismatch/clipped"] == 0.25
    assert metrics["train_inference_mismatch/ess"] == pytest.approx(5**2 / (4 * 8.5))


def test_k1_and_k3_estimate_the_divergence_of_the_trainer_from_the_rollout() -> None:
    """The mean of each over the rollout's distribution is KL(rollout ‖ trainer). Each of 8 tokens comes as often as the
    rollout would sample it in 100,000 draws."""
    rollout = draws(8, 1).log_softmax(0)
    trainer = draws(8, 2).log_softmax(0)
    counts = (rollout.exp() * 1e5).round().long()
    exact = (rollout.exp() * (rollout - trainer)).sum().item()
    metrics = reported(trainer.repeat_interleave(counts), rollout.repeat_interleave(counts), [int(counts.sum())])
    assert metrics["train_inference_mismatch/k1"] == pytest.approx(exact, abs=1e-4)
    assert metrics["train_inference_mismatch/k3"] == pytest.approx(exact, abs=1e-4)


def test_each_length_has_its_bucket_and_buckets_without_a_response_are_left_out() -> None:
    """Of responses of 64, 65 and 20,000 tokens the longest alone has a mismatch, which shows in its bucket only."""
    lengths = [64, 65, 20_000]
    trainer = torch.zeros(20_129, dtype=torch.float64)
    trainer[129:] = -0.5
    metrics = reported(trainer, torch.zeros_like(trainer), lengths)
    means = {name: value for name, value in metrics.items() if name.startswith("train_inference_mismatch/mean/")}
    assert means == {
        "train_inference_mismatch/mean/to_64": 0,
        "train_inference_mismatch/mean/to_256": 0,
        "train_inference_mismatch/mean/over_16384": 0.5,
    }
    assert metrics["train_inference_mismatch/mean"] == pytest.approx(0.5 * 20_000 / 20_129)


def test_the_report_depends_on_neither_order_nor_micro_batches() -> None:
    in_one = reported(measured("bf16"), ROLLOUT, LENGTHS)
    micro_batches = [[15, 3], [0], [7, 8, 9, 1], [2, 4, 5, 6], [14, 13, 12, 11, 10]]
    in_five = reported(measured("bf16"), ROLLOUT, LENGTHS, micro_batches)
    assert in_five == pytest.approx(in_one, rel=1e-12)


def test_a_rank_without_tokens_of_a_micro_batch_has_no_part_in_it() -> None:
    nothing = torch.zeros(0, dtype=torch.float64)
    mask = torch.zeros(0, dtype=torch.bool)
    sums = mismatch.sums(nothing, nothing, sequences([0, 0], mask, total_lengths=[30, 70]), tis_cap=2.0)
    assert {float(value) for value in sums.values()} == {0.0}


def test_a_context_parallel_ranks_tokens_are_in_the_bucket_of_the_whole_response() -> None:
    here = sequences([40, 2], torch.ones(42, dtype=torch.bool), total_lengths=[80, 2000])
    sums = mismatch.sums(draws(42, 1), draws(42, 2), here, tis_cap=2.0)
    tokens = {name.split("/")[1]: float(value) for name, value in sums.items() if name.endswith("/tokens") and value}
    assert tokens == {"tokens": 42, "to_256": 40, "to_4096": 2}


def test_the_sums_are_made_in_fp64() -> None:
    """The trainer's log-probs are FP32, in which adding 1 changes nothing from 2^24 on."""
    ones = torch.zeros(10, dtype=torch.float32)
    sums = mismatch.sums(ones, ones, all_trained([10]), tis_cap=2.0)
    assert all(value.dtype == torch.float64 for value in sums.values())


# ---- corrections


def test_equal_log_probs_have_the_weight_one() -> None:
    log_probs = draws(50)
    weights = mismatch.token_truncated(log_probs, log_probs, all_trained([50]), tis_cap=2.0)
    assert torch.equal(weights, torch.ones_like(log_probs))


def test_a_weight_is_trainer_over_rollout_up_to_the_cap_and_has_no_gradient() -> None:
    """The cap is for tokens that the trainer samples more often than the rollout did: the ratio of the third is 9."""
    trainer = numbers(0.5, 0.1, 0.9).log().requires_grad_()
    rollout = numbers(0.25, 0.2, 0.1).log()
    weights = mismatch.token_truncated(trainer, rollout, all_trained([3]), tis_cap=3.0)
    assert weights.tolist() == pytest.approx([2, 0.5, 3])
    assert not weights.requires_grad


def test_the_weighted_mean_over_rollout_samples_is_the_trainer_s_mean() -> None:
    """What importance sampling is for, as an exact mean over 8 tokens. No ratio reaches the cap."""
    rollout = draws(8, 1).log_softmax(0)
    trainer = draws(8, 2).log_softmax(0)
    scores = draws(8, 3)
    weights = mismatch.token_truncated(trainer, rollout, all_trained([8]), tis_cap=1e9)
    weighted_mean = (rollout.exp() * weights * scores).sum()
    trainer_mean = (trainer.exp() * scores).sum()
    assert weighted_mean.item() == pytest.approx(trainer_mean.item())


def test_the_weight_of_a_sequence_is_the_product_of_its_ratios_up_to_the_cap() -> None:
    """min(Π ρ, C) over trained tokens, written again with NumPy."""
    lengths = [3, 1, 5, 2]
    trainer = (0.4 * draws(11, 1)).requires_grad_()
    rollout = 0.4 * draws(11, 2)
    mask = torch.tensor([True, False, True, True, True, True, True, False, True, False, False])
    weights = mismatch.sequence_truncated(trainer, rollout, sequences(lengths, mask), tis_cap=1.5)

    token_ratios = np.exp(trainer.detach().numpy()) / np.exp(rollout.numpy())
    trained_ratios = np.where(mask.numpy(), token_ratios, 1.0)
    begins = np.cumsum([0, *lengths[:-1]])
    products = np.multiply.reduceat(trained_ratios, begins)
    assert products.min() < 0.9
    assert products.max() > 1.5
    expected = np.repeat(np.minimum(products, 1.5), lengths)
    assert weights.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    assert not weights.requires_grad


def test_the_sequence_weighted_mean_over_rollout_samples_is_the_trainer_s_mean() -> None:
    """An exact mean over all 36 sequences of two tokens, each of which has a score. The token weights do not have this
    property."""
    rollout = draws(6, 1).log_softmax(0)
    trainer = draws(6, 2).log_softmax(0)
    scores = draws(36, 3)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    rollout_pairs = rollout[pairs]
    trainer_pairs = trainer[pairs]
    token_weights = mismatch.sequence_truncated(
        trainer_pairs.flatten(), rollout_pairs.flatten(), all_trained([2] * 36), tis_cap=math.inf
    )
    weights = token_weights[::2]
    weighted_mean = (rollout_pairs.sum(1).exp() * weights * scores).sum()
    trainer_mean = (trainer_pairs.sum(1).exp() * scores).sum()
    assert weighted_mean.item() == pytest.approx(trainer_mean.item())


def test_icepop_keeps_the_ratio_within_its_bounds_and_drops_tokens_outside() -> None:
    """M(k; α, β) = k in [α, β], else 0: both bounds are inside."""
    ratios = [0.4999, 0.5, 1.0, 3.0, 5.0, 5.001, 0.0]
    expected = [0, 0.5, 1.0, 3.0, 5.0, 0, 0]
    trainer = torch.tensor([-math.inf if ratio == 0 else math.log(ratio) for ratio in ratios], dtype=torch.float64)
    # exp(ln 5) may round beyond 5.
    low = math.exp(math.log(0.5))
    high = math.exp(math.log(5.0))
    weights = mismatch.icepop(
        trainer.requires_grad_(), torch.zeros(7), all_trained([7]), icepop_low=low, icepop_high=high
    )
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert not weights.requires_grad


def test_without_importance_sampling_every_weight_is_one() -> None:
    weights = mismatch.none(draws(5), draws(5, 1), all_trained([5]))
    assert torch.equal(weights, torch.ones(5, dtype=torch.float64))


def test_tokens_that_are_not_trained_on_count_in_no_sum_and_no_mask() -> None:
    """The sums, and which sequences are kept, are those of the sequences without these tokens, bit for bit. The bucket
    is that of the whole response."""
    lengths = [70, 3, 20]
    trainer = 0.3 * draws(93, 1)
    rollout = 0.3 * draws(93, 2)
    mask = draws(93, 3) > -0.2
    mask[70:73] = False
    rollout[~mask] = 0.0  # as a forced token is recorded
    trainer[~mask] = -9.0
    masked = sequences(lengths, mask)
    remaining = all_trained([int(sequence_mask.sum()) for sequence_mask in mask.split(lengths)])

    sums = mismatch.sums(trainer, rollout, masked, tis_cap=1.2)
    expected = mismatch.sums(trainer[mask], rollout[mask], remaining, tis_cap=1.2)
    of_all_lengths = [name for name in sums if name.count("/") == 1]
    assert {name: sums[name] for name in of_all_lengths} == {name: expected[name] for name in of_all_lengths}
    trained = {name.split("/")[1]: int(value) for name, value in sums.items() if name.endswith("/tokens") and value}
    of_responses = [int(sequence_mask.sum()) for sequence_mask in mask.split(lengths)]
    assert trained == {"tokens": int(mask.sum()), "to_64": of_responses[2], "to_256": of_responses[0]}

    settings: dict[str, Any] = {"sequence_ratio_bounds": [0.98, 1.5], "token_ratio_veto": 0.1}
    keeps = mismatch.kept_sequences(trainer, rollout, masked, **settings)[mask]
    assert torch.equal(keeps, mismatch.kept_sequences(trainer[mask], rollout[mask], remaining, **settings))
    assert set(keeps.tolist()) == {0, 1}


def kept(log_ratios: Tensor, lengths: list[int], **settings: Any) -> list[float]:
    """For each token 1 where its sequence is kept, else 0. Without ``settings`` there are no bounds and no veto."""
    options = {"sequence_ratio_bounds": None, "token_ratio_veto": None, **settings}
    rollout = torch.zeros_like(log_ratios)
    return mismatch.kept_sequences(log_ratios, rollout, all_trained(lengths), **options).tolist()


def test_a_sequence_outside_the_bounds_of_its_geometric_mean_is_left_out() -> None:
    """Four sequences: the means of (4, 1/4) and (2, 1) are 1 and √2, those of (0.4) and (0.5) are their ratios. The
    last is at the bound, and kept."""
    ratios = numbers(4, 0.25, 2, 1, 0.4, 0.5)
    assert kept(ratios.log(), [2, 2, 1, 1], sequence_ratio_bounds=[0.5, 1.25]) == [1, 1, 0, 0, 0, 1]


def test_the_bounds_are_for_trainer_over_rollout() -> None:
    """Another framework bounds rollout / trainer, with the inverse of these numbers."""
    assert kept(numbers(1.5).log(), [1], sequence_ratio_bounds=[0.9, 2.0]) == [1]
    assert kept(numbers(1 / 1.5).log(), [1], sequence_ratio_bounds=[0.9, 2.0]) == [0]


def test_one_token_that_the_trainer_would_hardly_sample_vetoes_its_sequence() -> None:
    ratios = numbers(1, 1e-5, 1, 1, 1e3)
    assert kept(ratios.log(), [3, 2], token_ratio_veto=1e-4) == [0, 0, 0, 1, 1]


def test_without_bounds_and_veto_all_is_kept() -> None:
    assert kept(numbers(1e-9, 1e9).log(), [1, 1]) == [1, 1]


def test_the_masks_depend_on_neither_order_nor_micro_batches() -> None:
    settings = {"sequence_ratio_bounds": [0.7, 1.1], "token_ratio_veto": 0.2}
    log_ratios = measured("layers_swapped") - ROLLOUT
    together = kept(log_ratios, LENGTHS, **settings)
    one_by_one = []
    for sequence in log_ratios.split(LENGTHS):
        one_by_one += kept(sequence, [len(sequence)], **settings)
    assert one_by_one == together
    assert set(together) == {0, 1}


# ---- the alarm

ALARM = 0.2


@pytest.mark.parametrize(("name", "mean"), [("bf16", 0.041), ("fp8", 0.131)])
def test_rounding_raises_no_alarm(name: str, mean: float) -> None:
    metrics = reported(measured(name), ROLLOUT, LENGTHS)
    assert metrics["train_inference_mismatch/mean"] == pytest.approx(mean, abs=5e-4)
    mismatch.check(metrics, max_mismatch=ALARM)


@pytest.mark.parametrize(
    ("name", "mean"), [("gate_up_swapped", 0.243), ("v_heads_permuted", 0.303), ("layers_swapped", 0.505)]
)
def test_weights_that_are_not_the_trainer_s_raise_the_alarm(name: str, mean: float) -> None:
    metrics = reported(measured(name), ROLLOUT, LENGTHS)
    assert metrics["train_inference_mismatch/mean"] == pytest.approx(mean, abs=5e-4)
    message = (
        f"train_inference_mismatch/mean={mean} is above algorithm.max_mismatch=0.2: the engine did not sample from the "
        "trainer's weights, temperature or tokens. Rounding alone makes less; where it is known to make more "
        "(quantised engines), raise algorithm.max_mismatch"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        mismatch.check(metrics, max_mismatch=ALARM)


def test_the_bound_itself_is_allowed_and_a_gap_that_is_no_number_is_not() -> None:
    mismatch.check({"train_inference_mismatch/mean": ALARM}, max_mismatch=ALARM)
    with pytest.raises(RuntimeError, match="train_inference_mismatch/mean=nan"):
        mismatch.check({"train_inference_mismatch/mean": math.nan}, max_mismatch=ALARM)


def test_the_effective_sample_size_falls_with_the_mismatch() -> None:
    order = ["bf16", "fp8", "gate_up_swapped", "layers_swapped"]
    sizes = [reported(measured(name), ROLLOUT, LENGTHS)["train_inference_mismatch/ess"] for name in order]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == pytest.approx(0.996, abs=1e-3)
    assert sizes[-1] == pytest.approx(0.654, abs=1e-3)
