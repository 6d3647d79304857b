"""Eight GPUs of one node: every kind of parallelism over NCCL, checkpoints, links, and a block of the 72B model."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.gpu import node_cases
from tests.gpu.test_fp8 import FIRST_MFU, GOAL_MFU
from tests.megatron_ext import cases
from tests.megatron_ext.cases import Case
from tests.megatron_ext.ranks import Ranks
from tests.megatron_ext.reference import Reference, train_reference
from tests.megatron_ext.test_layouts import assert_bf16_follows, padded_elements
from tests.settings import CONF

GPUS = 8
LINKS = OmegaConf.load(CONF / "simulate" / "h100.yaml")
FLOORS = OmegaConf.load(CONF / "node_check" / "h100.yaml")
# Three quarters of what the estimates assume of training.
LEAST_MFU = 0.75 * OmegaConf.load(CONF / "scale" / "h100.yaml").machine.mfu
MOST_COMMUNICATOR_GIB = 2.0
MOST_ALL_REDUCE_US = 200
MOST_ROUND_US = 2000

References = Callable[[Case], Reference]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def ranks(enough_gpus: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """A rank on each GPU, which do the jobs that the checks ask for."""
    yield from start(tmp_path_factory.mktemp("node"), "tests.gpu.node_ranks")


def start(folder: Path, program: str) -> Iterator[Ranks]:
    """Ranks of ``program`` with the twins in ``folder``; they end with the iterator."""
    cases.make_twins(folder)
    started = Ranks([program], folder, node_cases.EARLIER)
    yield started
    started.stop()


@pytest.fixture(scope="module")
def reference(ranks: Ranks) -> References:
    """transformers and torch's AdamW on the host, in FP32."""

    @cache
    def compute(twin: str) -> Reference:
        return train_reference(ranks.folder / twin, Case("reference", twin=twin, precision="bf16"))

    return lambda case: compute(case.twin)


@pytest.mark.parametrize("case", [*node_cases.LAYOUTS, node_cases.PADDED], ids=lambda case: case.name)
def test_a_layout_over_nccl_is_as_near_to_fp32_as_one_rank(case: Case, ranks: Ranks, reference: References) -> None:
    """Loss, log-probs, gradients and weights after two steps, with the bounds of the CPU's BF16 layouts. Padded heads
    and vocabulary rows stay zero."""
    results = ranks.results(case.name)
    assert len(results) == case.ranks
    assert_bf16_follows(case, results, reference(case))
    assert (padded_elements(results) > 0) == (case is node_cases.PADDED)
    assert all(rank["padding_is_zero"] for rank in results)


def test_a_checkpoint_of_one_layout_goes_on_in_another(ranks: Ranks) -> None:
    """The same layout loads its bits again. Another one goes on with the same losses, within BF16."""
    saved = ranks.results(node_cases.SAVED.name)
    after = ranks.results(node_cases.RELAYOUT.name)
    assert len(saved) == len(after) == node_cases.WORLD
    for rank in saved:
        assert rank["step"] == 3
        assert rank["loaded"], "the loaded weights differ from the saved ones"
        assert rank["on_host"]["left"] == 0
    for rank in after:
        assert rank["step"] == 3
        for (loss, norm), (loss_before, norm_before) in zip(rank["resumed"], saved[0]["went_on"], strict=True):
            assert loss == pytest.approx(loss_before, abs=0.02)
            assert norm == pytest.approx(norm_before, rel=0.01)


def test_the_links_and_communicators_of_the_node(ranks: Ranks, record_property: Record) -> None:
    """Bandwidths against the floor of the node check and half of what the estimates assume. The times of a small
    all-reduce and of a sync's round, and NCCL's buffers have bounds that only a fault exceeds."""
    results = ranks.results(node_cases.LINKS.name)
    slowest = min(rank["exchange_gb_s"] for rank in results)
    all_reduce = min(rank["all_reduce_gb_s"] for rank in results)
    communicator = max(rank["communicator_gib"] for rank in results)
    small = max(rank["all_reduce_us"] for rank in results)
    record_property("nvlink_gb_s", slowest)
    record_property("all_reduce_gb_s", all_reduce)
    record_property("communicator_gib", communicator)
    record_property("all_reduce_us", small)
    of_a_round = max(rank["round_us"] for rank in results)
    record_property("round_us", of_a_round)
    assert slowest > LINKS.nvlink_gb_s / 2
    assert all_reduce > FLOORS.node_gb_s
    assert 0 <= communicator < MOST_COMMUNICATOR_GIB
    assert 0 < small < MOST_ALL_REDUCE_US
    assert 0 < of_a_round < MOST_ROUND_US


def test_a_block_of_the_72b_model_over_all_gpus_keeps_them_busy(ranks: Ranks, record_property: Record) -> None:
    """Four layers with TP 8 and sequence parallelism, communication included; the first figure that is the recipes'."""
    results = ranks.results(node_cases.SPEED.name)
    seconds = max(rank["seconds"] for rank in results)
    mfu = results[0]["flops"] / seconds / (results[0]["peak_flops"] * len(results))
    record_property("seconds", seconds)
    record_property("mfu", mfu)
    assert mfu > LEAST_MFU


def test_communication_hides_behind_the_products(ranks: Ranks, record_property: Record) -> None:
    """The same four layers with ``parallel.tp_comm_overlap`` and fused gradients: less time, and the first MFU that is
    wanted of the 72B model. That its numbers are the same, the layout ``node-overlap-tp8-sp`` shows."""
    apart, overlapped = ranks.results(node_cases.SPEED.name), ranks.results(node_cases.OVERLAP.name)
    seconds_apart, seconds = (max(rank["seconds"] for rank in of_ranks) for of_ranks in (apart, overlapped))
    mfu = overlapped[0]["flops"] / seconds / (overlapped[0]["peak_flops"] * len(overlapped))
    record_property("seconds", seconds)
    record_property("seconds_apart", seconds_apart)
    record_property("mfu", mfu)
    record_property("goal_mfu", GOAL_MFU)
    assert seconds < seconds_apart
    assert mfu >= FIRST_MFU
