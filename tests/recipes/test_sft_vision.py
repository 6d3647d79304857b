"""SFT on rows with images, as a user starts it, equals transformers' Trainer on what transformers' processor makes."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from recipes.data.row_order import shuffled
from recipes.run import records
from tests.recipes import tiny, vision_models
from tests.recipes.trained_by_transformers import train

STEPS, ROWS = 2, 4
SETTINGS = (
    "stage=sft",
    "stage.evaluates=false",
    "stage.sft.epochs=null",
    f"stage.sft.steps={STEPS}",
    f"stage.sft.rows_per_step={ROWS}",
)
SETTINGS += ("stage.sft.aggregation=sequence_mean_token_mean",)  # what the Trainer does with this family
# The Trainer finds norms by their names, and would decay the tower's, called norm1, norm2 and ln_q; we decay no norm.
SETTINGS += ("optimizer.weight_decay=0",)
SETTINGS += ("stage.sft.learning_rate=1e-3", "stage.sft.decay=constant", "stage.sft.warmup_fraction=0")
SETTINGS += ("parallel=tp2_sp", "cluster.ranks=2", "precision=fp32", "checkpoint.every_steps=9")
LENGTHS = ("data.max_prompt_tokens=300", "parallel.micro_batch_tokens=512", "rollout.max_response_tokens=40")
SIZES = [(112, 84), (56, 56), (140, 60)]


def make_rows(folder: Path) -> list[dict[str, Any]]:
    for n, (width, height) in enumerate(SIZES):
        vision_models.draw(folder / f"i{n}.png", width, height, n)
    return [
        {"id": "one", "prompt": "what is <image>?", "images": ["i0.png"], "response": "the task"},
        {"id": "two", "prompt": "<image> and <image>", "images": ["i1.png", "i2.png"], "response": "the answer is two"},
        {"id": "text", "prompt": "the task prompt", "response": "the answer"},
        {"id": "wide", "prompt": "<image> the prompt", "images": ["i2.png"], "response": "an answer of some words"},
    ]


def labelled(processor: Any, row: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """As the model takes it, with labels on the answer and its end of turn alone."""
    parts: list[dict[str, Any]] = []
    for i, text in enumerate(row["prompt"].split("<image>")):
        parts += [{"type": "image"}] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": row["response"]}]
    images = [Image.open(folder / name) for name in row.get("images", [])]
    text = processor.apply_chat_template(turns, tokenize=False)
    inputs = dict(processor(text=[text], images=images or None, return_tensors="pt"))
    learnt = len(processor.tokenizer.encode(row["response"] + "<|im_end|>", add_special_tokens=False))
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1 - learnt : -1] = inputs["input_ids"][0, -1 - learnt : -1]
    assert processor.tokenizer.decode(labels[0, -1 - learnt : -1]) == row["response"] + "<|im_end|>"
    return inputs | {"labels": labels}


def test_losses_gradients_and_weights_equal_transformers_trainer(tmp_path: Path) -> None:
    tiny.make(tmp_path)
    folder = vision_models.make_qwen2_5_vl(tmp_path / "sees")
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    )
    model.save_pretrained(folder)
    rows = make_rows(tmp_path)
    tiny.write_rows(tmp_path / "sft.jsonl", rows)
    tiny.complete(tiny.overrides(tmp_path, tmp_path / "run", f"model.path={folder}", *SETTINGS, *LENGTHS))
    metrics = list(records.read_rows(tmp_path / "run" / "metrics.jsonl"))

    processor = AutoProcessor.from_pretrained(folder)
    batches = [labelled(processor, dict(row), tmp_path) for row in shuffled(rows, 0, STEPS * ROWS, seed=1)]
    start = {name: value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    options = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.0}
    expected = train(model, batches, ROWS, tmp_path / "trainer", **options, adam_beta2=0.95)
    model.save_pretrained(tmp_path / "expected")

    assert max(abs(row["loss"] - loss) for row, loss in zip(metrics, expected.loss, strict=True)) < 1e-4
    for row, norm in zip(metrics, expected.grad_norm, strict=True):
        assert abs(row["grad_norm"] / norm - 1) < 1e-3
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("run/hf", "expected"))
    assert ours.keys() == theirs.keys()
    apart = {n: float((ours[n] - v).norm() / (v - start[n]).norm()) for n, v in theirs.items() if (v != start[n]).any()}
    assert any("visual" in name for name in apart), "the tower learns as well"
    assert {name: distance for name, distance in apart.items() if distance > 1e-3} == {}
