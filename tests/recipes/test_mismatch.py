"""Trainer against rollout: the report, the corrections and the alarm, on closed forms and on measured log-probs."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from recipes.algorithms import mismatch
from recipes.algorithms.sequences import Sequences
from tests.recipes.gradients import draws, numbers

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
        part = mismatch.sums(t, r, Sequences([lengths[i] for i in indices]), tis_cap=2.0)
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
    assert mismatch.sums(nothing, nothing, Sequences([0, 0]), tis_cap=2.0) == {}


def test_the_sums_are_made_in_fp64() -> None:
    """The trainer's log-probs are FP32, in which counting ends at 2^24 tokens."""
    ones = torch.zeros(10, dtype=torch.float32)
    found = mismatch.sums(ones, ones, Sequences([10]), tis_cap=2.0)
    assert all(value.dtype == torch.float64 for value in found.values())


# ---- corrections


def test_equal_log_probs_have_the_weight_one() -> None:
    same = draws(50)
    weights = mismatch.truncated_weights(same, same, tis_cap=2.0)
    assert torch.equal(weights, torch.ones_like(same))


def test_a_weight_is_trainer_over_rollout_up_to_the_cap_and_has_no_gradient() -> None:
    """The other way round, a cap would hold back the tokens that the trainer likes less than the rollout did."""
    trainer = numbers(0.5, 0.1, 0.9).log().requires_grad_()
    weights = mismatch.truncated_weights(trainer, numbers(0.25, 0.2, 0.1).log(), tis_cap=3.0)
    assert weights.tolist() == pytest.approx([2, 0.5, 3])
    assert not weights.requires_grad


def test_the_weighted_mean_over_rollout_samples_is_the_trainer_s_mean() -> None:
    """What importance sampling is for, exactly: the mean over the rollout's distribution, the cap out of reach."""
    rollout, trainer, score = draws(8, 1).log_softmax(0), draws(8, 2).log_softmax(0), draws(8, 3)
    weights = mismatch.truncated_weights(trainer, rollout, tis_cap=1e9)
    assert (rollout.exp() * weights * score).sum().item() == pytest.approx((trainer.exp() * score).sum().item())


def kept(trainer: Tensor, lengths: list[int], **settings: Any) -> list[float]:
    options = {"sequence_ratio_bounds": None, "token_ratio_veto": None, **settings}
    return mismatch.kept_sequences(trainer, torch.zeros_like(trainer), Sequences(lengths), **options).tolist()


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
