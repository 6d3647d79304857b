"""The arithmetic of ``benchmarks.loop``, ``demo_seeds``, ``ladder`` and ``value_serving``. No test measures time."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import demo_seeds, ladder, loop, seeded, value_serving, yardsticks
from benchmarks.yardsticks import padded_batches
from tests.recipes.test_config import composed

SCORE = {"mean": 0.25, "interval": [0.1, 0.4], "n": 20}
GAIN = {"mean": 0.5, "interval": [0.2, 0.7], "n": 20}


def text_of(*tables):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(*tables)
    return capture.get()


def step_row(step, generate, train):
    return {
        "step": step,
        "loss": 0.5,
        "grad_norm": 2.0,
        "time/step": 9.0,
        "time/generate": generate,
        "time/train": train,
    }


def plain(seconds):
    keys = {"loss": 0.4, "grad_norm": 1.9, "micro_batches": 3, "tokens": 900, "padded_tokens": 1000}
    return {"seconds": seconds, **keys}


def bare(seconds):
    return {"bare_seconds": seconds, "tokens": 300, "bare_tokens": 200, "samples": 4, "identical_samples": 3}


def test_loop_pairs_each_step_with_its_yardsticks_and_leaves_out_the_warm_up():
    rows = [step_row(1, 90.0, 90.0), step_row(2, 2.0, 6.0), step_row(3, 3.0, 4.0), step_row(4, 1.0, 5.0)]
    answers = {
        "training": [plain(s) for s in (1.0, 3.0, 4.0, 10.0)],
        "generation": [bare(s) for s in (1.0, 2.0, 2.0, 2.0)],
    }
    result = loop.summarise(rows, answers)
    assert result["phases"] == {
        "generate": {"median": 2.0, "min": 1.0, "max": 3.0},
        "train": {"median": 5.0, "min": 4.0, "max": 6.0},
    }
    # seconds: 6/3, 4/4, 5/10
    assert result["training"]["ratio"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert result["training"]["met"]
    # tokens/s: 150, 100, 300 against 100 each
    assert result["generation"]["ratio"] == {"median": 1.5, "min": 1.0, "max": 3.0}
    assert len(result["repetitions"]) == 3
    assert result["repetitions"][0]["training"]["plain_loss"] == 0.4
    shown = text_of(*loop.tables(result))
    assert "1.500" in shown
    assert "≤ 1.0" in shown


def test_a_missed_goal_is_reported():
    rows = [step_row(1, 1.0, 1.0), step_row(2, 1.0, 2.0)]
    result = loop.summarise(rows, {"training": [plain(1.0)] * 2, "generation": [bare(0.5)] * 2})
    assert not result["training"]["met"]  # 2.0
    assert not result["generation"]["met"]  # 300/s against 400/s
    assert " no " in text_of(*loop.tables(result))


def test_loop_refuses_a_run_without_a_measured_step_or_with_a_missing_answer():
    with pytest.raises(ValueError, match="run 2 or more"):
        loop.summarise([step_row(1, 1.0, 1.0)], {"training": [plain(1.0)], "generation": [bare(1.0)]})
    with pytest.raises(ValueError, match="shorter"):
        loop.summarise([step_row(1, 1.0, 1.0)] * 2, {"training": [plain(1.0)], "generation": [bare(1.0)] * 2})


def test_padded_batches_hold_every_sample_once_and_keep_the_limit():
    lengths = [(10, 6), (4, 20), (4, 2), (30, 3), (1, 1), (1, 1)]
    # (10 + 20) × 2 = 60 fits and × 3 does not; (30 + 3) × 2 would be 66.
    assert padded_batches(lengths, 64) == [[0, 1], [2], [3], [4, 5]]
    assert padded_batches(lengths, 1000) == [[0, 1, 2, 3, 4, 5]]


def demo_run(folder, rewards, response="hello", speed=1.0):
    folder.mkdir()
    rows = [
        {
            "step": i + 1,
            "reward/mean": reward,
            "response_length/mean": 10.0 + i,
            "tokens_per_second": 100.0 * speed,
            "time/step": 4.0 / speed,
            "time/train": 2.0 / speed,
        }
        for i, reward in enumerate(rewards)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples").mkdir()
    (folder / "samples" / "step_000001_rank_00000.jsonl").write_text(
        json.dumps({"step": 1, "response": response}) + "\n"
    )
    stage = {"safety": SCORE, "sampled": {"safety": SCORE}}
    difference = {"safety": GAIN, "sampled": {"safety": GAIN}}
    evaluation = {"base": stage, "before": stage, "after": stage, "difference": difference, "transcripts": ["long"]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "provenance.json").write_text(json.dumps({"minutes": 7.5, "overrides": ["seed=1"]}))
    return folder


def test_collect_takes_curves_lengths_and_scores_but_no_transcripts_or_times(tmp_path):
    summary = demo_seeds.collect(demo_run(tmp_path / "a", [0.1, 0.2, 0.3, 0.4, 0.5]))
    assert summary["curves"] == {
        "step": [1, 2, 3, 4, 5],
        "reward/mean": [0.1, 0.2, 0.3, 0.4, 0.5],
        "response_length/mean": [10.0, 11.0, 12.0, 13.0, 14.0],
    }
    assert summary["response_length"] == {"first": 11.0, "last": 13.0}
    assert summary["seconds_per_step"] == 4.0
    assert summary["minutes"] == 7.5
    assert sorted(summary["evaluation"]) == ["after", "base", "before", "difference"]


def test_compare_ignores_times_and_names_the_first_differing_step(tmp_path):
    first = demo_run(tmp_path / "a", [0.1, 0.2, 0.3])
    second = demo_run(tmp_path / "b", [0.1, 0.2, 0.3], speed=3.0)
    assert demo_seeds.compare(first, second) == {"identical": True, "differences": []}
    third = demo_run(tmp_path / "c", [0.1, 0.25, 0.3], response="other")
    assert demo_seeds.compare(first, third) == {
        "identical": False,
        "differences": ["reward/mean from step 2", "samples"],
    }
    shorter = demo_run(tmp_path / "d", [0.1, 0.2])
    assert "reward/mean from step 3" in demo_seeds.compare(first, shorter)["differences"]


def test_the_table_has_every_seed_score_and_mode(tmp_path):
    seeds = {str(n): demo_seeds.collect(demo_run(tmp_path / str(n), [0.1] * 4)) for n in (1, 2)}
    shown = text_of(demo_seeds.table(seeds))
    assert shown.count("safety, greedy") == shown.count("safety, sampled") == 2
    assert shown.count("+0.500 [+0.200, +0.700]") == 4
    assert "10.0 → 12.0" not in shown
    assert shown.count("11.0 → 12.0") == 2


def test_reuse_keeps_a_finished_run_of_the_same_code_and_overrides_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    trainings = []

    def train(command, check):
        (tmp_path / "runs" / "demo_seed_7").mkdir(parents=True)
        trainings.append(command[3:])

    def run(reuse, override):
        seeded.run(Path("runs/demo_seed_7"), "demo", 7, more=[override], reuse=reuse)

    monkeypatch.setattr(seeded.subprocess, "run", train)
    run(reuse=True, override="algorithm.steps=2")
    run(reuse=True, override="algorithm.steps=2")
    run(reuse=False, override="algorithm.steps=2")
    assert trainings == [["recipe=demo", "seed=7", "run_dir=runs/demo_seed_7", "algorithm.steps=2"]] * 2
    run(reuse=True, override="algorithm.steps=3")
    (tmp_path / "conf" / "config.yaml").write_text("seed: 2")
    run(reuse=True, override="algorithm.steps=3")
    assert [command[-1] for command in trainings] == ["algorithm.steps=2"] * 2 + ["algorithm.steps=3"] * 2


def test_a_run_whose_code_changed_meanwhile_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    monkeypatch.setattr(
        seeded.subprocess, "run", lambda command, check: (tmp_path / "conf" / "a.yaml").write_text("seed: 2")
    )
    with pytest.raises(RuntimeError, match="changed during the run runs/demo_seed_7"):
        seeded.run(Path("runs/demo_seed_7"), "demo", 7)


def ladder_run(folder, change):
    """The files that ``benchmarks.ladder`` reads: of each stage, and of all."""
    stages = [{"stage": "base"}]
    for seconds, (stage, aims) in enumerate(ladder.AIMS.items(), start=1):
        (folder / stage).mkdir(parents=True)
        (folder / stage / "finished.json").write_text(json.dumps({"stage": stage, "seconds": seconds}))
        measures = dict.fromkeys(aims, 0.5)
        changes = {f"{aim}_change": change for aim in aims}
        intervals = {f"{aim}_change_interval": [change - 0.1, change + 0.1] for aim in aims}
        stages.append({"stage": stage, **measures, **changes, **intervals})
    (folder / "judge").mkdir()
    (folder / "judge" / "judge.json").write_text(json.dumps({"accuracy": SCORE}))
    (folder / "ladder.json").write_text(json.dumps({"stages": stages}))
    (folder / "provenance.json").write_text(json.dumps({"minutes": 7.5}))
    return folder


def test_the_ladder_s_table_has_what_each_stage_is_for_with_every_seed(tmp_path):
    seeds = {seed: ladder.collect(ladder_run(tmp_path / seed, change)) for seed, change in (("1", 0.2), ("2", -0.3))}
    assert seeds["1"]["stage_seconds"] == {"sft": 1, "rl_general": 2, "rl_safety": 3, "rl_efficient": 4, "rl_search": 5}
    assert seeds["1"]["minutes"] == 7.5
    shown = text_of(ladder.table(seeds))
    of_shares = [aim for aims in ladder.AIMS.values() for aim in aims if aim != "reasoning_length"]
    assert shown.count("0.50, +0.20 [+0.10, +0.30]") == len(of_shares)
    assert shown.count("0.50, -0.30 [-0.40, -0.20]") == len(of_shares)
    assert "0.5, -0.3 [-0.4, -0.2]" in shown
    assert shown.count("0.25 [0.10, 0.40]") == 2


def test_value_serving_asks_for_growing_prefixes_and_counts_what_is_computed():
    responses = value_serving.random_responses(vocabulary=1000)
    assert responses == value_serving.random_responses(vocabulary=1000)
    for response in responses:
        assert len(response[0]) == value_serving.PROMPT_TOKENS
        assert len(response) == 1 + value_serving.SEGMENTS
        assert all(prefix == response[-1][: len(prefix)] for prefix in response)
    lengths = [len(segment) for segment in value_serving.segments_of(responses)]
    least, most = value_serving.SEGMENT_TOKENS
    assert least <= min(lengths) < max(lengths) <= most
    assert sum(lengths) == sum(len(response[-1]) - len(response[0]) for response in responses)

    seconds = [[0.1] * 8 + [0.2] * 8, [0.3] * 8 + [0.4] * 8]
    case = value_serving.summarise(asked=3200, hits=2400, alone=[0.01, 0.02, 0.06], seconds=seconds)
    assert (case["hit_rate"], case["tokens_computed"]) == (0.75, 25.0)
    assert case["milliseconds_alone"] == pytest.approx(20)
    assert case["milliseconds_first"] == pytest.approx(200)
    assert case["milliseconds_last"] == pytest.approx(300)
    assert case["seconds_response"] == pytest.approx(4.0)
    assert "75%" in text_of(value_serving.table({"classify": case}))


@pytest.mark.parametrize("frozen", [[], ["embedding"]])
def test_plain_transformers_makes_the_update_of_the_runs_loss(tmp_path, frozen):
    """With the sampler's log-probs the model's own, all ratios are 1, and the loss is minus the weighted advantages."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    settings = {
        "model": str(tmp_path),
        "precision": "fp32",
        "temperature": 1.0,
        "micro_batch_tokens": 24,
        "optimizer": {"betas": [0.9, 0.95], "epsilon": 1e-8, "weight_decay": 0.0, "clip_grad_norm": 1.0},
        "algorithm": OmegaConf.to_container(composed("recipe=demo", "algorithm.kl_coefficient=0").algorithm),
        "frozen": frozen,
    }
    cases = ((3, 5, 1.0), (6, 2, -0.5), (4, 7, 2.0))  # tokens of prompt and response, advantage
    weight = 1 / sum(response_tokens for _, response_tokens, _ in cases)
    sequences = []
    policy_gradient_loss = torch.zeros(())
    for prompt_tokens, response_tokens, advantage in cases:
        prompt = torch.randint(50, (prompt_tokens,))
        response = torch.randint(50, (response_tokens,))
        logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, prompt_tokens - 1 : -1]
        log_probs = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
        policy_gradient_loss = policy_gradient_loss - weight * advantage * log_probs.sum()
        values = {
            "logprobs": log_probs.tolist(),
            "loss_mask": [1.0] * response_tokens,
            "advantages": [advantage] * response_tokens,
            "weights": [weight] * response_tokens,
        }
        sequences.append({"prompt": prompt.tolist(), "response": response.tolist(), "values": values})
    # Where an importance ratio is 1, its gradient is that of the log-prob.
    policy_gradient_loss.backward()
    answer = yardsticks.train(settings)({"sequences": sequences})
    weighted_advantages = sum(weight * response_tokens * advantage for _, response_tokens, advantage in cases)
    assert answer["micro_batches"] == 2
    assert answer["loss"] == pytest.approx(-weighted_advantages, rel=1e-5)
    parameters = dict(model.named_parameters())
    if frozen:
        del parameters["model.embed_tokens.weight"]
    gradients = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
    assert answer["grad_norm"] == pytest.approx(float(gradients.norm()), rel=1e-4)
