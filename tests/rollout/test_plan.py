"""The plan, on plain tensors: whatever the two layouts are, each element arrives exactly once and in its place."""

import itertools
import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.blocks import Block
from rollout.weight_sync import planner
from rollout.weight_sync.layout import LayoutError, ParameterLayout, Rectangle, Region
from rollout.weight_sync.plan import Place, Plan, Topology
from rollout.weight_sync.planner import build_plan, cached_plan, tensor_shapes
from rollout.weight_sync.schedule import ALIGNMENT


def cut(draw, extent: int, parts: int) -> list[tuple[int, int]]:
    """Up to ``parts`` non-empty intervals that tile ``range(extent)``."""
    cuts = sorted({0, extent, *draw(st.lists(st.integers(0, extent), min_size=parts - 1, max_size=parts - 1))})
    return list(itertools.pairwise(cuts))


def along(shape, dim, a, b):
    start = tuple(a if d == dim else 0 for d in range(len(shape)))
    return start, tuple(b - a if d == dim else n for d, n in enumerate(shape))


@st.composite
def trainer_side(draw, tensors):
    """Tables of 1–4 ranks and their local tensors: each HF tensor cut along some dimension (or not), the parts dealt to
    ranks, some of them to several, each at a random offset of a local shard whose other elements are NaN."""
    ranks = draw(st.integers(1, 4))
    tables, local = [[] for _ in range(ranks)], {}
    for name, tensor in tensors.items():
        dim = draw(st.integers(0, tensor.ndim - 1))
        for i, (a, b) in enumerate(cut(draw, tensor.shape[dim], draw(st.integers(1, 3)))):
            start, shape = along(tensor.shape, dim, a, b)
            for rank in draw(st.sets(st.integers(0, ranks - 1), min_size=1)):
                at = tuple(draw(st.integers(0, 2)) for _ in shape)
                shard = torch.full([n + o + draw(st.integers(0, 2)) for n, o in zip(shape, at, strict=True)], math.nan)
                shard[tuple(slice(o, o + n) for o, n in zip(at, shape, strict=True))] = tensor[
                    tuple(slice(o, o + n) for o, n in zip(start, shape, strict=True))
                ]
                tables[rank].append((f"{name}/{i}", Block(name, start, at, shape)))
                local[rank, f"{name}/{i}"] = shard
    return tables, local


@st.composite
def engine_side(draw, tensors):
    """Layouts of 1–3 workers: tensors fused two at a time along the first dimension, each worker with its part or all
    workers with everything, and zero rows at the end as padding."""
    workers = draw(st.integers(1, 3))
    layouts = [[] for _ in range(workers)]
    names = list(tensors)
    for i in range(0, len(names), 2):
        group = names[i : i + 2]
        if any(tensors[name].shape[1:] != tensors[group[0]].shape[1:] for name in group):
            group = group[:1] if i % 4 else group[1:]
        replicated = draw(st.booleans())
        parts = {name: cut(draw, tensors[name].shape[0], 1 if replicated else workers) for name in group}
        for worker in range(workers):
            regions, row = [], 0
            for name in group:
                share = 0 if replicated else worker
                if share < len(parts[name]):
                    start, shape = along(tensors[name].shape, 0, *parts[name][share])
                    regions.append(Region(along(tensors[name].shape, 0, row, row)[0], name, start, shape))
                    row += shape[0]
            tail = tuple(tensors[group[0]].shape[1:])
            pad = draw(st.integers(0, 2))
            padding = (Rectangle((row, *(0 for _ in tail)), (pad, *tail)),) if pad else ()
            if row:
                layouts[worker].append(
                    ParameterLayout("+".join(group), (row + pad, *tail), "float32", tuple(regions), padding)
                )
    return layouts


def used(layouts):
    return {region.hf_name for worker in layouts for parameter in worker for region in parameter.regions}


def rectangle(start, shape):
    return tuple(slice(o, o + n) for o, n in zip(start, shape, strict=True))


