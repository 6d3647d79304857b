"""The plan gives every rank as many micro-batches of like cost; a packed micro-batch predicts exactly the response
tokens; and no way of cutting a batch into micro-batches changes its gradient."""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from megatron_ext import platform

platform.activate("cpu")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from megatron_ext import batch as token_batches  # noqa: E402
from megatron_ext import forward_backward, hf_checkpoint, model, packing, parallel  # noqa: E402
from megatron_ext.blocks import region  # noqa: E402
from megatron_ext.packing import (  # noqa: E402
    Cost,
    Part,
    VisionInputs,
    context_slices,
    cost_of,
    divisible_prefix,
    plan,
    sequence_positions,
    unit_costs,
    unit_lengths,
    units_of_shared_prompts,
)
from tests.megatron_ext import cases  # noqa: E402
from tests.megatron_ext.cases import Case  # noqa: E402
from tests.megatron_ext.reference import Pieces, Reference, assemble  # noqa: E402
from tests.sequences import PlainSequence, pack, token_batch  # noqa: E402
from tests.settings import parallel_config, precision_config  # noqa: E402

CPU = torch.device("cpu")
ARCHITECTURES = Path(__file__).resolve().parents[2] / "conf" / "model" / "architectures"
Plan = list[list[list[int]]]


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


def check(micro_batches: Plan, lengths: list[int], ranks: int, limit: int, group: int = 1) -> None:
    """Each sequence once; no micro-batch empty or above the limit; as many on every rank, a multiple of ``group``."""
    assert len(micro_batches) == ranks
    assert Counter(i for rank in micro_batches for micro in rank for i in micro) == Counter(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in micro) <= limit for rank in micro_batches for micro in rank)
    (count,) = {len(rank) for rank in micro_batches}
    assert count > 0
    assert count % group == 0


@given(batches(), st.integers(0, 2))
@settings(max_examples=400, deadline=None)
def test_plan_is_a_partition_within_the_limit_with_equal_counts(batch: tuple[list[int], int, int], power: int) -> None:
    lengths, ranks, limit = batch
    costs = [n**power for n in lengths]
    ranks_plan = plan(lengths, ranks, limit, costs=costs)
    check(ranks_plan, lengths, ranks, limit)
    assert plan(lengths, ranks, limit, costs=costs) == ranks_plan


