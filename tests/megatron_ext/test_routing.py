"""Each of four ranks gets the tokens that it wants, wherever they are, and no others."""

from collections.abc import Callable
from typing import Any

import pytest

from megatron_ext.batch import TokenBatch
from tests.megatron_ext import routes

Results = Callable[[str], list[dict[str, Any]]]


def test_a_rank_gets_the_tokens_that_it_wants_bit_for_bit_and_no_others(results: Results) -> None:
    whole = routes.whole()
    for rank, result in enumerate(results("routing")):
        expected = [routes.holding(whole, wanted[rank]).to_bytes() for wanted in routes.wishes()]
        assert result["exchanged"] == expected


def test_a_rank_receives_what_it_lacks(results: Results) -> None:
    """Bytes of messages with tokens; a token has 4 + 4 + 1 of its own and 4 of each column."""
    for rank, result in enumerate(results("routing")):
        held = [rank in holders for holders in routes.HOLDERS]
        for wanted, received in zip(routes.wishes(), result["received"], strict=True):
            lacking = [
                length for length, want, has in zip(routes.LENGTHS, wanted[rank], held, strict=True) if want and not has
            ]
            assert received == 17 * sum(lacking)


def test_the_first_rank_that_holds_a_response_is_its_holder(results: Results) -> None:
    expected = [min(holders, default=0) for holders in routes.HOLDERS]
    assert [result["holders"] for result in results("routing")] == [expected] * routes.RANKS


def test_tokens_that_nobody_holds_are_missed_by_all(results: Results) -> None:
    message = "ValueError: no rank holds the tokens of response ('p0', 0)"
    assert [result["lost"] for result in results("routing")] == [message] * routes.RANKS


def test_what_is_not_held_is_known_by_its_length_and_refuses_its_tokens() -> None:
    whole = routes.whole()
    wanted = [i % 3 == 0 or length == 0 for i, length in enumerate(routes.LENGTHS)]
    part = TokenBatch.from_bytes(routes.holding(whole, wanted).to_bytes())
    assert part.held.tolist() == wanted
    assert part.response_lengths.tolist() == routes.LENGTHS
    assert part.trained_lengths.tolist() == whole.trained_lengths.tolist()
    assert part.lengths.tolist() == whole.lengths.tolist()
    assert part.values("weights").tolist() == routes.holding(whole, wanted).values("weights").tolist()
    with pytest.raises(LookupError, match=r"the tokens of response \('p0', 0\) are on other ranks"):
        part.tokens_of(1)
    masked = part.without_loss(part.prompt_index == 1)
    assert masked.trained_lengths.tolist() == [0 if 4 <= i < 8 else n for i, n in enumerate(part.trained_lengths)]
    assert not any(masked.loss_mask[masked.tokens_of(i)].any() for i in (5, 6))
