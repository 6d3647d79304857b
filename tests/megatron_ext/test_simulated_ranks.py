"""What a replica's ranks hold is compared with the checkpoint element by element; whole models: test_preflight.py."""

from types import SimpleNamespace
from typing import Any

from megatron_ext.blocks import Block
from recipes.preflight.simulated_ranks import Coverage, distinct_ranks
from tests.settings import parallel_config

EXPECTED = {"matrix": (4, 6), "norm": (6,)}
NORM = Block("norm", (0,), (0,), (6,))


def rank(stage: int, *blocks: Block) -> Any:
    """A rank whose parameters have these blocks."""
    shards = [SimpleNamespace(blocks=(block,)) for block in blocks]
    return SimpleNamespace(shards=shards, parallel=SimpleNamespace(pipeline_rank=stage))


def rows(first: int, count: int, name: str = "matrix") -> Block:
    return Block(name, (first, 0), (0, 0), (count, 6))


def compare(*ranks: Any, tied: bool = False) -> dict[str, Any]:
    coverage = Coverage()
    for one in ranks:
        coverage.add(one)
    return coverage.compare(EXPECTED, tied)


def test_a_cut_matrix_and_a_replicated_norm_are_whole() -> None:
    coverage = compare(rank(0, rows(0, 2), NORM), rank(0, rows(2, 2), NORM))
    assert coverage == {"expected": 2, "covered": 2, "missing": [], "unexpected": [], "duplicated": []}


def test_a_rank_that_holds_another_ones_rows_leaves_a_hole() -> None:
    coverage = compare(rank(0, rows(0, 2), NORM), rank(0, rows(0, 2), NORM))
    assert coverage["missing"] == ["matrix"]
    assert coverage["covered"] == 1


def test_rows_on_two_ranks_are_duplicated_even_where_sizes_add_up() -> None:
    coverage = compare(rank(0, rows(0, 3), NORM), rank(0, rows(2, 1), NORM))
    assert coverage["duplicated"] == ["matrix"]


def test_a_tensor_on_two_stages_is_duplicated_unless_it_is_tied() -> None:
    ranks = rank(0, rows(0, 4), NORM), rank(1, rows(0, 4))
    assert compare(*ranks)["duplicated"] == ["matrix"]
    assert compare(*ranks, tied=True)["covered"] == 2


def test_twice_on_one_rank_is_duplicated() -> None:
    assert compare(rank(0, rows(0, 4), rows(0, 4), NORM))["duplicated"] == ["matrix"]


def test_rows_outside_the_tensor_are_missing_inside() -> None:
    assert compare(rank(0, rows(2, 4), NORM))["missing"] == ["matrix"]


def test_other_names_are_missing_and_unexpected() -> None:
    coverage = compare(rank(0, rows(0, 4, "matrx"), NORM))
    assert (coverage["missing"], coverage["unexpected"]) == (["matrix"], ["matrx"])


def test_distinct_ranks_have_each_stage_and_tensor_rank_once() -> None:
    """16 ranks, TP 2, CP 2, PP 2, so DP 2: Megatron-Core counts tensor, context, data, pipeline."""
    assert distinct_ranks(16, parallel_config(tensor=2, context=2, pipeline=2)) == [0, 1, 8, 9]
