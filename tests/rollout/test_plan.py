"""The plan, on plain tensors: whatever the two layouts are, each element arrives exactly once and in its place."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.blocks import Block
from rollout.weight_sync.layout import LayoutError, ParameterLayout, Rectangle, Region
from rollout.weight_sync.plan import Plan, build_plan, tensor_shapes


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


def emulate(plan: Plan, local, layouts):
    """Pack, copy and return every worker's parameters."""
    buffers = [torch.full((size // 4,), math.nan) for size in plan.buffer_bytes]
    for piece in plan.pieces:
        sender = piece.holders[0]
        here = tuple(slice(o, o + n) for o, n in zip(sender.local_start, piece.rectangle.shape, strict=True))
        target = buffers[sender.rank][piece.offset // 4 : piece.offset // 4 + piece.rectangle.size]
        assert target.isnan().all(), "two pieces share a place in a buffer"
        target.view(piece.rectangle.shape).copy_(local[sender.rank, sender.shard][here])
    results = []
    for worker, copies in zip(layouts, plan.copies, strict=True):
        parameters = {parameter.name: torch.full(parameter.shape, math.nan) for parameter in worker}
        for copy in copies:
            piece = plan.pieces[copy.piece]
            offset = piece.offset // 4
            packed = buffers[piece.holders[0].rank][offset : offset + piece.rectangle.size].view(piece.rectangle.shape)
            there = tuple(slice(o, o + n) for o, n in zip(copy.parameter_start, copy.shape, strict=True))
            assert parameters[copy.parameter][there].isnan().all(), "an element arrives twice"
            here = tuple(slice(o, o + n) for o, n in zip(copy.start, copy.shape, strict=True))
            parameters[copy.parameter][there] = packed[here]
        results.append(parameters)
    return results


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

    plan = build_plan(tables, layouts)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert tensor_shapes(tables) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert sum(p.rectangle.size for p in plan.pieces) == sum(t.numel() for t in tensors.values()), "sent exactly once"

    for worker, parameters in zip(layouts, emulate(plan, local, layouts), strict=True):
        for parameter in worker:
            expected = torch.full(parameter.shape, math.nan)
            for region in parameter.regions:
                there = tuple(slice(o, o + n) for o, n in zip(region.start, region.shape, strict=True))
                here = tuple(slice(o, o + n) for o, n in zip(region.hf_start, region.shape, strict=True))
                expected[there] = tensors[region.hf_name][here]
            torch.testing.assert_close(parameters[parameter.name], expected, rtol=0, atol=0, equal_nan=True)


def whole(name, shape, rank_local=None):
    return (name, Block(name, (0,) * len(shape), rank_local or (0,) * len(shape), shape))


def one_worker(*parameters):
    regions = [
        ParameterLayout(name, shape, "float32", (Region((0,) * len(shape), hf, (0,) * len(shape), shape),), ())
        for name, hf, shape in parameters
    ]
    return [regions]


def test_replicas_share_the_sending():
    """Eight equal tensors held by all of four ranks: each rank sends two."""
    table = [whole(f"t{i}", (16, 16)) for i in range(8)]
    plan = build_plan([table] * 4, one_worker(*((f"p{i}", f"t{i}", (16, 16)) for i in range(8))))
    assert plan.buffer_bytes == (2 * 1024,) * 4
    assert plan.placed_bytes() == 8 * 1024
    assert all(len(piece.holders) == 4 for piece in plan.pieces)


@pytest.mark.parametrize(
    ("tables", "layouts", "message"),
    [
        ([[whole("a", (4,))]], one_worker(("p", "b", (4,))), "p needs b, which no trainer rank holds"),
        ([[whole("a", (4,)), whole("b", (4,))]], one_worker(("p", "a", (4,))), "b: vLLM takes no element of it"),
        (
            [[("s", Block("a", (2,), (0,), (2,)))]],
            one_worker(("p", "a", (4,))),
            r"a of shape \(4,\): no trainer rank holds",
        ),
        ([[whole("a", (4,))]], one_worker(("p", "a", (3,))), r"a, as vLLM's workers take it, .*only 3 of 4"),
        (
            [[whole("a", (4,))]],
            one_worker(("p", "a", (4,)), ("q", "a", (2,))),
            "a, as vLLM's workers take it, .*same elements",
        ),
        (
            [[whole("a", (4,)), ("s", Block("a", (0, 0), (0, 0), (4, 1)))]],
            [[]],
            "a: blocks with 1 and with 2 dimensions",
        ),
    ],
)
def test_gaps_overlaps_and_strangers_are_named(tables, layouts, message):
    with pytest.raises(LayoutError, match=message):
        build_plan(tables, layouts)


def test_a_tensor_that_vllm_keeps_in_two_dtypes_is_refused():
    two = [
        ParameterLayout(name, (4,), dtype, (Region((0,), "a", (0,), (4,)),), ())
        for name, dtype in (("p", "float32"), ("q", "bfloat16"))
    ]
    with pytest.raises(LayoutError, match=r"a: vLLM holds it as \['bfloat16', 'float32'\]"):
        build_plan([[whole("a", (4,))]], [two])
