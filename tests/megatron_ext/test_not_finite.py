"""A loss that is not finite on one rank: no rank makes the update."""

import math

from tests.megatron_ext.vl_twins import Results


def test_a_nan_on_one_rank_changes_nothing_on_any_and_training_goes_on(results: Results) -> None:
    ranks = results("not-finite")
    assert len(ranks) == 4
    for rank in ranks:
        assert math.isnan(rank["poisoned"][1])
        assert rank["weights"] and rank["moments"] and rank["updates"] == 0
        assert rank["again"] == rank["alone"] and rank["same"]
