"""The plan gives every rank as many micro-batches; a packed micro-batch predicts exactly the response tokens."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.packing import PackedSequence, VisionInputs, context_slices, pack, plan

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


@given(batches(), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_plan_makes_a_multiple_of_micro_batches_for_the_interleaved_schedule(
    batch: tuple[list[int], int, int], group: int
) -> None:
    """Whenever each rank's sequences are such a multiple, as configurations are made to give."""
    lengths, ranks, limit = batch
    lengths = (lengths * group)[: len(lengths) // (ranks * group) * ranks * group] or lengths[:1] * ranks * group
    found = plan(lengths, ranks, limit, group)
    assert {len(rank) % group for rank in found} == {0}
    assert Counter(i for rank in found for micro in rank for i in micro) == Counter(range(len(lengths)))
    assert all(sum(lengths[i] for i in micro) <= limit for rank in found for micro in rank)


def test_plan_refuses_more_micro_batches_than_sequences() -> None:
    with pytest.raises(ValueError, match=r"3 sequences for each .* parallel\.pipeline=2 micro-batches, 4"):
        plan([8, 8, 8], 1, 8, group=2)


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
    assert micro.positions.tolist() == [[[0, 1, 2, 3, 0, 1, 2, 0]]] * 3
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


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_context_ranks_share_the_tokens_and_predictions_out(
    sizes: list[tuple[int, int]], multiple: int, context: int
) -> None:
    """Each token of the pack on one rank, as many everywhere; a response token predicted once, by the one before it."""
    numbers = iter(range(10_000))
    sequences = [
        PackedSequence(
            [next(numbers) for _ in range(p)], responses := [next(numbers) for _ in range(r)], {"own": responses}
        )
        for p, r in sizes
    ]
    whole = pack(sequences, list(range(len(sizes))), multiple * context, -1, CPU)
    ranks = [pack(sequences, list(range(len(sizes))), multiple, -1, CPU, context, rank) for rank in range(context)]
    assert len({rank.tokens.shape for rank in ranks}) == 1
    assert ranks[0].tokens.shape[1] % multiple == 0
    starts = ranks[0].packed.cu_seqlens_q.tolist()
    slices = [context_slices(starts, context, rank) for rank in range(context)]
    assert sorted(at for places in slices for at in places) == list(range(starts[-1]))
    for rank in ranks:
        assert torch.equal(rank.tokens[0][rank.predict] + 1, rank.targets)
        assert rank.values["own"].tolist() == rank.targets.tolist()
        assert sum(rank.lengths) == len(rank.targets)
        assert rank.positions.shape == (3, 1, starts[-1])
    assert sorted(t for rank in ranks for t in rank.targets.tolist()) == whole.targets.tolist()


def test_context_slices_are_the_same_distance_from_either_end() -> None:
    assert context_slices([0, 8, 12], 2, 0) == [0, 1, 6, 7, 8, 11]
    assert context_slices([0, 8, 12], 2, 1) == [2, 3, 4, 5, 9, 10]


def images(pixels: list[float], places: list[int], positions: list[list[int]] | None = None) -> VisionInputs:
    """Inputs of a tower that gives one row for each pixel."""
    return VisionInputs(torch.tensor(pixels).unsqueeze(1), torch.tensor([[1, 1, len(pixels)]]), places, positions)


@pytest.mark.parametrize("context", [1, 2])
def test_each_row_of_the_tower_goes_to_the_token_it_was_made_for(context: int) -> None:
    """A placeholder token has the number of its pixel."""
    sequences = [
        PackedSequence([10, 1, 2, 11], [12, 13], vision=images([1.0, 2.0], [1, 2])),
        PackedSequence([20], [21, 22]),
        PackedSequence([3, 30, 4, 5], [31], vision=images([3.0, 4.0, 5.0], [0, 2, 3])),
    ]
    found = []
    for rank in range(context):
        micro = pack(sequences, [2, 1, 0], 1, -1, CPU, context, rank)
        assert micro.vision is not None and micro.vision.grid is not None
        assert micro.vision.pixels.flatten().tolist() == [3, 4, 5, 1, 2], "in the order of the pack, whole on each rank"
        assert micro.vision.grid.tolist() == [[1, 1, 3], [1, 1, 2]]
        rows = micro.vision.pixels[micro.vision.rows].flatten()
        assert torch.equal(rows, micro.tokens[0][micro.vision.places].float())
        found += rows.tolist()
    assert sorted(found) == [1, 2, 3, 4, 5]
    assert pack(sequences, [1], 1, -1, CPU).vision is None


def test_positions_go_on_behind_the_greatest_of_the_prompt() -> None:
    """Qwen2.5-VL's: an image of 1 x 2 x 2 rows advances by its longest side, not by its tokens."""
    prompt = [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    sequence = PackedSequence([0] * 6, [0, 0], vision=images([0.0] * 4, [1, 2, 3, 4], prompt))
    assert sequence.positions() == [[*axis, 4, 5] for axis in prompt]
    micro = pack([sequence, PackedSequence([0], [0])], [1, 0], 4, -1, CPU)
    assert micro.positions.squeeze(1).tolist() == [[0, 1, *axis, 4, 5, 0, 1] for axis in prompt]
