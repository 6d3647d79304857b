"""The reward-model stage as a user starts it: its updates, its export, and what a real `vllm serve` makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from recipes.data.row_order import shuffled
from recipes.run import exports, records
from rewards import registry, settings
from rewards.client import Client
from rewards.serve import JudgeServer, Supervisor
from rewards.verdict import Verdict
from tests.recipes import tiny
from tests.recipes.plain_adamw import adamw
from tests.rewards.fake_server import free_port

STEPS, PAIRS, LEARNING_RATE = 4, 4, 2e-3
OPTIONS = (
    "stage=reward_model",
    "stage.reward_model.epochs=null",
    f"stage.reward_model.steps={STEPS}",
    "precision=fp32",
)
OPTIONS += (f"stage.reward_model.pairs_per_step={PAIRS}", f"stage.reward_model.learning_rate={LEARNING_RATE}")
OPTIONS += ("stage.reward_model.decay=constant", "stage.reward_model.warmup_fraction=0", "checkpoint.keep=9")
LAYOUTS = {
    "cp2": ("parallel=tp1", "parallel.context=2", "cluster.ranks=2", "parallel.micro_batch_tokens=256"),
    "dp2": ("parallel=tp1", "cluster.ranks=2", "parallel.micro_batch_tokens=128"),
}


def preferences(first: int, count: int) -> list[dict[str, Any]]:
    """Longer answers are the better ones; some think before."""
    thought = "<think>hm</think>"
    return [
        {
            "id": f"p{i}",
            "prompt": f"the task prompt {i % 5}",
            "chosen": (thought if i % 3 == 0 else "") + " ".join(["an answer", *["word"] * (2 + i % 4)]),
            "rejected": "answer" if i % 2 else "no answer",
        }
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    tiny.make(folder)
    tiny.write_rows(folder / "pairs.jsonl", preferences(0, 12))
    tiny.write_rows(folder / "held_out.jsonl", preferences(20, 7))
    return folder


def overrides(twin: Path, run_dir: Path, *options: str) -> list[str]:
    kept = [o for o in tiny.overrides(twin, run_dir) if not o.startswith("stage.sft")]
    files = [f"stage.reward_model.{name}={twin / f'{name}.jsonl'}" for name in ("pairs", "held_out")]
    return [*kept, *OPTIONS, *files, *options]


@pytest.fixture(scope="module")
def runs(twin: Path) -> dict[str, Path]:
    for name, options in LAYOUTS.items():
        tiny.complete(overrides(twin, twin / name, *options))
    return {name: twin / name for name in LAYOUTS}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return list(records.read_rows(run_dir / "metrics.jsonl"))


def scores(model: Any, tokenizer: Any, row: dict[str, Any]) -> torch.Tensor:
    """Of the chosen and of the rejected answer, from transformers' own way from a conversation to a score."""
    both = []
    for name in ("chosen", "rejected"):
        answer = row[name].removeprefix("<think>hm</think>")
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
        both.append(model(ids).logits[0, 0])
    return torch.stack(both)


