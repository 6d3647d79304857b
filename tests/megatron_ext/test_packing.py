"""The plan gives every rank as many micro-batches; a packed micro-batch predicts exactly the response tokens."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.packing import PackedSequence, pack, plan

CPU = torch.device("cpu")


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """(lengths, data-parallel ranks, limit) of a batch that can be planned; often with sequences of half the limit."""
    ranks = draw(st.integers(1, 5))
    limit = draw(st.integers(1, 60))
    length = st.one_of(
        st.integers(1, limit), st.sampled_from(sorted({limit, limit // 2 + 1})).filter(lambda n: n <= limit)
    )
    count = ranks * draw(st.integers(1, 8))
    return draw(st.lists(length, min_size=count, max_size=count)), ranks, limit


@given(batches())
@settings(max_examples=400, deadline=None)
def test_plan_is_a_partition_within_the_limit_with_equal_counts(batch: tuple[list[int], int, int]) -> None:
    lengths, ranks, limit = batch
    found = plan(lengths, ranks, limit)
    assert len(found) == ranks
    assert Counter(i for rank in found for micro in rank for i in micro) == Counter(range(len(lengths)))
    assert all(micro for rank in found for micro in rank)
    assert all(sum(lengths[i] for i in micro) <= limit for rank in found for micro in rank)
    assert len({len(rank) for rank in found}) == 1
    assert plan(lengths, ranks, limit) == found


@given(batches())
@settings(max_examples=100, deadline=None)
def test_plan_balances_tokens(batch: tuple[list[int], int, int]) -> None:
    """Ranks differ by at most the longest sequence."""
    lengths, ranks, limit = batch
    loads = [sum(lengths[i] for micro in rank for i in micro) for rank in plan(lengths, ranks, limit)]
    assert max(loads) - min(loads) <= max(lengths)


def test_plan_of_long_and_short_sequences_has_no_empty_micro_batch() -> None:
    """By tokens alone rank 1 would get two sequences, where rank 0 needs three micro-batches."""
    found = plan([100, 100, 51, 51, 51, 1], 2, 100)
    assert all(micro for rank in found for micro in rank)


@pytest.mark.parametrize(
    ("lengths", "ranks", "limit", "message"),
    [
        ([4, 9, 3], 1, 8, r"parallel\.micro_batch_tokens=8 is below a sequence of 9 tokens"),
        ([4], 2, 8, r"1 sequences for 2 data-parallel ranks: use a multiple of 2"),
        ([4, 4, 4], 2, 8, r"3 sequences for 2 data-parallel ranks: use a multiple of 2"),
        ([], 1, 8, r"0 sequences for 1 data-parallel ranks"),
    ],
)
def test_plan_refuses_what_cannot_be_cut(lengths: list[int], ranks: int, limit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(lengths, ranks, limit)


def test_pack_lays_sequences_behind_each_other_and_pads_with_a_sequence_of_its_own() -> None:
    sequences = [
        PackedSequence([5, 6], [7], {"weight": [0.5]}),
        PackedSequence([99], [98], {"weight": [9.0]}),
        PackedSequence([1], [2, 3, 4], {"weight": [0.1, 0.2, 0.3]}),
    ]
    micro = pack(sequences, [2, 0], 4, 77, CPU)
    assert micro.tokens.tolist() == [[1, 2, 3, 4, 5, 6, 7, 77]]
    assert micro.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 4, 7, 8]
    assert micro.packed.cu_seqlens_q.dtype == torch.int32
    assert (micro.packed.max_seqlen_q, micro.packed.qkv_format) == (4, "thd")
    # The token before a response token predicts it: 1→2, 2→3, 3→4, 6→7.
    assert micro.predict.tolist() == [0, 1, 2, 5]
    assert micro.targets.tolist() == [2, 3, 4, 7]
    assert micro.values["weight"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5])
    assert (micro.lengths, micro.indices) == ([3, 1], [2, 0])


def test_pack_adds_nothing_when_the_tokens_fit() -> None:
    micro = pack([PackedSequence([1, 2], [3, 4])], [0], 4, 77, CPU)
    assert micro.tokens.tolist() == [[1, 2, 3, 4]]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 4]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_pack_never_predicts_across_a_border_or_from_padding(sizes: list[tuple[int, int]], multiple: int) -> None:
    """Tokens are numbered through, so that each prediction can be read off."""
    numbers = iter(range(10_000))
    sequences = [PackedSequence([next(numbers) for _ in range(p)], [next(numbers) for _ in range(r)]) for p, r in sizes]
    micro = pack(sequences, list(range(len(sizes))), multiple, -1, CPU)
    tokens = micro.tokens[0]
    assert len(tokens) % multiple == 0
    assert torch.equal(tokens[micro.predict] + 1, micro.targets)
    assert micro.targets.tolist() == [t for s in sequences for t in s.response]
    starts = micro.packed.cu_seqlens_q.tolist()
    assert starts[-1] == len(tokens)
    assert starts[: len(sizes) + 1] == [sum(p + r for p, r in sizes[:i]) for i in range(len(sizes) + 1)]
