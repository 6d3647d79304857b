"""The SFT stage as a user starts it: equal to transformers' Trainer in any layout, and to itself when it is resumed."""

import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.data.row_order import shuffled
from recipes.run import preemption, records
from tests.megatron_ext.reference import stored
from tests.recipes import tiny
from tests.recipes.kill_check import timeless
from tests.recipes.trained_by_transformers import Trained, train

STEPS, ROWS = 5, 6
SETTINGS = (
    "stage=sft",
    "stage.evaluates=false",
    "stage.sft.epochs=null",
    f"stage.sft.steps={STEPS}",
    f"stage.sft.rows_per_step={ROWS}",
)
RATES = ("stage.sft.learning_rate=1e-3", "stage.sft.min_lr_ratio=0", "stage.sft.warmup_fraction=0.4")
RATES += (
    "stage.sft.decay=cosine",
    "precision=fp32",
    "checkpoint.keep=9",
    "checkpoint.every_steps=1",
    "rollout.max_response_tokens=60",
)
LAYOUTS = {
    "tp2": ("parallel=tp2_sp", "cluster.ranks=2", "parallel.micro_batch_tokens=400"),
    "dp2": ("parallel=tp1", "cluster.ranks=2", "parallel.micro_batch_tokens=128"),
}
TRAINER = {"learning_rate": 1e-3, "warmup_steps": 2, "lr_scheduler_type": "cosine", "max_grad_norm": 1.0}
TRAINER |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.01}
IGNORED = -100


def conversations() -> list[dict[str, Any]]:
    """Answers of 1 to 12 words, and conversations of several turns."""
    rows: list[dict[str, Any]] = [
        {"id": f"s{i}", "prompt": f"the task prompt {i}", "response": " ".join(["the answer", *["word"] * i])}
        for i in range(11)
    ]
    for i in range(4):
        turns = [
            ("user", f"the prompt {i}"),
            ("assistant", "<think>so</think>yes"),
            ("user", "sure?"),
            ("assistant", f"no {i}"),
        ]
        system = [("system", "be brief")] if i % 2 else []
        rows.append({"id": f"m{i}", "messages": [{"role": r, "content": c} for r, c in system + turns]})
    return rows


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    tiny.make(folder)
    tiny.write_rows(folder / "sft.jsonl", conversations())
    tiny.write_rows(folder / "held_out.jsonl", conversations()[9:])
    return folder


def run(twin: Path, run_dir: Path, *options: str) -> Path:
    tiny.complete(
        tiny.overrides(twin, run_dir, *SETTINGS, *RATES, f"stage.sft.held_out={twin / 'held_out.jsonl'}", *options)
    )
    return run_dir


@pytest.fixture(scope="module")
def runs(twin: Path) -> dict[str, Path]:
    return {name: run(twin, twin / name, *options) for name, options in LAYOUTS.items()}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return list(records.read_rows(run_dir / "metrics.jsonl"))


def labelled(tokenizer: Any, row: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole conversation as the template writes it, with labels on the assistant's words and end of turn alone."""
    turns = row.get("messages") or [
        {"role": "user", "content": row["prompt"]},
        {"role": "assistant", "content": row["response"]},
    ]
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        head = tokenizer.encode(f"<|im_start|>{turn['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(turn["content"] + "<|im_end|>", add_special_tokens=False)
        tail = tokenizer.encode("\n", add_special_tokens=False)
        learnt = body if turn["role"] == "assistant" else [IGNORED] * len(body)
        ids += head + body + tail
        labels += [IGNORED] * len(head) + learnt + [IGNORED] * len(tail)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    return {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])}


@pytest.fixture(scope="module")
def expected(twin: Path) -> Trained:
    model = AutoModelForCausalLM.from_pretrained(twin / "model", dtype=torch.float32, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    rows = shuffled(conversations(), 0, STEPS * ROWS, seed=1)
    return train(model, [labelled(tokenizer, dict(row)) for row in rows], ROWS, twin / "trainer", **TRAINER)


def test_it_starts_no_engine(runs: dict[str, Path]) -> None:
    for run_dir in runs.values():
        assert [path.name for path in (run_dir / "logs").glob("engine*")] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_equals_transformers_trainer(runs: dict[str, Path], expected: Trained, layout: str) -> None:
    rows = metrics(runs[layout])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["learning_rate"] for row in rows] == pytest.approx(expected.learning_rate, rel=1e-12)
    assert [row["loss"] for row in rows] == pytest.approx(expected.loss, rel=1e-5)
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected.grad_norm, rel=1e-4)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1, "it learns"
    assert rows[-1]["epoch"] == STEPS * ROWS / 15


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_after_all_steps_equal_transformers_trainers(
    runs: dict[str, Path], expected: Trained, layout: str
) -> None:
    weights = load_file(runs[layout] / "hf" / "model.safetensors")
    start = load_file(runs[layout].parent / "model" / "model.safetensors")
    assert weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        moved = value - start[name].float()
        assert float((weights[name] - value).norm() / moved.norm()) < 1e-3, name


