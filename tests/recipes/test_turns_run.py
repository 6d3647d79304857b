"""A whole RL step in FP32 on a tiny model with an environment, part of whose replies fail: vLLM, trainer, records."""

import json
import re
from typing import Any

import pytest

from recipes import records
from tests.recipes import tiny

FP32_GAP = 1e-4  # as in test_run.py
MAX_TURNS = 3


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("turns")
    tiny.make(folder)
    tiny.complete(
        tiny.overrides(
            folder,
            folder / "run",
            "stage.trains=[rl]",
            "algorithm.steps=1",
            "precision=fp32",
            "parallel.tensor=1",
            "parallel.sequence=false",
            "cluster.ranks=1",
            "rollout.max_response_tokens=60",
            "rollout.environment.name=tests.rollout.letters.Letters",
            "+rollout.environment.settings.fails=true",
            f"rollout.environment.max_turns={MAX_TURNS}",
            "rewards.client.max_failed=1.0",
            "~data.scores.capability",
            "~data.scores.helpfulness",
        )
    )
    (metrics,) = records.read_rows(folder / "run" / "metrics.jsonl")
    answers = json.loads((folder / "run" / "answers.json").read_text())
    assert any(re.search(r"<\d+/\d+>", row["response"]) for row in answers["after"]["sampled"]), (
        "the evaluation has it too"
    )
    return metrics, list(records.read_rows(folder / "run" / "samples.jsonl"))


def test_the_trainer_s_log_probs_of_whole_episodes_are_vllm_s(step: Any) -> None:
    """Of the sampled tokens: the environment's have none, and a loss that counted them would show a gap of several."""
    metrics, samples = step
    assert 0 < metrics["logprob_gap/mean"] <= metrics["logprob_gap/max"] < FP32_GAP
    assert metrics["forced_tokens"] > 3 * len(samples)
    assert metrics["kl/reference"] == 0.0


def test_a_sample_whose_environment_failed_has_no_reward_and_no_part_in_the_update(step: Any) -> None:
    metrics, samples = step
    failed = [sample for sample in samples if sample["reward"] is None]
    assert 0 < len(failed) < len(samples)
    assert metrics["reward_failed"] == len(failed) / len(samples)
    for sample in failed:
        assert all(verdict == {"reason": "gone", "raw": ""} for verdict in sample["verdicts"].values())
        assert sample["advantage"] == 0
    rewards = [sample["reward"] for sample in samples if sample["reward"] is not None]
    assert metrics["reward/mean"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-12)
