"""Micro-batches are built a little ahead, by a thread that ends, and give the steps of those in a list."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from megatron_ext import packing, platform

platform.activate("cpu")

from megatron_ext.micro_batches import AHEAD, MicroBatches, built_ahead  # noqa: E402
from tests.megatron_ext import cases  # noqa: E402
from tests.sequences import PlainSequence, token_batch  # noqa: E402

SECONDS = 60.0  # of waiting for a thread


def builders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "micro-batches"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert builders() == []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_two_are_built_ahead_of_those_that_are_taken_and_no_more() -> None:
    begun: list[int] = []
    finished: list[int] = []

    def build(number: int) -> int:
        begun.append(number)
        finished.append(number)
        return 10 * number

    taken = []
    for built in built_ahead(build, range(6)):
        taken.append(built)
        ahead = min(len(taken) + AHEAD, 6)
        wait_for(lambda ahead=ahead: len(finished) == ahead)  # type: ignore[misc]
        time.sleep(0.01)
        assert len(begun) == ahead
    assert taken == [0, 10, 20, 30, 40, 50]


def test_what_the_thread_raises_is_raised_where_it_is_missed() -> None:
    def build(number: int) -> int:
        if number == 2:
            raise LookupError("the tokens of response ('p', 0) are on other ranks")
        return number

    built = built_ahead(build, range(5))
    assert list(itertools.islice(built, 2)) == [0, 1]
    with pytest.raises(LookupError, match="are on other ranks"):
        next(built)
    assert builders() == []


def test_a_pass_that_ends_early_ends_the_thread() -> None:
    built = built_ahead(lambda number: number, range(100))
    assert next(built) == 0
    assert len(builders()) == 1
    built.close()


def packed(count: int) -> tuple[MicroBatches, list[packing.MicroBatch]]:
    """Micro-batches of one sequence each, and the same in a list."""
    draw = torch.Generator().manual_seed(0)
    ids: Callable[[int], list[int]] = lambda n: torch.randint(0, 9, (n,), generator=draw).tolist()  # noqa: E731
    batch = token_batch([PlainSequence(ids(3 + n), ids(2 + n), {"weight": [0.5] * (2 + n)}) for n in range(count)])
    build = partial(packing.pack, multiple=4, pad_token=0)
    plan = [[n] for n in reversed(range(count))]
    return MicroBatches(batch, plan, build), [build(batch, indices) for indices in plan]


def test_each_pass_reads_what_pack_makes() -> None:
    micro_batches, expected = packed(4)
    assert len(micro_batches) == 4
    for _ in range(2):
        for ours, theirs in zip(micro_batches, expected, strict=True):
            assert ours.indices == theirs.indices
            for name in ("tokens", "positions", "predict", "targets", "lengths", "response_lengths", "owners"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert ours.values.keys() == theirs.values.keys()
            assert all(torch.equal(column, theirs.values[name]) for name, column in ours.values.items())


def test_a_column_of_an_earlier_pass_is_in_the_later_ones() -> None:
    micro_batches, expected = packed(3)
    assert micro_batches.has("weight") and not micro_batches.has("old") and not micro_batches.has("reference")
    micro_batches.add("old", [batch.targets.float() for batch in expected])
    micro_batches.add("reference", [])  # another pipeline stage's
    assert micro_batches.has("old") and micro_batches.has("reference")
    for batch in micro_batches:
        assert torch.equal(batch.values["old"], batch.targets.float())
        assert "reference" not in batch.values


@pytest.mark.parametrize("name", cases.STREAMED)
def test_steps_are_those_of_micro_batches_in_a_list(name: str, results: Callable[[str], list[dict[str, Any]]]) -> None:
    """To the bit: log-probs, losses, gradient norms and weights, on one pipeline stage, on two, on virtual ones."""
    for rank in results(f"streamed-{name}"):
        assert rank["streamed"] == rank["listed"]
        assert rank["same_log_probs"] and rank["same_weights"]
        assert rank["threads"] == []