@pytest.fixture(scope="module")
def expected(twin: Path) -> dict[str, Any]:
    """Plain transformers and torch: losses, gradient norms and weights of all steps."""
    model = AutoModelForSequenceClassification.from_pretrained(
        twin / "model", num_labels=1, dtype=torch.float32, attn_implementation="eager"
    )
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    torch.nn.init.zeros_(model.score.weight)
    named = dict(model.named_parameters())
    adam = adamw(model, LEARNING_RATE)
    rows = shuffled(preferences(0, 12), 0, STEPS * PAIRS, seed=1)
    losses, norms = [], []
    for step in range(STEPS):
        adam.zero_grad()
        pairs = torch.stack([scores(model, tokenizer, dict(row)) for row in rows[step * PAIRS : (step + 1) * PAIRS]])
        loss = -F.logsigmoid(pairs[:, 0] - pairs[:, 1]).mean()
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), 1.0).item())
        adam.step()
    return {"loss": losses, "grad_norm": norms, "weights": {name: p.detach().clone() for name, p in named.items()}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_last_checkpoint_exports_to_every_byte_of_the_runs_own_export(
    runs: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """With the scalar head, though the run began with a language model."""
    exports.export(exports.find_checkpoint(runs[layout], None), tmp_path / "hf")
    exported, expected = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path / "hf", runs[layout] / "hf")
    )
    assert exported == expected
    assert "score.weight" in load_file(tmp_path / "hf" / "model.safetensors")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_equals_plain_transformers_and_torch(
    runs: dict[str, Path], expected: dict[str, Any], layout: str
) -> None:
    rows = metrics(runs[layout])
    assert rows[0]["loss"] == pytest.approx(0.693147, abs=1e-6), "a head of zeros prefers neither"
    assert [row["loss"] for row in rows] == pytest.approx(expected["loss"], rel=1e-4)
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected["grad_norm"], rel=1e-3)
    weights = load_file(runs[layout] / "hf" / "model.safetensors")
    start = load_file(runs[layout].parent / "model" / "model.safetensors")
    assert weights.keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        moved = value - (start[name].float() if name in start else 0.0)
        assert float((weights[name] - value).norm() / moved.norm()) < 5e-3, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_has_the_scores_that_transformers_gives_the_export(runs: dict[str, Path], layout: str) -> None:
    run_dir = runs[layout]
    report = json.loads((run_dir / "reward_model.json").read_text())
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        run_dir / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    rows = preferences(20, 7)
    pairs = torch.stack([scores(model, tokenizer, row).detach() for row in rows]).double()
    assert [entry["id"] for entry in report["scores"]] == [row["id"] for row in rows]
    in_report = torch.tensor([[entry["chosen"], entry["rejected"]] for entry in report["scores"]], dtype=torch.float64)
    assert torch.allclose(in_report, pairs, atol=1e-4)
    margins = pairs[:, 0] - pairs[:, 1]
    right = (margins > 0).double()
    by_prompt = [right[[i for i, r in enumerate(rows) if r["prompt"] == p]].mean() for p in {r["prompt"] for r in rows}]
    assert report["accuracy"]["mean"] == pytest.approx(float(torch.stack(by_prompt).mean()))
    assert report["accuracy"]["n"] == 5
    assert report["accuracy"]["interval"][0] <= report["accuracy"]["mean"] <= report["accuracy"]["interval"][1]
    assert report["loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), abs=1e-4)
    last = metrics(run_dir)[-1]
    assert last["held_out_accuracy"] == report["accuracy"]["mean"]
    assert last["accuracy"] > metrics(run_dir)[0]["accuracy"] == 0, "it learns"


def test_a_real_vllm_server_gives_the_trainers_scores_to_the_verifier(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = str(runs["dp2"] / "hf")
    base = OmegaConf.load(tiny.ROOT / "conf" / "rewards" / "base.yaml")
    rewards = {
        "mix": {"l": {"preferred": 1.0}},
        "verifiers": {"preferred": {"template": "scalar", "server": "scalar"}},
        "servers": {"scalar": {"model": folder, "runner": "pooling", "port": free_port()}},
    }
    config = settings.read(OmegaConf.merge(base, OmegaConf.create(rewards)))  # type: ignore[arg-type]
    (server,) = settings.servers(config).values()
    arguments = ["--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    supervisor = Supervisor([JudgeServer(server, 0, tmp_path / "server.log", None, arguments)], config.supervisor)
    report = json.loads((runs["dp2"] / "reward_model.json").read_text())
    try:
        supervisor.start()
        with Client({"scalar": server}, config.client) as client:
            verifier = registry.open_verifiers(["preferred"], config, client)["preferred"]
            for row, entry in zip(preferences(20, 7), report["scores"], strict=True):
                for name in ("chosen", "rejected"):
                    verdict = verifier({**row, "label": "l", "kind": "k"}, row[name])
                    assert isinstance(verdict, Verdict), verdict
                    assert float(verdict.raw) == pytest.approx(entry[name], abs=2e-4)
                    assert verdict.score == pytest.approx(1 / (1 + torch.tensor(-entry[name]).exp().item()), abs=1e-4)
    finally:
        supervisor.stop()
