"""Four ranks process prompts between them: each image once, and its pixels go to the ranks that train on it alone."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.megatron_ext import ranks
from tests.recipes import tiny, vision_models
from tests.recipes.shared_processing_ranks import MODELS, RANKS, TENSOR, wants
from tests.recipes.test_processor import CLIPS, ROWS, SIZES

Answers = list[dict[str, Any]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answers]:
    folder = tmp_path_factory.mktemp("shared")
    for name in MODELS:
        (folder / name).mkdir()
        getattr(vision_models, f"make_{name}")(folder / name)
        rows = [*ROWS, *CLIPS] if name == "qwen2_5_vl" else ROWS
        tiny.write_rows(folder / f"{name}.jsonl", [{**row, "id": str(n)} for n, row in enumerate(rows)])
    for n, (width, height) in enumerate(SIZES):
        vision_models.draw(folder / f"i{n}.png", width, height, n)
    for n in range(5):
        vision_models.draw(folder / f"f{n}.png", 90, 64, 20 + n)
    (folder / "damaged.png").write_text("no image")
    ranks.run("tests.recipes.shared_processing_ranks", folder)
    of_ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [answer[name] for answer in of_ranks] for name in MODELS}


def with_media(prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [prompt["vision"] for prompt in prompts if prompt["vision"] is not None]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", ["seen", "held_out_seen"])
def test_the_media_of_a_row_are_processed_once(what: str, model: str, answers: dict[str, Answers]) -> None:
    seen: dict[str, int] = {}
    for answer in answers[model]:
        assert len(answer[what]) <= -(-len(with_media(answer["alone"])) // RANKS), "an even share"
        for row, count in answer[what].items():
            seen[row] = seen.get(row, 0) + count
    rows = [prompt["prompt_id"] for prompt in answers[model][0]["alone"] if prompt["vision"] is not None]
    assert seen == dict.fromkeys(rows, 1)


@pytest.mark.parametrize("model", MODELS)
def test_every_rank_has_the_prompts_that_it_would_make_alone(model: str, answers: dict[str, Answers]) -> None:
    """All but the pixels, whose shape it knows."""
    for answer in answers[model]:
        assert len(answer["prompts"]) == len(answer["alone"])
        for ours, expected in zip(answer["prompts"], answer["alone"], strict=True):
            for name in ("token_ids", "marked_token_ids"):
                assert np.array_equal(ours[name], expected[name]) and ours[name].dtype == expected[name].dtype
            assert [ours[name] for name in ("prompt_id", "images", "videos")] == [
                expected[name] for name in ("prompt_id", "images", "videos")
            ]
        for ours, expected in zip(with_media(answer["prompts"]), with_media(answer["alone"]), strict=True):
            assert ours["placeholders"] == expected["placeholders"] and ours["positions"] == expected["positions"]
            assert (ours["grid"] is None) == (expected["grid"] is None)
            assert ours["grid"] is None or torch.equal(ours["grid"], expected["grid"])
            assert ours["pixels"].shape == expected["pixels"].shape and ours["pixels"].dtype is torch.bfloat16
    for of_prompt in zip(*(with_media(answer["prompts"]) for answer in answers[model]), strict=True):
        assert [vision["pixels"].is_meta for vision in of_prompt].count(False) == 1


@pytest.mark.parametrize("model", MODELS)
def test_the_engines_are_asked_the_held_out_prompts_and_nobody_keeps_their_pixels(
    model: str, answers: dict[str, Answers]
) -> None:
    for answer in answers[model]:
        for ours, expected in zip(answer["held_out"], answer["alone"], strict=True):
            assert np.array_equal(ours["marked_token_ids"], expected["marked_token_ids"])
            assert np.array_equal(ours["token_ids"], expected["token_ids"])
            assert [ours[name] for name in ("prompt_id", "images", "videos")] == [
                expected[name] for name in ("prompt_id", "images", "videos")
            ]
        assert len(answer["kept"]) == len(answer["alone"]) and not any(answer["kept"])


@pytest.mark.parametrize("model", MODELS)
def test_the_ranks_that_train_on_an_image_get_their_parts_of_it_bit_for_bit(
    model: str, answers: dict[str, Answers]
) -> None:
    for first in range(0, RANKS, TENSOR):
        replica = answers[model][first : first + TENSOR]
        expected = with_media(replica[0]["alone"])
        for i, whole in enumerate(expected):
            parts = [with_media(answer["prompts"])[i]["part"] for answer in replica]
            assert [part is not None for part in parts] == [wants(i, first)] * TENSOR
            if wants(i, first):
                together = torch.cat([part.rows for part in parts])[: len(whole["pixels"])]
                assert torch.equal(together, whole["pixels"].to(torch.bfloat16))
                assert len({len(part.rows) for part in parts}) == 1


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_receives_its_parts_of_what_others_have_processed(model: str, answers: dict[str, Answers]) -> None:
    for rank, answer in enumerate(answers[model]):
        lacking = [
            vision["part"].rows.nbytes
            for i, vision in enumerate(with_media(answer["prompts"]))
            if wants(i, rank) and vision["pixels"].is_meta
        ]
        assert lacking and answer["received"] == sum(lacking)


def test_a_damaged_file_ends_every_rank(answers: dict[str, Answers]) -> None:
    errors = [answer["error"] for answer in answers["qwen2_5_vl"]]
    assert "ConfigError" in "".join(errors) and all("damaged.png" in error for error in errors), errors
