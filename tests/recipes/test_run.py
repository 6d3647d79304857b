"""Whole runs of the demo's recipe on a tiny model, started as a user starts them: trainer ranks and a vLLM engine.

Runs are shared: one that is left alone, one that is killed and resumed, and two in FP32 in different layouts, with an
environment some of whose replies fail; one of these ends with Ctrl-C.
"""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.data.processor import prompt_tokens
from recipes.evaluation import rates
from recipes.evaluation.evaluate import difference
from recipes.run import failure, records, sample_files
from recipes.run import folder as run_folder
from rollout.sampler import make_requests
from rollout.sampling import Sampling
from tests import warm
from tests.megatron_ext.reference import stored
from tests.recipes import tiny
from tests.recipes.kill_check import WRITING, Moment, kill_at, timeless
from tests.responses import make_prompt
from tests.rollout.test_vllm import fresh_results, start_fresh
from tests.settings import engine_settings

VERIFIERS = ["capability", "safety", tiny.LETTERS]
STEPS = 4
# Measured: 0.028 and 6e-6. In BF16 vLLM and Megatron-Core round in different places; log-probs are near -5.7 here.
BF16_GAP, FP32_GAP = 0.1, 1e-4
BF16 = "precision=bf16"
FP32 = ("stage.trains=[rl]", "stage.evaluates=false", "precision=fp32")
FP32 += ("rollout.environment.name=tests.rollout.letters.Letters", "rollout.environment.max_turns=3")
FP32 += ("+rollout.environment.settings.fails=true", "rewards.client.max_failed=1.0")
FP32 += ("rollout.max_response_tokens=60",)
LAYOUTS = {
    "single": ("parallel.tensor=1", "parallel.sequence=false", "cluster.ranks=1"),
    "dp2": ("parallel.tensor=1", "parallel.sequence=false", "cluster.ranks=2"),
}


@dataclass
class Death:
    """How a run ended that did not come to its end, and its records at that moment."""

    exit_code: int
    processes_left: dict[int, str]
    shared_memory_left: set[str]
    metrics: bytes


@pytest.fixture(scope="session")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin")
    tiny.make(folder)
    return folder