def emulate(plan: Plan, topology: Topology, local, layouts):
    """Do as the plan says, round by round with two slots a rank, and return every engine's workers' parameters."""
    slots = [[torch.full((size // 4,), math.nan) for _ in range(2)] for size in plan.slot_bytes]
    results = [
        [{parameter.name: torch.full(parameter.shape, math.nan) for parameter in worker} for worker in layouts]
        for _ in topology.engines
    ]

    def place(e, w, item, values):
        target = results[e][w][item.parameter][rectangle(item.parameter_start, item.shape)]
        assert target.isnan().all(), "an element arrives twice"
        target.copy_(values)

    for e, engine in enumerate(topology.engines):
        for w, worker in enumerate(engine):
            for copy in plan.copies[e][w]:
                assert topology.ranks[copy.rank].host == worker.host
                place(e, w, copy, local[copy.rank, copy.shard][rectangle(copy.local_start, copy.shape)])
    for t in range(plan.rounds):
        now = [pair[t % 2].fill_(math.nan) for pair in slots]
        before = [pair[1 - t % 2] for pair in slots]
        for rank, sends in enumerate(plan.sends):
            for p in (send for send in sends if send.round == t):
                target = now[rank][p.offset // 4 :][: math.prod(p.shape)]
                assert target.isnan().all(), "two chunks share a place in a slot"
                target.copy_(local[rank, p.shard][rectangle(p.local_start, p.shape)].flatten())
        for m in (m for m in plan.messages if m.round == t):
            assert topology.ranks[m.sender].host != topology.ranks[m.receiver].host
            source = (before if m.forwarded else now)[m.sender][m.sender_offset // 4 :][: m.size // 4]
            target = now[m.receiver][m.receiver_offset // 4 :][: m.size // 4]
            assert target.isnan().all(), "two messages share a place in a slot"
            target.copy_(source)
        for e, engine in enumerate(topology.engines):
            for w, worker in enumerate(engine):
                for a in (a for a in plan.recvs[e][w] if a.round == t):
                    assert topology.ranks[a.rank].host == worker.host
                    place(e, w, a, now[a.rank][a.offset // 4 :][: math.prod(a.shape)].view(a.shape))
    return results


@st.composite
def places(draw, ranks, workers):
    """Up to three hosts with at least one rank each; one to three engines, each on one of these hosts or on several."""
    hosts = [draw(st.integers(0, 2)) for _ in range(ranks)]
    used = st.sampled_from(sorted(set(hosts)))
    device = st.sampled_from(["0", "1"])
    engines = [
        tuple(Place(f"h{draw(used)}", draw(device)) for _ in range(workers)) for _ in range(draw(st.integers(1, 3)))
    ]
    return Topology(tuple(Place(f"h{host}", draw(device)) for host in hosts), tuple(engines))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_two_layouts_compose(data):
    widths = st.integers(1, 4)
    shapes = data.draw(
        st.lists(st.one_of(st.tuples(widths), st.tuples(st.integers(1, 9), widths)), min_size=2, max_size=6)
    )
    tensors = {
        f"t{i}": torch.arange(1.0, 1 + math.prod(shape)).view(shape) + 1000 * i for i, shape in enumerate(shapes)
    }
    layouts = data.draw(engine_side(tensors))
    tensors = {name: tensor for name, tensor in tensors.items() if name in used(layouts)}
    tables, local = data.draw(trainer_side(tensors))

    topology = data.draw(places(len(tables), len(layouts)))
    bucket = data.draw(st.sampled_from([ALIGNMENT, 2 * ALIGNMENT, 1 << 20]))
    plan = build_plan(tables, layouts, topology, bucket)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert tensor_shapes(tables) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert sum(math.prod(p.shape) for p in plan.pieces) == sum(t.numel() for t in tensors.values())
    assert max(plan.slot_bytes) <= bucket

    received = emulate(plan, topology, local, layouts)
    assert plan.placed_bytes == 4 * sum(
        int((~p.isnan()).sum()) for engine in received for worker in engine for p in worker.values()
    )
    for engine in received:
        for worker, parameters in zip(layouts, engine, strict=True):
            for parameter in worker:
                expected = torch.full(parameter.shape, math.nan)
                for region in parameter.regions:
                    there, here = rectangle(region.start, region.shape), rectangle(region.hf_start, region.shape)
                    expected[there] = tensors[region.hf_name][here]
                torch.testing.assert_close(parameters[parameter.name], expected, rtol=0, atol=0, equal_nan=True)


def full_tensor(name, shape, rank_local=None):
    return (name, Block(name, (0,) * len(shape), rank_local or (0,) * len(shape), shape))


def one_worker(*parameters):
    regions = [
        ParameterLayout(name, shape, "float32", (Region((0,) * len(shape), hf, (0,) * len(shape), shape),), ())
        for name, hf, shape in parameters
    ]
    return [regions]


HERE, THERE = Place("here", "0"), Place("there", "0")


def one_engine(ranks: int) -> Topology:
    return Topology((HERE,) * ranks, ((HERE,),))


def equal_tensors(count: int):
    """``count`` tensors of 1 KiB, held whole by a rank, and one worker that wants them."""
    table = [full_tensor(f"t{i}", (16, 16)) for i in range(count)]
    return table, one_worker(*((f"p{i}", f"t{i}", (16, 16)) for i in range(count)))


def test_on_one_host_nothing_is_packed_and_replicas_share_the_reading() -> None:
    """Eight equal tensors held by all of four ranks: each rank gives two."""
    table, worker = equal_tensors(8)
    plan = build_plan([table] * 4, worker, one_engine(4), 1 << 20)
    assert Counter(copy.rank for copy in plan.copies[0][0]) == dict.fromkeys(range(4), 2)
    assert (plan.rounds, plan.slot_bytes, plan.placed_bytes) == (0, (0,) * 4, 8 * 1024)
    assert all(len(piece.holders) == 4 for piece in plan.pieces)


def test_a_rank_on_the_workers_own_device_is_read_first() -> None:
    table, worker = equal_tensors(4)
    topology = Topology((Place("here", "0"), Place("here", "1")), ((Place("here", "1"),),))
    plan = build_plan([table] * 2, worker, topology, 1 << 20)
    assert {copy.rank for copy in plan.copies[0][0]} == {1}


def test_ranks_share_what_goes_to_other_devices_whatever_they_give_to_their_own() -> None:
    """Two ranks hold one tensor, two the other, and an engine on each one's device wants both."""
    table, worker = equal_tensors(2)
    places = tuple(Place("here", str(i)) for i in range(4))
    tables = [[table[i // 2]] for i in range(4)]
    plan = build_plan(tables, worker, Topology(places, tuple((place,) for place in places)), 1 << 20)
    read = Counter((copy.rank, e) for e in range(4) for copy in plan.copies[e][0])
    assert all(read[i, i] == 1 for i in range(4)), "its own half from its own device"
    assert [sum(n for (rank, e), n in read.items() if rank == i != e) for i in range(4)] == [1, 1, 1, 1]


def test_what_crosses_the_network_crosses_once_for_a_host_and_holders_share_the_sending() -> None:
    """Two holders here; two ranks and two engines there: 8 KiB cross, 4 from each holder, 4 to each receiver."""
    table, worker = equal_tensors(8)
    topology = Topology((HERE, HERE, THERE, THERE), ((THERE,), (THERE,)))
    plan = build_plan([table, table, [], []], worker, topology, 8 * 1024)
    sent, received = Counter(), Counter()
    for message in plan.messages:
        sent[message.sender] += message.size
        received[message.receiver] += message.size
    assert sent == {0: 4096, 1: 4096} and received == {2: 4096, 3: 4096}
    assert [len(plan.recvs[e][0]) for e in range(2)] == [8, 8] and plan.copies == (((),), ((),))


def test_one_holder_and_many_hosts_make_a_chain_many_holders_do_not() -> None:
    """64 KiB from one rank to six hosts: sending each its own takes 6 x 64 KiB of one link, handing on 64 KiB and five
    rounds more. With six holders each sends to one host."""
    table, worker = equal_tensors(64)
    hosts = [Place(f"h{i}", "0") for i in range(6)]
    engines = tuple((host,) for host in hosts)
    chain = build_plan([table, *([[]] * 6)], worker, Topology((HERE, *hosts), engines), 8 * 1024)
    assert sum(m.size for m in chain.messages if m.sender == 0) == 64 * 1024
    assert {m.forwarded for m in chain.messages if m.sender == 0} == {False}
    assert sum(m.size for m in chain.messages if m.forwarded) == 5 * 64 * 1024
    assert chain.rounds == 8 + 5
    split = build_plan([*([table] * 6), *([[]] * 6)], worker, Topology((*(HERE,) * 6, *hosts), engines), 8 * 1024)
    assert not any(m.forwarded for m in split.messages)
    assert {rank: sum(m.size for m in split.messages if m.sender == rank) for rank in range(6)} == dict.fromkeys(
        range(6), 64 * 1024
    )


def test_a_plan_is_taken_from_its_file(tmp_path, monkeypatch) -> None:
    table, worker = equal_tensors(3)
    planned = cached_plan([table], worker, one_engine(1), 1024, tmp_path)
    assert planned == build_plan([table], worker, one_engine(1), 1024)
    monkeypatch.setattr(planner, "build_plan", None)
    assert cached_plan([table], worker, one_engine(1), 1024, tmp_path) == planned
    with pytest.raises(TypeError):
        cached_plan([table], worker, one_engine(1), 2048, tmp_path)  # another bucket, so another plan


def test_a_host_with_engines_and_no_rank_is_named() -> None:
    table, worker = equal_tensors(1)
    with pytest.raises(LayoutError, match="engine 0 is on host there, where no rank runs: start one there"):
        build_plan([table], worker, Topology((HERE,), ((THERE,),)), 1024)


@pytest.mark.parametrize(
    ("tables", "layouts", "message"),
    [
        ([[full_tensor("a", (4,))]], one_worker(("p", "b", (4,))), "p needs b, which no trainer rank holds"),
        (
            [[full_tensor("a", (4,)), full_tensor("b", (4,))]],
            one_worker(("p", "a", (4,))),
            "b: vLLM takes no element of it",
        ),
        (
            [[("s", Block("a", (2,), (0,), (2,)))]],
            one_worker(("p", "a", (4,))),
            r"a of shape \(4,\): no trainer rank holds",
        ),
        ([[full_tensor("a", (4,))]], one_worker(("p", "a", (3,))), r"a, as vLLM's workers take it, .*only 3 of 4"),
        (
            [[full_tensor("a", (4,))]],
            one_worker(("p", "a", (4,)), ("q", "a", (2,))),
            "a, as vLLM's workers take it, .*same elements",
        ),
        (
            [[full_tensor("a", (4,)), ("s", Block("a", (0, 0), (0, 0), (4, 1)))]],
            [[]],
            "a: blocks with 1 and with 2 dimensions",
        ),
    ],
)
def test_gaps_overlaps_and_strangers_are_named(tables, layouts, message):
    with pytest.raises(LayoutError, match=message):
        build_plan(tables, layouts, one_engine(len(tables)), 1024)


def test_a_tensor_that_vllm_keeps_in_two_dtypes_is_refused():
    two = [
        ParameterLayout(name, (4,), dtype, (Region((0,), "a", (0,), (4,)),), ())
        for name, dtype in (("p", "float32"), ("q", "bfloat16"))
    ]
    with pytest.raises(LayoutError, match=r"a: vLLM holds it as \['bfloat16', 'float32'\]"):
        build_plan([[full_tensor("a", (4,))]], [two], Topology((HERE,), ((HERE, HERE),)), 1024)


@pytest.mark.parametrize("staged", [True, False])
def test_staged_parameters_arrive_one_after_the_other(staged: bool) -> None:
    """16 layers of fused parameters, each of a large and a small tensor, are sent over the network.

    With staging the partially received parameters take a few buckets of memory. In the order of size alone, most of the
    model is partially received at once.
    """
    bucket, layers = 1 << 12, 16
    tables, layout = [[]], []
    for i in range(layers):
        regions, row = [], 0
        for part, rows in (("q", 24), ("k", 4), ("v", 4)):
            name = f"{i}.{part}"
            tables[0].append((name, Block(name, (0, 0), (0, 0), (rows, 32))))
            regions.append(Region((row, 0), name, (0, 0), (rows, 32)))
            row += rows
        layout.append(ParameterLayout(f"{i}.qkv", (row, 32), "float32", tuple(regions), (), staged))
    topology = Topology((Place("a", "0"), Place("b", "0")), ((Place("b", "0"),),))
    plan = build_plan([*tables, []], [layout], topology, bucket)
    rounds = {}
    for recv in plan.recvs[0][0]:
        rounds.setdefault(recv.parameter, set()).add(recv.round)
    partial_counts = [sum(min(r) <= t <= max(r) for r in rounds.values()) for t in range(plan.rounds)]
    size, model = 32 * 32 * 4, layers * 32 * 32 * 4
    assert plan.rounds >= model / bucket and len(rounds) == layers
    if staged:
        assert max(partial_counts) * size <= 2 * bucket + size
    else:
        assert max(partial_counts) * size > model / 2
