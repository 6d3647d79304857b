"""Whole runs with what the demo leaves at its defaults: several rounds of prompts, a penalty of long responses, forced
tokens, and an alarm that goes off."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from recipes.run import records
from tests.recipes import tiny

LONGEST = 60
COMMON = ("stage.trains=[rl]", "stage.evaluates=false", "precision=fp32", "parallel=tp1", "cluster.ranks=1")
COMMON += (f"rollout.max_response_tokens={LONGEST}", "rewards=uneven")
# An environment makes responses of different lengths, and tokens that are not trained on.
TURNS = ("rollout.environment.name=tests.rollout.letters.Letters", "rollout.environment.max_turns=3")
ROUNDS = ("algorithm.steps=1", "algorithm.advantage=dr_grpo", "algorithm.max_generation_batches=3")
ROUNDS += ("algorithm.overlong_fraction=1.0",)


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only tasks, one prompt of four, have rewards that differ."""
    folder = tmp_path_factory.mktemp("options")
    tiny.make(folder)
    mix = {"safety": {"tests.recipes.letters.always_right": 1.0}, "general_rule": {tiny.LETTERS: 1.0}}
    (folder / "conf" / "rewards" / "uneven.yaml").write_text(json.dumps({"defaults": ["base"], "mix": mix}))
    return folder


@pytest.fixture(scope="module")
def run_dir(twin: Path) -> Path:
    tiny.complete(tiny.overrides(twin, twin / "run", *COMMON, *TURNS, *ROUNDS))
    return twin / "run"


@pytest.fixture(scope="module")
def groups(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The step's samples by prompt."""
    by_prompt = defaultdict(list)
    for sample in records.read_rows(run_dir / "samples.jsonl"):
        by_prompt[sample["prompt_id"]].append(sample)
    return by_prompt


def test_prompts_are_drawn_again_for_groups_whose_rewards_are_equal(groups: dict[str, list[dict[str, Any]]]) -> None:
    """Each round of four prompts has one task. A step of four groups takes the tasks of all three rounds that may be
    drawn, and fills up with one of the others."""
    assert [len(samples) for samples in groups.values()] == [4] * 4
    differing = [prompt for prompt, samples in groups.items() if len({s["reward"] for s in samples}) > 1]
    assert len(differing) == 3 and all(prompt.startswith("task-") for prompt in differing)


def test_long_responses_pay_and_the_advantage_is_the_group_s(groups: dict[str, list[dict[str, Any]]]) -> None:
    """R − length / longest, minus the group's mean; the policy is the reference yet. Rewards are recorded without the
    penalty."""
    assert len({sample["tokens"] for samples in groups.values() for sample in samples}) > 2
    for samples in groups.values():
        totals = [sample["reward"] - sample["tokens"] / LONGEST for sample in samples]
        expected = [total - math.fsum(totals) / 4 for total in totals]
        assert [sample["advantage"] for sample in samples] == pytest.approx(expected, abs=1e-6)


def test_the_masked_fraction_is_the_environment_s(run_dir: Path, groups: dict[str, list[dict[str, Any]]]) -> None:
    (row,) = records.read_rows(run_dir / "metrics.jsonl")
    tokens = sum(sample["tokens"] for samples in groups.values() for sample in samples)
    assert row["forced_tokens"] > 16
    assert row["masked_fraction"] == pytest.approx(row["forced_tokens"] / tokens)


def test_the_metrics_of_a_first_update(run_dir: Path) -> None:
    """Nothing is clipped yet. Sampler and policy agree on the sampled tokens, whose perplexity is, for samples of the
    policy, near the exponential of the entropy, and that below the vocabulary's size."""
    (row,) = records.read_rows(run_dir / "metrics.jsonl")
    assert (row["clip_fraction/low"], row["clip_fraction/high"], row["kl/old"]) == (0, 0, 0)
    assert row["perplexity/policy"] == pytest.approx(row["perplexity/sampler"], rel=1e-4)
    assert 0.5 < row["perplexity/policy"] / math.exp(row["entropy"]) < 2
    assert 0 < row["entropy"] < math.log(300)
    assert row["train_inference_mismatch/left_out"] == 0


def test_a_mismatch_above_the_bound_stops_the_run_before_its_update(twin: Path) -> None:
    run = tiny.Run(tiny.overrides(twin, twin / "alarm", *COMMON, "algorithm.max_mismatch=1e-9"))
    try:
        printed = run.output()
    finally:
        run.kill_all()
    assert run.process.returncode == 1
    assert "is above algorithm.max_mismatch=1e-09: the engine did not sample from the trainer's weights" in printed
    assert not (twin / "alarm" / "metrics.jsonl").exists() or (twin / "alarm" / "metrics.jsonl").read_bytes() == b""
