"""PPO's critic: what it learns from, and whole runs with it, of which the resumed one is the one left alone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext import packing
from recipes.algorithms.advantages import AdvantageInputs, trained_inputs
from recipes.run import records, sample_files
from recipes.training import critic
from tests.megatron_ext.reference import stored
from tests.recipes import tiny
from tests.recipes.kill_check import timeless
from tests.rewards.fake_server import FakeServer, by_the_answer
from tests.sequences import PlainSequence, token_batch

STEPS = 4
JUDGE = "{template: tests.rewards.fake_server.JUDGE, server: judge}"
VALUES = ["value/loss", "value/grad_norm", "value/clipped", "value/mean", "value/explained_variance"]


@pytest.fixture(scope="module")
def judge() -> Iterator[FakeServer]:
    with FakeServer(by_the_answer) as fake:
        yield fake


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, judge: FakeServer) -> tuple[Path, Path]:
    """A run whose critic sleeps on the host between its uses, the policy's optimiser while engines generate, and the
    judge's server but while it judges; and one resumed after the first's second step where nothing sleeps. In the
    first step the critic alone is trained."""
    folder = tmp_path_factory.mktemp("ppo")
    tiny.make(folder)
    whole, resumed = folder / "whole", folder / "resumed"
    ppo = ("stage.trains=[rl]", "stage.evaluates=false", "algorithm=ppo", "precision=fp32", f"algorithm.steps={STEPS}")
    ppo = (
        *ppo,
        "critic.learning_rate=1e-3",
        "critic.warmup_steps=1",
        "checkpoint.keep=4",
        "algorithm.updates_per_rollout=2",
        f"+rewards.verifiers.judged={JUDGE}",
        f"+rewards.servers.judge={{model: judge, port: {judge.port}}}",
        "+rewards.mix.safety.judged=0.25",
    )
    asleep = ("critic.offload=true", "optimizer.offload=true", "rewards.placement=colocated")
    tiny.complete(tiny.overrides(folder, whole, *ppo, *asleep))
    judge.events.append("end")
    shutil.copytree(whole, resumed)
    for step in (3, 4):
        shutil.rmtree(resumed / "checkpoints" / f"step_{step:06d}")
    shutil.rmtree(resumed / "hf")
    tiny.complete(tiny.overrides(folder, resumed, *ppo, "resume=true"))
    return whole, resumed


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return timeless(list(records.read_rows(run_dir / "metrics.jsonl")))


def test_the_critic_learns(runs: tuple[Path, Path]) -> None:
    """From zero values, whose loss is half the mean squared return; every number is finite."""
    rows = metrics(runs[0])
    assert all(set(VALUES) <= set(row) for row in rows)
    first, *_, last = rows
    assert (first["value/mean"], first["value/explained_variance"]) == (0.0, 0.0)
    assert last["value/loss"] < first["value/loss"] / 2
    assert 0 < last["value/mean"] < 1
    assert all(row["value/grad_norm"] > 0 and 0 <= row["value/clipped"] <= 1 for row in rows)


def test_the_policy_is_the_reference_until_the_critic_is_warm(runs: tuple[Path, Path]) -> None:
    first, second, *later = metrics(runs[0])
    assert (first["kl/reference"], first["grad_norm"]) == (0.0, 0.0)
    assert second["grad_norm"] > 0
    assert all(row["kl/reference"] > 0 for row in later)


def test_a_resumed_run_ends_as_the_one_left_alone(runs: tuple[Path, Path]) -> None:
    """Which also says that moving the critic and the policy's optimiser to the host and back changes no bit, in the
    critic's turns and while engines generate, nor judging each step's answers together: a run without any of it is
    the same."""
    whole, resumed = runs
    assert metrics(resumed) == metrics(whole)
    assert list(sample_files.read(resumed)) == list(sample_files.read(whole))
    assert (resumed / "hf" / "model.safetensors").read_bytes() == (whole / "hf" / "model.safetensors").read_bytes()
    last, of_resumed = (stored(run_dir / "checkpoints" / f"step_{STEPS:06d}") for run_dir in runs)
    assert "critic/output_layer.weight" in last and any(name.startswith("critic/optimizer.") for name in last)
    assert last.keys() == of_resumed.keys()
    assert [name for name, tensor in last.items() if not torch.equal(tensor, of_resumed[name])] == []


def test_judges_are_awake_but_to_judge_a_steps_answers(runs: tuple[Path, Path], judge: FakeServer) -> None:
    """At first asleep; then each step asks all its questions between waking up and falling asleep. The run whose judges
    are apart tells its server nothing."""
    events = " ".join(judge.events[: judge.events.index("end")])
    turns = [turn.split() for turn in events.split("/wake_up ")]
    judged = [row["verdicts"].get("judged") for row in sample_files.read(runs[0])]
    asked = sum(verdict is not None and verdict["label"] in ("good", "bad") for verdict in judged)
    assert turns[0] == ["/sleep"] and len(turns) == 1 + STEPS
    assert all(set(turn[:-1]) == {"asked"} and turn[-1] == "/sleep" for turn in turns[1:])
    assert sum(len(turn) - 1 for turn in turns[1:]) == asked
    assert set(judge.events[judge.events.index("end") + 1 :]) == {"asked"}


def test_returns_over_packed_sequences_are_what_is_still_to_come() -> None:
    """With λ = 1 and no discount a return is the sum of the rewards from its token on, whatever the values are; with
    λ = 0 it is the token's reward and the next value. What the micro-batch has is in the order of its tokens."""
    lengths = torch.tensor([[3, 1], [2, 4]])
    rewards = torch.tensor([[1.0, torch.nan], [0.5, -1.0]], dtype=torch.float64)
    token_rewards = torch.tensor([0.1, 0.2, 0.0, 9.0, -0.1, 0.3, 0.0, 0.0, 0.5, 0.25], dtype=torch.float64)
    values = torch.arange(10, dtype=torch.float32) / 8
    inputs = AdvantageInputs(rewards, lengths, token_rewards, values)
    weights = [0.1, 0.0, 0.1, 0.0, 0.2, 0.2, *[0.1] * 4]
    sequences = [PlainSequence([7] * (n + 1), [3] * n) for n in lengths.flatten().tolist()]

    everywhere = torch.ones(10, dtype=torch.bool)
    old_values, returns = critic.value_targets(inputs, everywhere, discount=1.0, gae_lambda=1.0)
    to_come = [1.3, 1.2, 1.0, None, 0.7, 0.8, -0.25, -0.25, -0.25, -0.75]
    judged = [i for i, value in enumerate(to_come) if value is not None]
    assert returns[judged].tolist() == pytest.approx([value for value in to_come if value is not None])

    _, bootstrapped = critic.value_targets(inputs, everywhere, discount=0.5, gae_lambda=0.0)
    nexts = [0.1 + 1 / 16, 0.2 + 2 / 16, 1.0, None, -0.1 + 5 / 16, 0.8, 7 / 16, 8 / 16, 0.5 + 9 / 16, -0.75]
    assert bootstrapped[judged].tolist() == pytest.approx([value for value in nexts if value is not None])

    columns = {"old_values": old_values.numpy(), "returns": returns.numpy(), "weights": np.array(weights)}
    batch = packing.pack(token_batch(sequences).with_columns(**columns), [3, 0], multiple=1, pad_token=0)
    assert batch.values["returns"].tolist() == pytest.approx([-0.25, -0.25, -0.25, -0.75, 1.3, 1.2, 1.0])
    assert batch.values["old_values"].tolist() == [0.75, 0.875, 1.0, 1.125, 0.0, 0.125, 0.25]
    new_values = torch.zeros(7, requires_grad=True)
    loss, measured = critic.value_loss(value_clip=0.2)(new_values, batch)
    loss.backward()
    # Below their old values by more than 0.2, and further from there: the clipped branch has no gradient.
    assert new_values.grad is not None
    assert new_values.grad.tolist() == pytest.approx([0.0, 0.0, 0.0, 0.0, -0.13, 0.0, -0.1])
    assert int(measured["clipped"]) == 4


def test_forced_tokens_have_no_part_in_a_return() -> None:
    """A return is that of the trained tokens alone, and 0 at the places of the others."""
    mask = torch.tensor([True, False, True, False])
    inputs = trained_inputs(
        torch.tensor([[1.0]], dtype=torch.float64),
        torch.tensor([[4]]),
        mask,
        torch.tensor([-0.25, 9.0, -0.5, 9.0], dtype=torch.float64),
        torch.tensor([0.5, 9.0, 0.25, 9.0]),
    )
    old_values, returns = critic.value_targets(inputs, mask, discount=0.5, gae_lambda=1.0)
    assert returns.tolist() == [-0.25 + 0.5 * 0.5, 0.0, 0.5, 0.0]
    assert old_values.tolist() == [0.5, 0.0, 0.25, 0.0]


def test_explained_variance() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    assert critic.explained_variance(returns + 5, returns) == 1.0
    assert critic.explained_variance(torch.full_like(returns, 7.0), returns) == 0.0
    assert critic.explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert critic.explained_variance(returns, torch.ones_like(returns)) == 0.0