@pytest.fixture(scope="module")
def whole(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of an undisturbed run and what it printed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    return run_dir, tiny.complete(tiny.overrides(twin, run_dir, BF16), real=True)


@pytest.fixture(scope="module")
def killed(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Death]:
    """The folder of a run with the same settings whose rank 0 was killed while a checkpoint was written, and that was
    resumed.

    What a launcher's kill -9 leaves is in test_ladder; more moments: make kill-check.
    """
    run_dir = tmp_path_factory.mktemp("killed") / "run"
    death = dies(tiny.overrides(twin, run_dir, BF16), run_dir, Moment(1, WRITING), "rank 0")
    tiny.complete(tiny.overrides(twin, run_dir, BF16, "resume=true"))
    return run_dir, death


@pytest.fixture(scope="module")
def single(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one FP32 step on one rank."""
    run_dir = tmp_path_factory.mktemp("single") / "run"
    tiny.complete(tiny.overrides(twin, run_dir, *FP32, *LAYOUTS["single"], "algorithm.steps=1"))
    return run_dir


@pytest.fixture(scope="module")
def interrupted(twin: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Death]:
    """The folder of a run from the same weights in another layout, which Ctrl-C ended after its first step."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "run"
    arguments = tiny.overrides(twin, run_dir, *FP32, *LAYOUTS["dp2"])
    return run_dir, dies(arguments, run_dir, Moment(1, "generate", 0.05), "Ctrl-C")


@pytest.fixture(scope="module")
def layouts(single: Path, interrupted: tuple[Path, Death]) -> dict[str, Path]:
    """Run folders by layout, of which the first step is looked at."""
    return {"single": single, "dp2": interrupted[0]}


def dies(arguments: list[str], run_dir: Path, moment: Moment, victim: str) -> Death:
    """Start a run and end it then, by a kill or Ctrl-C."""
    run = tiny.Run(arguments)
    try:
        kill_at(run, run_dir, moment, victim)
        run.output(300)
        return Death(run.process.returncode, *run.remains(60), (run_dir / "metrics.jsonl").read_bytes())
    finally:
        run.kill_all()


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return list(records.read_rows(run_dir / "metrics.jsonl"))


def command(module: str, *arguments: str) -> str:
    """What a command prints; fails with its errors when it fails."""
    with warm.processes():
        result = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=tiny.ROOT, capture_output=True, text=True, timeout=600
        )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_every_step_has_its_metrics(whole: tuple[Path, str]) -> None:
    rows = metrics(whole[0])
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for row in rows:
        assert {*records.REQUIRED_METRICS, *(f"reward/{name}" for name in VERIFIERS)} <= row.keys()
        assert all(math.isfinite(value) for value in row.values())
        assert {"generate", "reward", "logprobs", "train", "sync"} <= set(records.time_phases([row]))
        assert row["grad_norm"] > 0
        assert 0 < row["reward/mean"] < 1


def test_the_policy_is_the_reference_at_step_one_and_not_later(whole: tuple[Path, str]) -> None:
    first, *later = metrics(whole[0])
    assert first["kl/reference"] == 0.0
    assert all(row["kl/reference"] > 0 for row in later)


def test_every_sync_places_all_bytes_of_the_model(whole: tuple[Path, str], twin: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(twin / "model", dtype=torch.bfloat16)
    expected = sum(p.numel() * p.element_size() for p in model.parameters())  # tied embeddings count once
    assert [row["sync/bytes"] for row in metrics(whole[0])] == [expected] * STEPS


def test_trainer_and_vllm_agree_on_log_probs(whole: tuple[Path, str], layouts: dict[str, Path]) -> None:
    for run_dir, bound in ((whole[0], BF16_GAP), *((folder, FP32_GAP) for folder in layouts.values())):
        for row in metrics(run_dir):
            assert 0 < row["train_inference_mismatch/mean"] <= row["train_inference_mismatch/max"] < bound


def test_samples_name_what_was_learned_from(whole: tuple[Path, str]) -> None:
    rows = list(sample_files.read(whole[0]))
    assert [row["step"] for row in rows] == [step for step in range(1, STEPS + 1) for _ in range(16)]
    assert [row["sample_index"] for row in rows] == [0, 1, 2, 3] * 4 * STEPS
    assert all(row["weight_version"] == row["step"] - 1 for row in rows)
    for step, row in enumerate(metrics(whole[0])):
        chosen = rows[16 * step : 16 * step + 16]
        assert row["reward/mean"] == pytest.approx(sum(sample["reward"] for sample in chosen) / 16, abs=1e-12)
        for start in range(0, 16, 4):
            group = chosen[start : start + 4]
            assert len({sample["prompt_id"] for sample in group}) == 1
            ranks = sorted(range(4), key=lambda i: group[i]["reward"])
            assert ranks == sorted(range(4), key=lambda i: group[i]["advantage"])
            assert sum(sample["advantage"] for sample in group) == pytest.approx(0, abs=1e-6)


def test_evaluation_compares_base_sft_and_rl(whole: tuple[Path, str]) -> None:
    evaluation = json.loads((whole[0] / "evaluation.json").read_text())
    of_safety = ["unsafe/harmful", "bare_refusal/harmful", "illogical/harmful"]
    of_safety += [f"{rate}/{kind}" for kind in ("borderline", "benign") for rate in ("over_refusal", "illogical")]
    sizes = {**dict.fromkeys(of_safety, 2), "capability": 2, "helpfulness": 4}
    for stage in ("base", "before", "after", "difference"):
        assert set(evaluation[stage]) == {*sizes, "sampled"}
        for scores in (evaluation[stage], evaluation[stage]["sampled"]):
            for name, size in sizes.items():
                low, high = scores[name]["interval"]
                assert low <= scores[name]["mean"] <= high
                assert scores[name]["n"] == size
    answers = json.loads((whole[0] / "answers.json").read_text())
    texts = {stage: [row["response"] for row in answers[stage]["greedy"]] for stage in ("base", "before", "after")}
    assert texts["base"] != texts["before"] != texts["after"]
    assert [t["after"] for t in evaluation["transcripts"]] == texts["after"]


def test_the_other_files_are_there_and_named_on_the_screen(whole: tuple[Path, str]) -> None:
    run_dir, printed = whole
    report = (run_dir / "report.html").read_text()
    assert report.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "Warning" not in printed and "No CUDA" not in printed, "what libraries write is in the logs"
    assert "config.yaml" in printed
    resolved = (run_dir / "config.yaml").read_text()
    assert "max_response_tokens: 8" in resolved
    assert "${" not in resolved
    history = metrics(run_dir / "warm_start")
    assert [entry["step"] for entry in history] == [1, 2]
    assert history[1]["loss"] < history[0]["loss"]
    for name in ("report.html", "evaluation.json", "metrics.jsonl", "samples", "config.yaml", "hf"):
        assert str(run_dir / name) in printed
    for step in range(1, STEPS + 1):
        assert f"step {step}/{STEPS}" in printed


def test_no_file_of_the_run_has_a_secret_of_its_environment(whole: tuple[Path, str]) -> None:
    run_dir, printed = whole
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"config.yaml", "environment.json", "report.html", "rank_0.log"} <= {path.name for path in files}
    assert [path for path in files if tiny.SECRET.encode() in path.read_bytes()] == []
    assert tiny.SECRET not in printed


def test_the_run_tells_what_happened(whole: tuple[Path, str]) -> None:
    events = list(records.read_rows(whole[0] / "events.jsonl"))
    assert [event["kind"] for event in events] == ["start", *["checkpoint"] * (2 + STEPS), "finish"]
    assert [event["step"] for event in events[3:-1]] == [event["after_step"] for event in events[3:-1]]


def test_the_exported_model_is_the_last_checkpoint(whole: tuple[Path, str]) -> None:
    """Megatron-Core's checkpoint, read without Megatron-Core and taken apart by plain slicing, tensor by tensor."""
    hf = weights(whole[0] / "hf")
    layers = {
        "self_attention.linear_qkv.layer_norm_weight": (96,),
        "self_attention.linear_qkv.weight": (4 * 128, 96),  # 4 groups (3 and one of padding) of 2 q, k, v
        "self_attention.linear_proj.weight": (96, 4 * 64),
        "mlp.linear_fc1.layer_norm_weight": (96,),
        "mlp.linear_fc1.weight": (2 * 96, 96),
        "mlp.linear_fc2.weight": (96, 96),
    }
    shapes: dict[str, tuple[int, ...]] = {
        f"decoder.layers.{i}.{name}": shape for i in range(2) for name, shape in layers.items()
    }
    shapes |= {"embedding.word_embeddings.weight": (300, 96), "decoder.final_layernorm.weight": (96,)}
    checkpoint = stored(whole[0] / "checkpoints" / f"step_{STEPS:06d}")
    saved = {name: checkpoint[f"policy/{name}"] for name in shapes}
    assert {name: tuple(tensor.shape) for name, tensor in saved.items()} == shapes
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    expected = {
        "model.embed_tokens.weight": saved["embedding.word_embeddings.weight"],
        "model.norm.weight": saved["decoder.final_layernorm.weight"],
    }
    for i in range(2):
        parts = {name: saved[f"decoder.layers.{i}.{name}"] for name in layers}
        groups = parts["self_attention.linear_qkv.weight"].view(4, 128, 96)[:3]
        expected |= {
            f"model.layers.{i}.{name}": value
            for name, value in {
                "self_attn.q_proj.weight": groups[:, :64].reshape(192, 96),
                "self_attn.k_proj.weight": groups[:, 64:96].reshape(96, 96),
                "self_attn.v_proj.weight": groups[:, 96:].reshape(96, 96),
                "self_attn.o_proj.weight": parts["self_attention.linear_proj.weight"][:, :192],
                "mlp.gate_proj.weight": parts["mlp.linear_fc1.weight"][:96],
                "mlp.up_proj.weight": parts["mlp.linear_fc1.weight"][96:],
                "mlp.down_proj.weight": parts["mlp.linear_fc2.weight"],
                "input_layernorm.weight": parts["self_attention.linear_qkv.layer_norm_weight"],
                "post_attention_layernorm.weight": parts["mlp.linear_fc1.layer_norm_weight"],
            }.items()
        }
    assert hf.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(hf[name], value), name


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_last_checkpoint_exports_to_every_byte_of_the_runs_own_export(whole: tuple[Path, str]) -> None:
    printed = command("recipes.export", f"run={whole[0]}", f"step={STEPS}")
    exported = whole[0] / "export" / f"step_{STEPS:06d}"
    assert f"{exported}: done in " in printed
    assert files(exported) == files(whole[0] / "hf")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= files(exported).keys()
    command("recipes.export", f"run={whole[0]}", f"step={STEPS - 1}", f"to={whole[0].parent / 'earlier'}")
    assert files(whole[0].parent / "earlier")["model.safetensors"] != files(exported)["model.safetensors"]


def test_an_evaluation_of_the_final_and_of_the_first_model_gives_the_runs_own_answers(
    whole: tuple[Path, str], twin: Path
) -> None:
    """Greedy and sampled: the same engine, prompts, seeds and weights. The run's engine got them by weight sync, these
    read the exported checkpoint and the base model."""
    run_dir = whole[0]
    results = run_dir.parent / "evaluated"
    printed = command("recipes.evaluate", f"run={run_dir}", f"against={twin / 'model'}", f"to={results}")
    evaluated, expected = (json.loads((folder / "answers.json").read_text()) for folder in (results, run_dir))
    assert evaluated == {"after": expected["after"], "before": expected["base"]}
    evaluation = json.loads((results / "evaluation.json").read_text())
    of_run = json.loads((run_dir / "evaluation.json").read_text())
    assert (evaluation["after"], evaluation["before"]) == (of_run["after"], of_run["base"])
    names = ["safety", "capability", "helpfulness"]
    kinds = {row["id"]: row["kind"] for row in map(json.loads, (twin / "eval.jsonl").read_text().splitlines())}
    measured, measures = rates.with_rates(expected, names, kinds)
    assert evaluation["difference"] == difference(measured["base"], measured["after"], measures)
    assert evaluation["models"] == {"before": f"{twin.name}/model", "after": f"{run_dir.name}/hf"}
    assert f"Effect: {run_dir.name}/hf minus {twin.name}/model, same prompts" in printed


def test_the_exported_model_loads_in_transformers_and_differs_from_the_sft_one(whole: tuple[Path, str]) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(whole[0] / "hf", output_loading_info=True)
    assert not any(report[field] for field in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    tuned = AutoModelForCausalLM.from_pretrained(whole[0] / "sft")
    changed = [name for name, value in tuned.named_parameters() if not torch.equal(value, model.get_parameter(name))]
    assert len(changed) == len(list(model.parameters()))


def test_vllm_loads_the_exported_model_and_answers_as_the_evaluation(whole: tuple[Path, str], twin: Path) -> None:
    """vLLM reads hf/ from disk; its greedy answers are those it gave with the weights of the weight sync."""
    run_dir = whole[0]
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "hf")
    rows = [json.loads(line) for line in (twin / "eval.jsonl").read_text().splitlines()]
    settings = engine_settings(str(run_dir / "hf"), "bfloat16", 48, kv_cache_gib=0.05)
    prompts = [make_prompt(row["id"], prompt_tokens(tokenizer, row, 40)) for row in rows]
    sampling = Sampling(max_tokens=8, stop_token_ids=(tokenizer.eos_token_id,), temperature=0.0)
    folder = run_dir.parent / "from_disk"
    with warm.processes():
        fresh = start_fresh(settings, make_requests(prompts, 1, seed=0, step=0), sampling, folder)
    assert fresh.wait(400) == 0
    _, responses = fresh_results(folder)
    texts = [tokenizer.decode(response.tokens, skip_special_tokens=True).strip() for response in responses]
    answers = json.loads((run_dir / "answers.json").read_text())
    assert texts == [row["response"] for row in answers["after"]["greedy"]]


def test_a_killed_and_resumed_run_ends_as_one_left_alone(whole: tuple[Path, str], killed: tuple[Path, Death]) -> None:
    """Which also says that the same seed gives the same run: these two share nothing but the settings."""
    alone, resumed = whole[0], killed[0]
    assert timeless(metrics(resumed)) == timeless(metrics(alone))
    assert list(sample_files.read(resumed)) == list(sample_files.read(alone))
    assert (resumed / "hf" / "model.safetensors").read_bytes() == (alone / "hf" / "model.safetensors").read_bytes()
    assert timeless(metrics(resumed / "warm_start")) == timeless(metrics(alone / "warm_start"))
    for name in ("answers.json", "evaluation.json"):
        assert (resumed / name).read_bytes() == (alone / name).read_bytes()


def test_a_resumed_run_did_not_start_anew(killed: tuple[Path, Death]) -> None:
    """Rows of finished steps, with the times that were measured, are those written before the kill."""
    run_dir, death = killed
    before = death.metrics.splitlines()
    assert len(before) == 2  # the second step's checkpoint was being written
    assert (run_dir / "metrics.jsonl").read_bytes().splitlines()[0] == before[0]


@pytest.mark.parametrize("way", ["killed", "interrupted"])
def test_nothing_is_left_behind(way: str, request: pytest.FixtureRequest) -> None:
    """When rank 0 is killed, and after Ctrl-C; the exit code says which signal it was."""
    death: Death = request.getfixturevalue(way)[1]
    assert death.exit_code == 128 + {"killed": signal.SIGKILL, "interrupted": signal.SIGINT}[way]
    assert death.processes_left == {}
    assert death.shared_memory_left == set()


def test_nothing_is_left_when_the_launcher_dies_while_ranks_start(twin: Path, tmp_path: Path) -> None:
    run = tiny.Run(tiny.overrides(twin, tmp_path / "run"))
    try:
        run.wait_for("a rank", lambda: run.rank(0) and run.rank(1))
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.remains(60) == ({}, set())
    finally:
        run.kill_all()
        run.process.communicate()


def test_a_failure_of_all_ranks_is_told_once_whichever_rank_fails_first(twin: Path, tmp_path: Path) -> None:
    run_folder.mark(tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / failure.FAILED).touch()  # an earlier launch's
    run = tiny.Run(tiny.overrides(twin, tmp_path, "cluster.ranks=2", "model.frozen=[decoder.nonsense]", "resume=true"))
    try:
        assert run.output(120).count("error: model.frozen: 'decoder.nonsense' begins no parameter's name") == 1
        assert run.process.returncode == 1
    finally:
        run.kill_all()


def test_layouts_agree_on_a_step(layouts: dict[str, Path]) -> None:
    """From the same weights the engine makes the same samples, and the trainer's sums differ by FP32 rounding only."""
    (expected,), (row, *_) = metrics(layouts["single"]), metrics(layouts["dp2"])
    alone, samples = (list(sample_files.read(layouts[name])) for name in ("single", "dp2"))
    assert samples[:16] == alone
    exact = [key for key in expected if key.startswith("reward/")] + ["kl/reference", "response_length/mean"]
    assert {key: row[key] for key in exact} == {key: expected[key] for key in exact}
    assert row["kl/reference"] == 0.0
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert row["sync/bytes"] == expected["sync/bytes"]


def test_training_saw_other_ids_than_the_text_would_give(layouts: dict[str, Path], twin: Path) -> None:
    """The log-prob gap of every response token is rounding only (see FP32_GAP) though the sampled ids are not those of
    encoding the decoded text: they were never decoded and encoded on the way to the trainer."""
    tokenizer = AutoTokenizer.from_pretrained(twin / "model")
    (row,) = metrics(layouts["single"])
    texts = [sample["response"] for sample in sample_files.read(layouts["single"])]
    encoded = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts) / len(texts)
    assert abs(encoded - row["response_length/mean"]) > 0.5
    assert row["train_inference_mismatch/max"] < FP32_GAP


def test_the_environments_tokens_have_no_part_in_the_gap_nor_samples_whose_environment_failed_in_the_update(
    layouts: dict[str, Path],
) -> None:
    """A gap that counted forced tokens, which have no log-prob, would be of several nats (see FP32_GAP)."""
    (row,) = metrics(layouts["single"])
    samples = list(sample_files.read(layouts["single"]))
    assert row["forced_tokens"] > 3 * len(samples)
    assert row["train_inference_mismatch/max"] < FP32_GAP
    failed = [sample for sample in samples if sample["reward"] is None]
    assert 0 < len(failed) < len(samples)
    assert row["reward_failed"] == len(failed) / len(samples)
    for sample in failed:
        assert all(verdict == {"reason": "gone", "raw": "", "traceback": ""} for verdict in sample["verdicts"].values())
        assert sample["advantage"] == 0
    rewards = [sample["reward"] for sample in samples if sample["reward"] is not None]
    assert row["reward/mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-12)
