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


def test_of_an_images_pixels_each_rank_of_a_replica_gets_its_part(measured: dict[str, dict]) -> None:
    """An image of 112 x 112 pixels has 64 patches of 1,176 numbers: a rank of eight trains on 8 of them, in two bytes
    each, and of four prompts on four at most. Beside its parts it receives descriptions of the prompts."""
    alone, many = measured["images alone"], measured["images"]
    prompt = 64 * 1176 * 2
    assert alone["share"] - measured["alone"]["share"] == 4 * prompt
    tokens = 9 * 64 * 62  # of all samples; the replicas may have others than without images
    assert many["share"] - measured["short"]["share"] < 4 * prompt // 8 + tokens
    assert many["received"] - measured["short"]["received"] < 4 * prompt // 8 + 150_000
    assert len(alone["digests"]) == 1 and len(many["digests"]) == 16, "a part of the pixels is another on each rank"
    assert measured["processed alone"]["bytes"] == 4 * 64 * 1176 * 4, "in FP32"
    assert measured["processed alone"]["seconds"] > 0


def test_a_line_goes_through_the_image_cases_and_says_how_far_off_it_is() -> None:
    rows = [
        {"ranks": ranks, "samples": samples, "tokens": 64}
        | dict.fromkeys(scale_path.SIZES, 5.0 + ranks * samples)
        | {"seconds": 1.0 + samples + (samples == 128)}
        for ranks in (8, 64)
        for samples in (64, 128, 192)
    ]
    full, residuals = scale_path.extrapolated_images(rows, 1024)
    assert [row["received"] for row in full] == pytest.approx([5.0 + 8 * 1024, 5.0 + 64 * 1024])
    # The middle of three figures is 1 too high: the line is a third above the others and two thirds below it.
    assert residuals["8"]["seconds"] == pytest.approx((2 / 3) / (1 + 128 + 1), rel=0.01)
    assert residuals["8"]["received"] < 1e-9


def test_the_full_case_is_on_the_surface_through_the_measurements() -> None:
    cases = [Case(ranks, 64, tokens) for ranks in (8, 64) for tokens in (512, 1024, 2048)]

    def figure(ranks: int, tokens: int) -> float:
        return 3.0 + 0.5 * ranks + 2.0 * tokens + 16.0 * tokens / (ranks / 8)

    def size(ranks: int, tokens: int) -> float:
        return 3.0 + 5.0 * 8 / ranks + 2.0 * tokens + 16.0 * tokens * 8 / ranks

    rows = [
        {"ranks": case.ranks, "samples": 64, "tokens": case.tokens}
        | dict.fromkeys(("seconds", "streamed", "received"), figure(case.ranks, case.tokens))
        | dict.fromkeys(("peak", "share", "micro_batches"), size(case.ranks, case.tokens))
        for case in cases
    ]
    full, residuals = scale_path.extrapolated(rows)
    assert max(residuals.values()) < 1e-9
    rows[1]["seconds"] *= 1.1
    assert 0.01 < scale_path.extrapolated(rows)[1]["seconds"] < 0.1, "a figure that is off the surface is seen"
    for row in full:
        assert row["tokens"] == FULL_TOKENS
        assert row["seconds"] == pytest.approx(figure(row["ranks"], FULL_TOKENS))
        assert row["peak"] == pytest.approx(size(row["ranks"], FULL_TOKENS))
