"""The benchmark of the host's path at a tiny size: real ranks, the same bits and lines on any number of them."""

import json
from pathlib import Path

import pytest

from benchmarks import scale_path
from benchmarks.scale_path import FULL_TOKENS, Case
from tests.megatron_ext import ranks


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("scale_path")
    ranks.run("tests.benchmarks.small_scale_path", folder)
    return json.loads(Path(folder, "measured.json").read_text())


def test_every_replica_trains_on_its_part_and_all_lines_are_written(measured: dict[str, dict]) -> None:
    alone, many = measured["alone"], measured["short"]
    assert len(alone["digests"]) == 1 and len(many["digests"]) == 2, "a tensor-parallel rank has its peers' bits"
    assert many["lines"] == alone["lines"]
    assert abs(many["share"] / alone["share"] - 0.5) < 0.1


def test_of_longer_samples_a_rank_receives_no_more_than_its_part(measured: dict[str, dict]) -> None:
    short, long = measured["short"], measured["long"]
    assert measured["alone"]["received"] == 0
    assert long["received"] - short["received"] < 1.2 * (long["share"] - short["share"])


def test_the_full_case_is_on_the_surface_through_the_measurements() -> None:
    cases = [Case(ranks, 64, tokens) for ranks in (8, 64) for tokens in (512, 1024)]

    def figure(ranks: int, tokens: int) -> float:
        return 3.0 + 0.5 * ranks + 2.0 * tokens + 16.0 * tokens / (ranks / 8)

    def size(ranks: int, tokens: int) -> float:
        return 3.0 + 5.0 * 8 / ranks + 2.0 * tokens + 16.0 * tokens * 8 / ranks

    rows = [
        {"ranks": case.ranks, "samples": 64, "tokens": case.tokens}
        | dict.fromkeys(("seconds", "received"), figure(case.ranks, case.tokens))
        | dict.fromkeys(("peak", "share", "micro_batches"), size(case.ranks, case.tokens))
        for case in cases
    ]
    for row in scale_path.extrapolated(rows):
        assert row["tokens"] == FULL_TOKENS
        assert row["seconds"] == pytest.approx(figure(row["ranks"], FULL_TOKENS))
        assert row["peak"] == pytest.approx(size(row["ranks"], FULL_TOKENS))