def test_the_held_out_loss_is_the_mean_over_its_answers_tokens(runs: dict[str, Path], twin: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    for run_dir in runs.values():
        model = AutoModelForCausalLM.from_pretrained(run_dir / "hf", dtype=torch.float32)
        total, count = 0.0, 0
        for row in conversations()[9:]:
            inputs = labelled(tokenizer, row)
            learnt = int((inputs["labels"] != IGNORED).sum())
            total, count = total + float(model(**inputs).loss) * learnt, count + learnt
        *before, last = metrics(run_dir)
        assert last["held_out_loss"] == pytest.approx(total / count, rel=1e-5)
        assert all("held_out_loss" not in row for row in before)


@pytest.fixture(scope="module")
def told(twin: Path) -> tuple[Path, tiny.Run, str]:
    """A run whose launcher got SIGUSR1 before the first step: its folder, and what it printed."""
    run_dir = twin / "told"
    held_out = f"stage.sft.held_out={twin / 'held_out.jsonl'}"
    options = (*LAYOUTS["dp2"], "checkpoint.every_steps=9")
    run = tiny.Run(tiny.overrides(twin, run_dir, *SETTINGS, *RATES, held_out, *options))
    try:
        run.wait_for("the ranks", lambda: run.rank(1) and run.rank(0))
        run.process.send_signal(signal.SIGUSR1)
        printed = run.output()
        assert run.remains(10) == ({}, set())
    finally:
        run.kill_all()
    return run_dir, run, printed


def test_a_run_that_is_told_to_end_saves_its_step_and_says_so_by_its_exit_code(
    told: tuple[Path, tiny.Run, str],
) -> None:
    run_dir, run, printed = told
    assert "asked to end by SIGUSR1: step 1 is saved; go on with resume=true" in printed
    assert run.process.returncode == preemption.EXIT_CODE, "rank 0's"
    assert re.search(r"rank 0 \(pid \d+\) ended with exit code 75", (run_dir / "logs" / "launcher.log").read_text())
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_000001"]
    assert [row["step"] for row in metrics(run_dir)] == [1]
    assert not (run_dir / "hf").exists()


def test_a_resumed_run_ends_with_the_bits_of_one_left_alone(
    runs: dict[str, Path], told: tuple[Path, tiny.Run, str], twin: Path
) -> None:
    """From what the run that was told to end left, with a part of a later line, and a checkpoint of step 3 in which a
    bit fell over."""
    alone, resumed = runs["dp2"], told[0]
    shutil.copytree(alone / "checkpoints" / "step_000003", resumed / "checkpoints" / "step_000003")
    damaged = resumed / "checkpoints" / "step_000003" / "rank_00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    lines = (alone / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    first = (resumed / "metrics.jsonl").read_bytes()
    (resumed / "metrics.jsonl").write_bytes(first + lines[1] + lines[2][:20])
    run(twin, resumed, *LAYOUTS["dp2"], "resume=true")
    assert timeless(metrics(alone)) == timeless(metrics(resumed))
    assert (resumed / "hf" / "model.safetensors").read_bytes() == (alone / "hf" / "model.safetensors").read_bytes()
    assert (resumed / "metrics.jsonl").read_bytes().startswith(first), "not begun anew"
    said = (resumed / "logs" / "rank_0.log").read_text()
    assert "checkpoint step_000003 is damaged (rank_00001.safetensors has the checksum" in said
    assert (resumed / "checkpoints" / "damaged_step_000003").is_dir()


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run(twin: Path) -> None:
    """A model with infinite weights has a loss of NaN. Nothing is left behind."""
    run_dir, model = twin / "not_finite", twin / "infinite"
    shutil.copytree(twin / "model", model)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"].fill_(math.inf)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    options = ("optimizer.max_skipped=3", f"model.path={model}")
    held_out = f"stage.sft.held_out={twin / 'held_out.jsonl'}"
    failed = tiny.Run(tiny.overrides(twin, run_dir, *SETTINGS, *RATES, held_out, *LAYOUTS["dp2"], *options))
    try:
        printed = failed.output()
        assert failed.process.returncode == 1
        assert failed.remains(10) == ({}, set())
    finally:
        failed.kill_all()
    assert "3 updates in a row were skipped, optimizer.max_skipped=3; the weights are those before them" in printed
    rows = metrics(run_dir)
    assert [(row["skipped_updates"], row["loss"], row["grad_norm"]) for row in rows] == [(1, None, None)] * 2
    first, last = (stored(run_dir / "checkpoints" / f"step_{step:06d}") for step in (1, 2))
    names = [name for name in first if "/rng." not in name]
    assert len(names) > 20
    assert [name for name in names if not torch.equal(first[name], last[name])] == []