@given(batches(), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_plan_makes_a_multiple_of_micro_batches_for_the_interleaved_schedule(
    batch: tuple[list[int], int, int], group: int
) -> None:
    """Whenever the sequences are such a multiple, as configurations are made to give."""
    lengths, ranks, limit = batch
    lengths = (lengths * group)[: len(lengths) // (ranks * group) * ranks * group] or lengths[:1] * ranks * group
    check(plan(lengths, ranks, limit, group), lengths, ranks, limit, group)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_number_of_sequences_can_be_shared_out_when_a_micro_batch_takes_two(data: st.DataObject) -> None:
    ranks, group, half = (data.draw(st.integers(1, 5)) for _ in range(3))
    lengths = data.draw(st.lists(st.integers(1, half), min_size=ranks * group, max_size=60))
    check(plan(lengths, ranks, 2 * half, group), lengths, ranks, 2 * half, group)


@given(batches(), st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_ranks_differ_by_less_than_a_micro_batch(batch: tuple[list[int], int, int], power: int) -> None:
    lengths, ranks, limit = batch
    costs = [n**power for n in lengths]
    loads = [sum(costs[i] for indices in rank for i in indices) for rank in plan(lengths, ranks, limit, costs=costs)]
    assert max(loads) - min(loads) < limit**power


def fewest(lengths: list[int], limit: int) -> int:
    """The true least number of packs, by trying all sets that go with the longest sequence."""
    if not lengths:
        return 0
    longest, *others = sorted(lengths, reverse=True)
    partners = [
        set(chosen)
        for size in range(len(others) + 1)
        for chosen in combinations(range(len(others)), size)
        if longest + sum(others[i] for i in chosen) <= limit
    ]
    return 1 + min(fewest([n for i, n in enumerate(others) if i not in chosen], limit) for chosen in partners)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7))
@settings(max_examples=100, deadline=None)
def test_there_are_hardly_more_micro_batches_than_there_must_be(lengths: list[int]) -> None:
    """The bound of best-fit decreasing, 11/9 of the least and 6/9."""
    (micro_batches,) = plan(lengths, 1, 20)
    assert len(micro_batches) <= (11 * fewest(lengths, 20) + 6) / 9


def test_attention_counts() -> None:
    """One long sequence costs as much as four of half its length, where attention is all: it goes alone."""
    lengths = [100, 50, 50, 50, 50]
    by_tokens = [sum(lengths[i] for i in rank[0]) for rank in plan(lengths, 2, 200)]
    assert by_tokens == [150, 150]
    assert sorted(plan(lengths, 2, 200, costs=[n**2 for n in lengths])) == [[[0]], [[1, 2, 3, 4]]]


def test_a_very_long_sequence_goes_with_lighter_micro_batches() -> None:
    """It costs more than other micro-batches, and nothing can be taken from it."""
    lengths = [100, *[10] * 60]
    costs = [6 * n + n**2 // 10 for n in lengths]
    ranks_plan = plan(lengths, 3, 200, group=2, costs=costs)
    check(ranks_plan, lengths, 3, 200, 2)
    loads = [sum(costs[i] for indices in rank for i in indices) for rank in ranks_plan]
    assert max(loads) - min(loads) <= costs[1]
    (long_one,) = (rank for rank in ranks_plan if [0] in rank)
    assert sum(len(indices) for indices in long_one) < 20


def test_plan_of_long_and_short_sequences_has_no_empty_micro_batch() -> None:
    """By tokens alone rank 1 would get two sequences, where rank 0 needs three micro-batches."""
    lengths = [100, 100, 51, 51, 51, 1]
    check(plan(lengths, 2, 100), lengths, 2, 100)


def test_a_micro_batch_is_split_where_others_are_wanted() -> None:
    ranks_plan = plan([100, 1, 1, 1], 2, 200, group=2)
    assert sorted(micro for rank in ranks_plan for micro in rank) == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("lengths", "ranks", "limit", "group", "message"),
    [
        ([4, 9, 3], 1, 8, 1, r"parallel\.micro_batch_tokens=8 is below a sequence of 9 tokens"),
        ([4], 2, 8, 1, r"1 sequences for 2 micro-batches, 1 on each of 2 .* use a multiple of 2 "),
        ([5, 5, 5], 2, 8, 1, r"3 sequences for 4 micro-batches, 2 on each of 2 .* use a multiple of 2 "),
        ([8, 8, 8], 1, 8, 2, r"3 sequences for 4 micro-batches, 4 on each of 1 .* use a multiple of 2 "),
        ([], 1, 8, 1, r"0 sequences for 1 micro-batches"),
    ],
)
def test_plan_refuses_what_cannot_be_cut(lengths: list[int], ranks: int, limit: int, group: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(lengths, ranks, limit, group)


def test_the_divisible_prefix_takes_no_more_than_the_plan_needs() -> None:
    assert divisible_prefix([5, 5, 5, 5], 2, 2, 8) == 2
    assert divisible_prefix([5, 5, 5, 5], 3, 2, 8) == 4, "three are two micro-batches on a rank and one on the other"
    assert divisible_prefix([5, 3, 5, 5], 3, 2, 8) == 3
    assert divisible_prefix([5, 5, 5, 5], 0, 2, 8) == 2, "no rank goes without"


@given(batches(), st.integers(0, 40), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_the_divisible_prefix_is_the_least_that_can_be_planned(
    batch: tuple[list[int], int, int], wanted: int, group: int
) -> None:
    lengths, ranks, limit = batch
    lengths = lengths * group
    count = divisible_prefix(lengths, wanted, ranks, limit, group)
    check(plan(lengths[:count], ranks, limit, group), lengths[:count], ranks, limit, group)
    for fewer in range(max(1, wanted), count):
        with pytest.raises(ValueError, match="sequences for"):
            plan(lengths[:fewer], ranks, limit, group)


@pytest.mark.parametrize("file", sorted(ARCHITECTURES.glob("*.json")), ids=lambda file: file.stem)
def test_costs_of_the_recipes_models_are_those_of_their_parameters(file: Path) -> None:
    """Every matrix of transformers' own layers takes two operations for each token forward, and four backward."""
    raw = json.loads(file.read_text())
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        named = AutoModel.from_config(config).named_parameters()
    matrices = {name: p.numel() for name, p in named if p.dim() == 2}
    tower = {n: size for n, size in matrices.items() if "visual.blocks" in n or "vision_tower.encoder" in n}
    decoder = {n: size for n, size in matrices.items() if "layers." in n and n not in tower}
    assert bool(tower) == ("vision_config" in raw)
    text = config.get_text_config()
    trained, frozen = cost_of(config, ()), cost_of(config, ("vision",))
    assert trained.token == 6 * sum(decoder.values())
    assert trained.response == 6 * text.hidden_size * text.vocab_size
    assert trained.image == 4 * 6 * sum(tower.values()), "four patches are a token"
    assert frozen == Cost(trained.token, trained.square, trained.response, 0), "it runs before the passes"


def test_cost_equals_the_operations_that_torch_counts() -> None:
    """Eager attention computes what the causal mask leaves out, and keeps its scores where flash attention makes them
    again: 6 products instead of half of 7."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    twin, cost = LlamaForCausalLM(config), cost_of(config, ())
    for tokens in (5, 24):
        with FlopCounterMode(display=False) as counter:
            twin(torch.zeros(1, tokens, dtype=torch.long)).logits.sum().backward()
        counted = counter.get_total_flops() - cost.square // 7 * 12 * tokens**2
        assert counted == (cost.token + cost.response) * tokens
    vision = VisionInputs(torch.zeros(8, 1), None, [1, 2], None)
    costs = Cost(token=1000, square=100, response=10, image=1).of(
        token_batch([PlainSequence([0] * 4, [0] * 3, vision=vision)])
    )[0]
    assert costs == 1000 * 7 + 100 * 49 + 10 * 3 + 2


@pytest.fixture
def alone() -> Iterator[parallel.Parallel]:
    """This process as the only rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield parallel.initialize(parallel_config(distributed_optimizer=False), seed=1, timeout_seconds=60)
    finally:
        parallel.destroy()


def gradients(built: model.Model, sequences: list[PlainSequence], ranks: Plan) -> tuple[float, Pieces]:
    """Loss and gradients of the sequences cut by a plan, whose ranks' micro-batches run one after the other."""
    batches = [pack(sequences, indices, 4, 0, "cpu") for rank in ranks for indices in rank]
    sums = forward_backward.accumulate_gradients(
        built, batches, lambda log_probs, batch: (-(log_probs * batch.values["weight"]).sum(), {})
    )
    main_grads = [p.main_grad for chunk in built.chunks for p in chunk.module.parameters()]
    return sums["loss"], [
        (block.hf_name, block.hf_start, gradient[region(block.local_start, block.shape)].clone())
        for shard, gradient in zip(built.shards, main_grads, strict=True)
        for block in shard.blocks
    ]


def random_plan(seed: int, count: int) -> Plan:
    """A random order, cut at random places."""
    draw = random.Random(seed)
    order = draw.sample(range(count), count)
    cuts = [0, *sorted(draw.sample(range(1, count), draw.randrange(1, count - 1))), count]
    return [[order[a:b] for a, b in pairwise(cuts)]]


def test_gradients_of_packed_sequences_are_those_of_unpacked_ones_however_the_batch_is_cut(
    alone: parallel.Parallel, twins: Path, reference: Callable[[Case], Reference]
) -> None:
    """FP32: sums in another order differ by rounding alone. Hugging Face's gradients, one sequence at a time, are
    computed by other operations and get a wider bound."""
    case = cases.by_name("one")
    sequences = cases.batch(case)
    lengths = [len(s) for s in sequences]
    every = list(range(len(sequences)))
    squares = [n**2 for n in lengths]
    plans: dict[str, Plan] = {
        "unpacked": [[[i] for i in every]],
        "all in one": [[every]],
        "reversed": [[every[::-1]]],
        **{
            f"{ranks} ranks, {limit} tokens": plan(lengths, ranks, limit)
            for ranks, limit in ((1, 64), (2, 64), (3, 80))
        },
        "4 ranks, attention": plan(lengths, 4, 64, costs=squares),
        "6 virtual stages": plan(lengths, 1, 64, group=6),
        **{f"random {seed}": random_plan(seed, len(every)) for seed in range(4)},
    }
    assert len({str(ranks) for ranks in plans.values()}) == len(plans)
    built = model.build(hf_checkpoint.config(twins / case.twin), alone, precision_config("fp32"))
    hf_checkpoint.load(built.shards, twins / case.twin)
    pieces_of_plans = {name: gradients(built, sequences, ranks) for name, ranks in plans.items()}
    expected = reference(case)
    assembled = {name: assemble(pieces, expected.start) for name, (_, pieces) in pieces_of_plans.items()}

    def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        """‖one − other‖ / ‖other‖ of the tensor where it is the greatest."""
        return max(float((one[name] - g).norm() / g.norm()) for name, g in other.items())

    assert {n: d for n in plans if (d := furthest(assembled[n], assembled["unpacked"])) > 1e-6} == {}
    assert furthest(assembled["unpacked"], expected.gradients) < 5e-6
    losses = {name: loss for name, (loss, _) in pieces_of_plans.items()}
    assert losses == pytest.approx(dict.fromkeys(plans, expected.loss[0]), abs=2e-6)


def test_pack_lays_sequences_one_after_another_and_pads_with_a_sequence_of_its_own() -> None:
    sequences = [
        PlainSequence([5, 6], [7], {"weight": [0.5]}),
        PlainSequence([99], [98], {"weight": [9.0]}),
        PlainSequence([1], [2, 3, 4], {"weight": [0.1, 0.2, 0.3]}),
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
    assert (micro.lengths.tolist(), micro.indices) == ([3, 1], [2, 0])
    assert (micro.response_lengths.tolist(), micro.owners.tolist()) == ([3, 1], [0, 0, 0, 1])


def test_pack_adds_nothing_when_the_tokens_fit() -> None:
    micro = pack([PlainSequence([1, 2], [3, 4])], [0], 4, 77, CPU)
    assert micro.tokens.tolist() == [[1, 2, 3, 4]]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 4]


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 3),
    st.integers(0, 40),
)
@settings(max_examples=100, deadline=None)
def test_a_pack_of_constant_length_has_padding_in_sequences_not_longer_than_its_own(
    sizes: list[tuple[int, int]], context: int, padding: int
) -> None:
    """So neither ``max_seqlen`` nor the attention of a real sequence sees it; what is predicted stays."""
    numbers = iter(range(10_000))
    sequences = [PlainSequence([next(numbers) for _ in range(p)], [next(numbers) for _ in range(r)]) for p, r in sizes]
    indices = list(range(len(sizes)))
    cuts = 2 * context if context > 1 else 1
    plain = pack(sequences, indices, 1, -1, CPU, context)
    starts = plain.packed.cu_seqlens_q.tolist()
    length = starts[-1] + padding * cuts
    for rank in range(context):
        plain = pack(sequences, indices, 1, -1, CPU, context, rank)
        micro = pack(sequences, indices, 1, -1, CPU, context, rank, length=length)
        assert micro.tokens.shape == (1, length // context) == micro.positions.shape[1:]
        begins = micro.packed.cu_seqlens_q.tolist()
        assert begins[: len(starts)] == starts and begins[-1] == length
        longest = max(end - start for start, end in pairwise(starts))
        assert all(0 < end - start <= longest and (end - start) % cuts == 0 for start, end in pairwise(begins))
        assert micro.packed.max_seqlen_q == micro.packed.max_seqlen_kv == longest
        width = plain.tokens.shape[1]
        assert torch.equal(micro.tokens[:, :width], plain.tokens) and micro.tokens[:, width:].eq(-1).all()
        assert torch.equal(micro.positions[..., :width], plain.positions)
        assert micro.packed.positions.max() < longest
        for name in ("predict", "targets", "places"):
            assert torch.equal(getattr(micro, name), getattr(plain, name))
        assert torch.equal(micro.lengths, plain.lengths) and micro.indices == plain.indices


def test_padding_is_cut_into_pieces_of_the_longest_sequence() -> None:
    micro = pack([PlainSequence([1, 2], [3, 4]), PlainSequence([5], [6])], [0, 1], 1, 77, CPU, length=13)
    assert micro.tokens.tolist() == [[1, 2, 3, 4, 5, 6, *[77] * 7]]
    assert micro.positions[0].tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 1, 2]]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 4, 6, 10, 13]
    assert micro.packed.max_seqlen_q == 4


