"""Small messages between four ranks: values arrive everywhere, and so does an error on rank 0."""

from collections.abc import Callable
from typing import Any

Results = Callable[[str], list[dict[str, Any]]]


def test_all_gather_json_gives_every_value_in_rank_order(results: Results) -> None:
    expected = [["ö" * length * rank for rank in range(4)] for length in (1, 170)]
    assert [rank["gathered"] for rank in results("collectives")] == [expected] * 4


def test_from_rank_zero_gives_its_result_to_all(results: Results) -> None:
    expected = {"who": 0, "many": list(range(1000))}
    assert [rank["from_rank_zero"] for rank in results("collectives")] == [expected] * 4


def test_an_error_on_rank_zero_is_raised_on_all(results: Results) -> None:
    answers = results("collectives")
    message = "RuntimeError: rank 0: OSError: the engine is gone"
    assert [rank["error"] for rank in answers] == ["OSError: the engine is gone", message, message, message]
    assert [rank["after_error"] for rank in answers] == ["goes on"] * 4
