"""On the platform ``cuda``, with Transformer Engine's kernels computed by torch, training is the CPU platform's.

Megatron-Core's wrappers, Transformer Engine's layers and FusedAdam, and our platform run as on a GPU: what they are
given, in which order, with which names. ``fake_kernels`` computes, gloo is in NCCL's place.
"""

import shutil
from typing import Any

import pytest
import torch

from tests.megatron_ext import cases
from tests.megatron_ext.ranks import Ranks
from tests.megatron_ext.reference import all_pieces
from tests.megatron_ext.test_layouts import above, of_tokens
from tests.te import watched

Results = list[dict[str, Any]]  # of a job, by rank
# Every family, with every kind of parallelism among them; of the CPU platform's cases.
TEXT = (
    "tp2-sp-recompute-full",
    "qwen2-tp2-sp-pp2",
    "qwen3-tp2-sp-cp2",
    "scalar-one",
    "overlap-tp2-sp-pp2",
    "shared-tp2-sp-recompute-full",
    "shared-pp2-vp2-dp2",
)
VISION = ("qwen-cp2", "6b-hf-tp2-sp", "qwen-shared-one")
SAVED = cases.TP2_SP_DP2
CROSSING = f"relayout-{cases.RELAYOUTS[0][1].name}"
# FP32 sums of a few hundred terms in another order, as between two layouts.
SUMS = 5e-6


def pieces(ranks: Results, kind: str) -> dict[Any, torch.Tensor]:
    return {(name, start): values for name, start, values in all_pieces(ranks, kind)}


def errors(ours: dict[Any, torch.Tensor], theirs: dict[Any, torch.Tensor]) -> dict[Any, float]:
    assert ours.keys() == theirs.keys()
    return {name: float((ours[name] - values).norm() / values.norm()) for name, values in theirs.items()}


@pytest.mark.parametrize("name", TEXT)
def test_log_probs_losses_and_steps_are_the_cpu_platforms(name: str, on_gpu: Ranks, on_cpu: Ranks) -> None:
    ours, theirs = on_gpu.results(name), on_cpu.results(name)
    log_probs, expected = of_tokens(ours, "log_probs"), of_tokens(theirs, "log_probs")
    assert log_probs.keys() == expected.keys()
    assert above({i: float((log_probs[i] - e).abs().max()) for i, e in expected.items()}, SUMS) == {}
    for here, there in zip(ours, theirs, strict=True):
        assert here["loss"] == pytest.approx(there["loss"], rel=SUMS)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=SUMS)
        assert here["padding_is_zero"] and here["reference_log_probs_equal"] and here["own_weights_back"]
    if "gradients" in theirs[0]:
        assert above(errors(pieces(ours, "gradients"), pieces(theirs, "gradients")), 2 * SUMS) == {}
    assert above(errors(pieces(ours, "weights"), pieces(theirs, "weights")), SUMS) == {}


def test_bf16_rounds_as_the_cpu_platform_does(on_gpu: Ranks, on_cpu: Ranks) -> None:
    """Kernels round once at the end, torch's separate operations more often: bounds as against FP32 in test_layouts."""
    ours, theirs = on_gpu.results("bf16-tp2-sp"), on_cpu.results("bf16-tp2-sp")
    log_probs, expected = of_tokens(ours, "log_probs"), of_tokens(theirs, "log_probs")
    assert above({i: float((log_probs[i] - e).abs().max()) for i, e in expected.items()}, 0.05) == {}
    assert ours[0]["loss"] == pytest.approx(theirs[0]["loss"], abs=0.02)
    assert ours[0]["grad_norm"] == pytest.approx(theirs[0]["grad_norm"], rel=0.01)


@pytest.mark.parametrize("name", VISION)
def test_vision_towers_are_the_cpu_platforms(name: str, vision_on_gpu: Ranks, vision_on_cpu: Ranks) -> None:
    ours, theirs = vision_on_gpu.results(name), vision_on_cpu.results(name)
    for here, there in zip(ours, theirs, strict=True):
        assert here["log_probs"].keys() == there["log_probs"].keys()
        for index, (_, values) in there["log_probs"].items():
            torch.testing.assert_close(here["log_probs"][index][1], values, rtol=0, atol=2e-5)
        assert here["loss"] == pytest.approx(there["loss"], rel=1e-5)


@pytest.mark.parametrize("name", [*watched.TEXT, *watched.VISION])
def test_the_host_waits_for_no_pass(name: str, request: pytest.FixtureRequest) -> None:
    """A pass with RL's loss, forward and backward, reads no number and copies nothing that is not pinned. One that
    does so is found out."""
    ranks = request.getfixturevalue("on_gpu" if name in watched.TEXT else "vision_on_gpu")
    for rank in ranks.results(f"watched-{name}"):
        assert rank["waits"] == [], "\n".join(rank["waits"])
        assert rank["seen"] == watched.SEEN


def test_a_checkpoint_resumes_bit_for_bit(on_gpu: Ranks) -> None:
    """FusedAdam saves, loads and goes on. (The CPU ranks' test of the same job is in test_checkpoint.)"""
    for rank in on_gpu.results(f"resume-{SAVED.name}"):
        assert rank["loaded"] and rank["same_weights"]
        assert rank["resumed"] == rank["went_on"]


@pytest.fixture(scope="module")
def crossed(on_gpu: Ranks, on_cpu: Ranks) -> dict[str, tuple[Results, Results]]:
    """Direction → two steps in another layout: on the other platform, and on that which wrote the checkpoint."""
    of_gpu, of_cpu = on_gpu.results(CROSSING), on_cpu.results(CROSSING)
    folders = [ranks.folder / "checkpoints" / SAVED.name for ranks in (on_gpu, on_cpu)]
    aside = folders[0].with_name("aside")
    for source, target in ((folders[0], aside), (folders[1], folders[0]), (aside, folders[1])):
        shutil.move(source, target)
    for ranks in (on_gpu, on_cpu):
        ranks.jobs_done.remove(CROSSING)
        ranks.results.cache_clear()
    return {"cpu to gpu": (on_gpu.results(CROSSING), of_cpu), "gpu to cpu": (on_cpu.results(CROSSING), of_gpu)}


@pytest.mark.parametrize("direction", ["cpu to gpu", "gpu to cpu"])
def test_the_other_platform_goes_on_from_a_checkpoint(
    direction: str, crossed: dict[str, tuple[Results, Results]]
) -> None:
    """torch's AdamW and FusedAdam read each other's groups, moments and step."""
    results, expected = crossed[direction]
    for here, there in zip(results, expected, strict=True):
        assert here["step"] == there["step"] == 3
        assert here["resumed"] == [pytest.approx(values, rel=SUMS) for values in there["resumed"]]
    assert above(errors(pieces(results, "weights"), pieces(expected, "weights")), SUMS) == {}
