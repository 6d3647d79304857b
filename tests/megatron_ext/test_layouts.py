"""An update in any layout is Hugging Face's: loss, log-probs, every gradient, every weight; padding is neutral."""

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from tests.megatron_ext import cases
from tests.megatron_ext.cases import Case
from tests.megatron_ext.reference import Reference, all_pieces, assemble

Results = Callable[[str], list[dict[str, Any]]]
References = Callable[[Case], Reference]

GRADIENT_ERROR = 5e-6  # of a tensor, relative to its norm: FP32 sums of some thousand terms, in any order
FP32 = [case for case in cases.CASES if case.precision == "fp32"]
BF16 = [case for case in cases.CASES if case.precision == "bf16"]
every_case = pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
fp32_cases = pytest.mark.parametrize("case", FP32, ids=lambda case: case.name)
bf16_cases = pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)


def of_tokens(ranks: list[dict[str, Any]], name: str) -> dict[int, torch.Tensor]:
    """``log_probs`` or ``entropies`` by sequence of the batch, from the parts of the context-parallel ranks; ranks that
    hold the same token must agree bit for bit."""
    parts: dict[int, dict[int, float]] = {}
    for rank in ranks:
        for index, (places, values) in rank[name].items():
            values_of_response = parts.setdefault(index, {})
            for place, value in zip(places.tolist(), values.tolist(), strict=True):
                assert values_of_response.setdefault(place, value) == value
    return {
        index: torch.tensor([values_of_response[i] for i in range(len(values_of_response))])
        for index, values_of_response in parts.items()
    }


def relative_errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Tensor → ‖found − expected‖ / ‖expected‖."""
    return {name: float((actual[name] - e).norm() / e.norm()) for name, e in expected.items()}


def update_errors(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Tensor → error relative to how far the tensor moved."""
    return {name: float((actual[name] - e).norm() / (e - start[name]).norm()) for name, e in expected.items()}


def update_bounds(expected: Reference) -> dict[str, float]:
    """Tensor → the bound of ``update_errors`` that follows from GRADIENT_ERROR.

    AdamW's step u(g) = g / (|g| + ε) of a clipped gradient has a slope of at most 1/ε, and |u(g)| is at least
    |g| / (max |g| + ε): it magnifies relative errors by (max |g| + ε) / ε or less. Twice, because a step's error also
    changes the next gradient. Both sides round their weights to FP32 in each step.
    """
    epsilon = cases.OPTIMIZER.epsilon
    clipping = cases.OPTIMIZER.clip_grad_norm / expected.grad_norm[0]
    bounds = {}
    for name, gradient in expected.gradients.items():
        largest = clipping * float(gradient.abs().max())
        moved = float((expected.weights[name] - expected.start[name]).norm())
        rounding = 2 * cases.STEPS * 2**-24 * float(expected.start[name].norm()) / moved
        bounds[name] = 2 * GRADIENT_ERROR * (largest + epsilon) / epsilon + rounding
    return bounds


def above(errors: dict[Any, float], bound: float | dict[Any, float]) -> dict[Any, float]:
    bounds = bound if isinstance(bound, dict) else dict.fromkeys(errors, bound)
    return {name: error for name, error in errors.items() if not error <= bounds[name]}


@fp32_cases
def test_loss_and_gradient_norm_equal_hugging_face(case: Case, results: Results, reference: References) -> None:
    expected = reference(case)
    assert min(expected.grad_norm) > cases.OPTIMIZER.clip_grad_norm  # clipping is at work
    for rank in results(case.name):
        assert rank["loss"] == pytest.approx(expected.loss, abs=2e-6)
        assert rank["grad_norm"] == pytest.approx(expected.grad_norm, rel=3e-6)


@fp32_cases
def test_log_probs_equal_hugging_face(case: Case, results: Results, reference: References) -> None:
    actual, expected = of_tokens(results(case.name), "log_probs"), reference(case).log_probs
    assert actual.keys() == expected.keys()
    assert above({i: float((actual[i] - e).abs().max()) for i, e in expected.items()}, 5e-6) == {}


@pytest.mark.parametrize("case", [case for case in FP32 if not case.is_scalar], ids=lambda case: case.name)
def test_entropies_equal_hugging_face(case: Case, results: Results, reference: References) -> None:
    """Of the whole vocabulary, at the sampling temperature. They are measured beside each update that these tests
    compare, and so change none."""
    actual, expected = of_tokens(results(case.name), "entropies"), reference(case).entropies
    assert actual.keys() == expected.keys()
    assert above({i: float((actual[i] - e).abs().max()) for i, e in expected.items()}, 5e-6) == {}