def test_a_pack_that_is_too_long_for_the_constant_length_is_refused() -> None:
    with pytest.raises(AssertionError, match="sequences of 4 tokens in a pack of 3"):
        pack([PlainSequence([1, 2], [3, 4])], [0], 1, 77, CPU, length=3)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_pack_never_predicts_across_a_border_or_from_padding(sizes: list[tuple[int, int]], multiple: int) -> None:
    """Tokens are numbered through, so that each prediction can be read off."""
    numbers = iter(range(10_000))
    sequences = [PlainSequence([next(numbers) for _ in range(p)], [next(numbers) for _ in range(r)]) for p, r in sizes]
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
        PlainSequence(
            [next(numbers) for _ in range(p)], responses := [next(numbers) for _ in range(r)], {"own": responses}
        )
        for p, r in sizes
    ]
    packed = pack(sequences, list(range(len(sizes))), multiple * context, -1, CPU)
    ranks = [pack(sequences, list(range(len(sizes))), multiple, -1, CPU, context, rank) for rank in range(context)]
    assert len({rank.tokens.shape for rank in ranks}) == 1
    assert ranks[0].tokens.shape[1] % multiple == 0
    starts = ranks[0].packed.cu_seqlens_q.tolist()
    slices = [context_slices(starts, context, rank) for rank in range(context)]
    assert sorted(at for places in slices for at in places) == list(range(starts[-1]))
    for rank, places in zip(ranks, slices, strict=True):
        assert torch.equal(rank.tokens[0][rank.predict] + 1, rank.targets)
        assert rank.values["own"].tolist() == rank.targets.tolist()
        assert rank.owners.bincount(minlength=len(sizes)).tolist() == rank.lengths.tolist()
        assert rank.response_lengths.tolist() == [r for _, r in sizes]
        begins = np.asarray(starts)[np.searchsorted(starts, places, side="right") - 1]
        assert rank.positions.shape == (3, 1, len(places)) and torch.equal(rank.positions[0, 0], rank.packed.positions)
        # Padding after a sequence counts from 0 again.
        is_token = rank.tokens[0].numpy() != -1
        assert rank.packed.positions.numpy()[is_token].tolist() == (np.asarray(places) - begins)[is_token].tolist()
    assert sorted(t for rank in ranks for t in rank.targets.tolist()) == packed.targets.tolist()


