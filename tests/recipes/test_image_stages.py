"""SFT, reward models and value models process an image on one rank, and end with the bits of ranks that all process
every image."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.megatron_ext import ranks
from tests.recipes import tiny, vision_models
from tests.recipes.image_stages_ranks import CASES, RANKS

SIZES = [(112, 84), (56, 56), (140, 60), (84, 84), (60, 112)]
NAMES = [f"{stage} {layout}" for stage, layout in CASES]
PROMPTS: list[dict[str, Any]] = [
    {"id": "one", "prompt": "what is <image>?", "images": ["i0.png"]},
    {"id": "two", "prompt": "<image> and <image>", "images": ["i1.png", "i2.png"]},
    {"id": "text", "prompt": "the task prompt"},
    {"id": "wide", "prompt": "<image> the prompt", "images": ["i2.png"]},
    {"id": "clip", "prompt": "<video> shows?", "videos": [["f0.png", "f1.png"]]},
    {"id": "high", "prompt": "the task is <image>", "images": ["i4.png"]},
    {"id": "square", "prompt": "<image>", "images": ["i3.png"]},
]
TURNS = [
    {"role": "user", "content": "see <image>"},
    {"role": "assistant", "content": "the answer"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "no"},
]


def make_rows(folder: Path) -> None:
    """For each stage, with a held-out part whose size is no multiple of what the ranks share."""
    answers = [{**row, "response": f"the answer {row['id']}"} for row in PROMPTS]
    tiny.write_rows(folder / "sft.jsonl", [*answers, {"id": "turns", "messages": TURNS, "images": ["i3.png"]}])
    tiny.write_rows(folder / "sft_held_out.jsonl", answers[:3])
    pairs = [{**row, "chosen": "an answer of some words", "rejected": f"no {row['id']}"} for row in PROMPTS]
    tiny.write_rows(folder / "pairs.jsonl", pairs)
    tiny.write_rows(folder / "pairs_held_out.jsonl", pairs[:3])
    tiny.write_rows(folder / "prompts.jsonl", [{**row, "label": "l", "kind": "k"} for row in PROMPTS])
    chance = torch.Generator().manual_seed(0)
    samples = [
        {
            "step": 1,
            "prompt_id": row["id"],
            "sample_index": index,
            "prompt": row["prompt"],
            "response": " ".join(["the answer", *["word"] * index]),
            "verdicts": {"safety": {"score": float(torch.rand((), generator=chance)), "label": "", "raw": ""}},
        }
        for row in PROMPTS
        for index in range(3)
    ]
    tiny.write_rows(folder / "samples.jsonl", samples)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """By case, of each rank."""
    folder = tmp_path_factory.mktemp("stages")
    tiny.make(folder)
    for n, (width, height) in enumerate(SIZES):
        vision_models.draw(folder / f"i{n}.png", width, height, n)
    for n in range(2):
        vision_models.draw(folder / f"f{n}.png", 90, 64, 20 + n)
    make_rows(folder)
    source = vision_models.make_qwen2_5_vl(folder / "sees")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2  # for two pipeline stages
    config["text_config"].pop("layer_types", None)
    (source / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig.from_pretrained(source))
    model.to(torch.bfloat16).save_pretrained(source)
    kept = [
        o for o in tiny.overrides(folder, folder / "run") if not o.startswith(("--", "stage.", "rewards=", "model."))
    ]
    options = {
        # A step of more rows than there are, so that one comes again in it.
        "sft": ["stage.sft.epochs=null", "stage.sft.steps=2", "stage.sft.rows_per_step=16"],
        "reward_model": ["stage.reward_model.epochs=null", "stage.reward_model.steps=2"],
        "value_model": ["stage.value_model.epochs=null", "stage.value_model.steps=2"],
    }
    options["sft"] += ["stage.evaluates=false", f"stage.sft.held_out={folder / 'sft_held_out.jsonl'}"]
    options["reward_model"] += [
        "stage.reward_model.pairs_per_step=8",
        f"stage.reward_model.pairs={folder / 'pairs.jsonl'}",
    ]
    options["reward_model"] += [
        f"stage.reward_model.held_out={folder / 'pairs_held_out.jsonl'}",
        "model.frozen=[vision]",
    ]
    options["value_model"] += ["stage.value_model.rollouts_per_step=8", "stage.value_model.held_out_share=0.4"]
    options["value_model"] += [f"stage.value_model.rollouts={folder / 'samples.jsonl'}"]
    options["value_model"] += [
        "stage.value_model.principles={safety:[safety],value:[],knowledge:[]}",
        f"data.prompts={folder / 'prompts.jsonl'}",
    ]
    everywhere = ["parallel=tp1", f"cluster.ranks={RANKS}", "precision=bf16", f"model.path={source}", "model.frozen=[]"]
    everywhere += ["data.max_prompt_tokens=300", "parallel.micro_batch_tokens=512"]
    (folder / "overrides.json").write_text(json.dumps({"all": [*kept, *everywhere], **options}))
    (folder / "run").mkdir()
    ranks.run("tests.recipes.image_stages_ranks", folder)
    of_ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return {name: [answer[name] for answer in of_ranks] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_metrics_and_weights_are_bit_for_bit_those_of_ranks_that_process_every_image(
    name: str, answers: dict[str, list[dict[str, Any]]]
) -> None:
    for answer in answers[name]:
        shared, alone = answer["shared"], answer["alone"]
        assert shared["metrics"] == alone["metrics"]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(shared["weights"], alone["weights"], strict=True))
        assert len(shared["metrics"]) == 2 and math.isfinite(shared["metrics"][-1]["held_out_loss"])
        assert all(line["grad_norm"] > 0 and not line["skipped_updates"] for line in shared["metrics"])


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_a_batch_is_processed_by_one_rank(name: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    of_ranks = [answer["shared"]["processed"] for answer in answers[name]]
    assert len(of_ranks[0]) == 3, "two steps and the held-out rows"
    for calls in zip(*of_ranks, strict=True):
        processed = [row for call in calls for row, count in call["seen"].items() for _ in range(count)]
        assert sorted(processed) == calls[0]["asked"] != []


@pytest.mark.parametrize("name", NAMES)
def test_pixels_come_to_the_ranks_that_train_on_them_alone(name: str, answers: dict[str, list[dict[str, Any]]]) -> None:
    for answer in answers[name]:
        for batch in answer["shared"]["packed"]:
            assert batch["has"] == batch["wanted"]
            assert batch["received"] == batch["lacked"]
    assert any(batch["received"] for answer in answers[name] for batch in answer["shared"]["packed"])
    assert not any(batch["received"] for answer in answers[name] for batch in answer["alone"]["packed"])