def test_a_pack_of_40960_tokens_over_four_ranks_is_that_of_one(results: Results, twins: Path) -> None:
    """One micro-batch with a response of 32,768 tokens: log-probs and every gradient under context parallel 4 equal one
    rank's, and both have transformers' log-probs."""
    one, divided = results(cases.LONG_ONE.name), results(cases.LONG_CP4.name)
    assert [rank["tokens"] for rank in divided] == [cases.LONG_TOKENS // 4] * 4
    expected = long_log_probs(twins)
    for ranks in (one, divided):
        actual = of_tokens(ranks, "log_probs")
        assert actual.keys() == expected.keys()
        assert above({i: float((actual[i] - e).abs().max()) for i, e in expected.items()}, 5e-6) == {}
        loss = -sum(e.mean() for e in expected.values()) / len(expected)
        assert all(rank["loss"] == pytest.approx(float(loss), abs=2e-6) for rank in ranks)
    like = load_file(twins / "long" / "model.safetensors")
    gradients, of_divided = (assemble(all_pieces(ranks, "gradients"), like) for ranks in (one, divided))
    assert above(relative_errors(of_divided, gradients), GRADIENT_ERROR) == {}
    assert min(float(gradient.norm()) for gradient in gradients.values()) > 0


def long_log_probs(twins: Path) -> dict[int, torch.Tensor]:
    """transformers' log-probs of the responses of the long pack, one sequence at a time, by an attention that holds no
    scores of a whole sequence."""
    model = LlamaForCausalLM.from_pretrained(twins / "long", dtype=torch.float32, attn_implementation="sdpa")
    log_probs = {}
    for i, sequence in enumerate(cases.batch(cases.LONG_ONE)):
        with torch.no_grad():
            logits = model(torch.tensor([sequence.prompt + sequence.response])).logits[0, len(sequence.prompt) - 1 : -1]
        log_probs[i] = logits.log_softmax(-1)[range(len(sequence.response)), sequence.response]
    return log_probs


# The other layouts show their gradients in the weights.
@pytest.mark.parametrize("case", [c for c in FP32 if cases.has_whole_gradients(c)], ids=lambda c: c.name)
def test_every_gradient_equals_hugging_face(case: Case, results: Results, reference: References) -> None:
    expected = reference(case)
    actual = assemble(all_pieces(results(case.name), "gradients"), expected.start)
    assert above(relative_errors(actual, expected.gradients), GRADIENT_ERROR) == {}


@fp32_cases
def test_weights_after_two_steps_equal_torch_adamw(case: Case, results: Results, reference: References) -> None:
    expected = reference(case)
    actual = assemble(all_pieces(results(case.name), "weights"), expected.start)
    assert above(update_errors(actual, expected.weights, expected.start), update_bounds(expected)) == {}


@bf16_cases
def test_bf16_follows_fp32_from_the_same_rounded_weights(case: Case, results: Results, reference: References) -> None:
    assert_bf16_follows(case, results(case.name), reference(case))


def assert_bf16_follows(case: Case, ranks: list[dict[str, Any]], expected: Reference) -> None:
    """Bounds for BF16 activations: 8 bits of mantissa, 4 layers, logits of order 1. A matrix moves by about 5e-4."""
    actual = of_tokens(ranks, "log_probs")
    gaps = torch.cat([(actual[i] - e).abs() for i, e in expected.log_probs.items()])
    assert float(gaps.max()) < 0.05
    assert float(gaps.mean()) < 0.01
    assert ranks[0]["loss"] == pytest.approx(expected.loss, abs=0.02)
    assert ranks[0]["grad_norm"] == pytest.approx(expected.grad_norm, rel=0.01)
    if cases.has_whole_gradients(case):
        gradients = assemble(all_pieces(ranks, "gradients"), expected.start)
        assert above(relative_errors(gradients, expected.gradients), 0.05) == {}
    weights = assemble(all_pieces(ranks, "weights"), expected.start)
    beyond_rounding = {
        n: float((weights[n] - e).abs().mean() - 2**-8 * e.abs().mean()) for n, e in expected.weights.items()
    }
    assert above(beyond_rounding, 2e-5) == {}


@pytest.mark.parametrize("name", cases.UNPADDED)
def test_packs_of_constant_length_give_the_update_of_packs_without_padding(
    name: str, results: Results, reference: References
) -> None:
    """Every pack has its tokens, and pipeline stages tell each other no shapes; loss and gradients are the same."""
    case = cases.by_name(name)
    padded, plain = results(name), results(cases.UNPADDED[name])
    for rank in padded:
        assert set(rank["pack_lengths"]) == {case.micro_batch_tokens // case.context}
        assert rank["shapes_told"] == 0
    assert all((rank["shapes_told"] > 0) == (case.pipeline > 1) for rank in plain)
    assert all(set(rank["pack_lengths"]) != {case.micro_batch_tokens // case.context} for rank in plain)
    for here, there in zip(padded, plain, strict=True):
        assert here["plan"] == there["plan"]
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-6)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-6)
    if "gradients" in plain[0]:
        like = reference(case).start
        gradients, without_padding = (assemble(all_pieces(ranks, "gradients"), like) for ranks in (padded, plain))
        assert above(relative_errors(gradients, without_padding), 1e-6) == {}
    expected = reference(case)
    weights, of_plain = (assemble(all_pieces(ranks, "weights"), expected.start) for ranks in (padded, plain))
    assert above(update_errors(weights, of_plain, expected.start), update_bounds(expected)) == {}


@every_case
def test_gradients_are_reduced_during_the_last_backward_pass_where_they_should_be(case: Case, results: Results) -> None:
    """From the second update on: the first one shows Megatron-Core which gradients there are."""
    for rank in results(case.name):
        assert rank["reduced_early"] == [0, rank["buckets"] if case.reduce_early else 0]
    if case.reduce_early:
        assert max(rank["buckets"] for rank in results(case.name)) > 4


@every_case
def test_padding_stays_zero(case: Case, results: Results) -> None:
    """Padded heads and vocabulary rows get no gradient and no decay, else they would no longer be neutral."""
    ranks = results(case.name)
    padded = padded_elements(ranks)
    assert (padded > 0) == (case.tensor in (2, 4) or (case.tensor == 3 and case.twin == "tied"))  # heads; vocabulary
    assert all(rank["padding_is_zero"] for rank in ranks)


def padded_elements(ranks: list[dict[str, Any]]) -> int:
    """Of all parameters of all ranks."""
    return sum(
        math.prod(shape) - sum(math.prod(extent) for _, _, _, extent in blocks)
        for rank in ranks
        for _, shape, blocks in rank["blocks"]
    )


@every_case
def test_ranks_agree_on_the_micro_batches(case: Case, results: Results) -> None:
    ranks = results(case.name)
    plan = ranks[0]["plan"]
    assert len(plan) == case.data
    assert len({len(micro_batches) for micro_batches in plan}) == 1
    assert Counter(i for micro_batches in plan for batch in micro_batches for i in batch) == Counter(range(8))
    assert all(rank["plan"] == plan for rank in ranks)


def test_the_cases_differ_in_how_the_batch_is_cut(results: Results) -> None:
    """Else equal results would say nothing about micro-batches, order and ranks."""
    counts = {name: len(results(name)[0]["plan"][0]) for name in ("one-micro-batch", "one", "one-small-micro-batches")}
    assert 1 == counts["one-micro-batch"] < counts["one"] < counts["one-small-micro-batches"]
    here, there = ([set(rank["log_probs"]) for rank in results(name)] for name in ("dp2", "dp2-swapped"))
    assert here == there[::-1]
    assert here[0] and here[1] and not here[0] & here[1]


@pytest.mark.parametrize("name", ["one-micro-batch", "one-small-micro-batches", "one-reversed"])
def test_the_gradient_does_not_depend_on_micro_batches_or_order(
    name: str, results: Results, reference: References
) -> None:
    like = reference(cases.by_name("one")).start
    one, other = (assemble(all_pieces(results(n), "gradients"), like) for n in ("one", name))
    assert above(relative_errors(other, one), 1e-6) == {}


@pytest.mark.parametrize("name", ["dp2-swapped", "dp2-whole-optimizer", "dp4"])
def test_the_update_does_not_depend_on_the_rank_of_a_sample(name: str, results: Results, reference: References) -> None:
    expected = reference(cases.by_name("dp2"))
    two, other = (assemble(all_pieces(results(n), "weights"), expected.start) for n in ("dp2", name))
    assert above(update_errors(other, two, expected.start), update_bounds(expected)) == {}


@every_case
def test_metrics_named_max_take_the_maximum_over_micro_batches_and_ranks(case: Case, results: Results) -> None:
    longest = max(len(s.response) for s in cases.batch(case))
    assert all(rank["longest"] == [longest] * cases.STEPS for rank in results(case.name))


@every_case
def test_the_reference_policy_is_exact(case: Case, results: Results) -> None:
    """With equal weights the reference's log-probs have the policy's bits, so KL is exactly 0 before the first update.
    The weights come back bit for bit, after an error too."""
    for rank in results(case.name):
        assert rank["reference_log_probs_equal"]
        assert rank["log_probs_moved"]
        assert rank["own_weights_back"]
        assert rank["own_weights_back_after_error"]


@every_case
def test_blocks_cover_every_hugging_face_element_once(case: Case, results: Results, reference: References) -> None:
    """In each data-parallel replica: matrices once (tied embeddings once per stage that has them), norms and a scalar
    head on every tensor-parallel rank. No name is missing, none is invented, and no local element is covered twice.
    """
    like = reference(case).start
    times = {name: torch.zeros_like(tensor, dtype=torch.int32) for name, tensor in like.items()}
    for rank in results(case.name):
        for name, shape, blocks in rank["blocks"]:
            local = torch.zeros(shape, dtype=torch.int32)
            for hf_name, hf_start, local_start, extent in blocks:
                times[hf_name][tuple(slice(a, a + n) for a, n in zip(hf_start, extent, strict=True))] += 1
                local[tuple(slice(a, a + n) for a, n in zip(local_start, extent, strict=True))] += 1
            assert local.max() <= 1, f"{name}: blocks overlap"
    replicas = case.data * case.context
    replicated = {name for name in like if "norm" in name or name == "score.weight"}
    copies = {name: replicas * (case.tensor if name in replicated else 1) for name in like}
    if case.twin in ("tied", "qwen3") and case.pipeline > 1:
        copies["model.embed_tokens.weight"] *= 2
    assert {name: t.unique().tolist() for name, t in times.items()} == {name: [n] for name, n in copies.items()}