def test_context_slices_are_the_same_distance_from_either_end() -> None:
    assert context_slices([0, 8, 12], 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_slices([0, 8, 12], 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


def images(pixels: list[float], places: list[int], positions: list[list[int]] | None = None) -> VisionInputs:
    """Inputs of a tower that gives one row for each pixel."""
    return VisionInputs(torch.tensor(pixels).unsqueeze(1), torch.tensor([[1, 1, len(pixels)]]), places, positions)


class GridTower:
    """One whose layout is the grid."""

    dtype = torch.bfloat16

    def layout(self, grid: torch.Tensor | None, on_device: packing.OnDevice) -> torch.Tensor:
        assert grid is not None
        return on_device(grid)


@pytest.mark.parametrize("context", [1, 2])
def test_each_row_of_the_tower_goes_to_the_token_it_was_made_for(context: int) -> None:
    """A placeholder token has the number of its pixel."""
    sequences = [
        PlainSequence([10, 1, 2, 11], [12, 13], vision=images([1.0, 2.0], [1, 2])),
        PlainSequence([20], [21, 22]),
        PlainSequence([3, 30, 4, 5], [31], vision=images([3.0, 4.0, 5.0], [0, 2, 3])),
    ]
    token_places = []
    for rank in range(context):
        micro = pack(sequences, [2, 1, 0], 1, -1, CPU, context, rank, tower=GridTower())
        assert micro.vision is not None
        assert micro.vision.images.flatten().tolist() == [3, 4, 5, 1, 2], "in the order of the pack, whole on each rank"
        assert micro.vision.layout.tolist() == [[1, 1, 3], [1, 1, 2]]
        rows = micro.vision.images[micro.vision.rows].flatten()
        assert rows.dtype is torch.bfloat16, "in the tower's precision"
        assert torch.equal(rows.float(), micro.tokens[0][micro.vision.places].float())
        token_places += rows.tolist()
    assert sorted(token_places) == [1, 2, 3, 4, 5]
    assert pack(sequences, [1], 1, -1, CPU, tower=GridTower()).vision is None
    assert pack(sequences, [2, 1, 0], 1, -1, CPU).vision is None, "only where the model has its tower"


def test_what_the_encoder_made_comes_from_the_ranks_parts() -> None:
    """Of three prompts' rows, 5, 1 and 2 of them, on three ranks: together and in order they are the whole."""
    whole = [torch.arange(10.0 * n, 10.0 * n + count).unsqueeze(1) for n, count in enumerate((5, 1, 2))]
    packed = []
    for rank in range(3):
        sequences = [
            PlainSequence([9] * len(rows), [1], vision=images([0.0] * len(rows), list(range(len(rows)))))
            for rows in whole
        ]
        for sequence, rows in zip(sequences, whole, strict=True):
            sequence.vision.encoded = Part.of(rows, rank, 3)
        packed.append(pack(sequences, [2, 0, 1], 1, -1, CPU, tower=GridTower(), encoded=True).vision)
    assert [len(rank.images) for rank in packed] == [1 + 2 + 1] * 3
    gathered = torch.cat([rank.images for rank in packed])
    for rank in packed:
        assert gathered[rank.order].flatten().tolist() == [20, 21, 0, 1, 2, 3, 4, 10]
        assert rank.encoded and rank.layout is None


def test_positions_go_on_after_the_greatest_of_the_prompt() -> None:
    """Qwen2.5-VL's: an image of 1 x 2 x 2 rows advances by its longest side, not by its tokens."""
    prompt = [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    vision = images([0.0] * 4, [1, 2, 3, 4], prompt)
    assert sequence_positions(8, vision).tolist() == [[*axis, 4, 5] for axis in prompt]
    sequence = PlainSequence([0] * 6, [0, 0], vision=vision)
    micro = pack([sequence, PlainSequence([0], [0])], [1, 0], 4, -1, CPU)
    assert micro.positions.squeeze(1).tolist() == [[0, 1, *axis, 4, 5, 0, 1] for axis in prompt]


@st.composite
def groups(draw: st.DrawFn) -> tuple[token_batches.TokenBatch, int, int]:
    """(batch, data-parallel ranks, limit): one to six prompts with one to eight responses each, in any order."""
    prompt_index = draw(
        st.lists(st.integers(0, 5), min_size=1, max_size=6).flatmap(
            lambda p: st.permutations(p * draw(st.integers(1, 8)))
        )
    )
    prompts = [token_batches.Prompt(f"p{n}", np.zeros(draw(st.integers(1, 12)), np.int32)) for n in range(6)]
    responses = [[0] * draw(st.integers(0, 12)) for _ in prompt_index]
    batch = token_batches.build(prompts, responses, prompt_index=prompt_index)
    ranks = draw(st.integers(1, min(4, len(batch))))
    longest = int(batch.lengths.max())
    return batch, ranks, draw(st.integers(2 * longest, 8 * longest))


@given(groups())
@settings(max_examples=200, deadline=None)
def test_responses_to_a_prompt_are_units_that_can_be_shared_out(
    drawn: tuple[token_batches.TokenBatch, int, int],
) -> None:
    batch, ranks, limit = drawn
    chosen = units_of_shared_prompts(batch, ranks, limit)
    assert sorted(i for unit in chosen for i in unit) == list(range(len(batch)))
    lengths = unit_lengths(batch, chosen, 1, True)
    cost = Cost(token=1, square=0, response=0, image=0)
    assert unit_costs(batch, chosen, cost, True) == lengths
    for unit, length in zip(chosen, lengths, strict=True):
        (prompt,) = {int(batch.prompt_index[i]) for i in unit}
        tokens = len(batch.prompts[prompt].token_ids) + sum(int(batch.response_lengths[i]) for i in unit)
        assert length == tokens <= limit
    check(plan(lengths, ranks, limit), lengths, ranks, limit)


def test_a_unit_costs_its_causal_products() -> None:
    """A prompt of 3 tokens sees 1 + 2 + 3 of them; a response of 2 after it 4 + 5, and again 4 + 5 beside another. The
    square's cost stands for two such products of a pair of tokens."""
    prompt = token_batches.Prompt("p", np.zeros(3, np.int32))
    batch = token_batches.build([prompt], [[0, 0], [0, 0]], prompt_index=[0, 0])
    squares = Cost(token=0, square=1, response=0, image=0)
    assert unit_costs(batch, [[0, 1]], squares, True) == [3**2 + 2 * (5**2 - 3**2)]
    assert unit_costs(batch, [[0, 1]], squares, False) == [2 * 5**2]


def test_responses_to_a_prompt_are_one_sequence() -> None:
    """The prompt's last token predicts the first one of each response; positions go on from the prompt's end; padding
    is a sequence of its own."""
    prompts = [token_batches.Prompt("p", np.array([5, 6, 7])), token_batches.Prompt("q", np.array([8]))]
    batch = token_batches.build(prompts, [[10, 11], [20], [30, 31, 32]], prompt_index=[0, 1, 0])
    micro = packing.pack(batch, [0, 2, 1], multiple=4, pad_token=0, shared_prompts=True)
    assert micro.tokens.tolist() == [[5, 6, 7, 10, 11, 30, 31, 32, 8, 20, 0, 0]]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 8, 10, 12]
    assert micro.packed.segments.tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 0, 1, 0, 0]
    assert micro.packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 0, 1]
    assert micro.predict.tolist() == [2, 3, 2, 5, 6, 8]
    assert micro.targets.tolist() == [10, 11, 30, 31, 32, 20]
    assert micro.lengths.tolist() == [2, 3, 1] and micro.indices == [0, 2, 1]
    assert micro.places.tolist() == [0, 1, 3, 4, 5, 2]
