"""A verifier of one's own that works when it is tried and raises later: in the loop's scoring, and in whole runs."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from megatron_ext import batch as batches
from recipes.run import sample_files
from recipes.training.rl import score
from rewards import objectives, settings
from rewards.verdict import Failure, Verdict, to_json
from tests.recipes import tiny
from tests.responses import make_prompt

OWN = "tests.rewards.own.raises_in_a_rank"
REASON = "it raised KeyError: 'gone' (own.py:"
OPTIONS = ("stage.trains=[rl]", "algorithm.steps=1", f"rewards.mix={{general_rule: {{{OWN}: 1.0}}}}")
OPTIONS += (f"data.scores={{{OWN}: [task, benign]}}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    tiny.make(folder)
    return folder


def scoring(max_failed: float, logged: list[str]) -> Any:
    """What ``score`` asks of a loop."""
    rewarding = settings.read(OmegaConf.load(tiny.ROOT / "conf" / "rewards" / "base.yaml"))  # type: ignore[arg-type]
    rewarding.client.max_failed = max_failed
    return SimpleNamespace(
        config=SimpleNamespace(rewards=rewarding),
        run=SimpleNamespace(phase=lambda name: nullcontext(), log=logged.append),
        rollouts=SimpleNamespace(server_counts=dict),
        constraint=objectives.initial_state(rewarding.constraint),
        rows={"a": {"kind": "chat"}, "b": {"kind": "chat"}},
    )


def test_failed_verdicts_are_logged_with_their_row_and_their_tokens_are_masked() -> None:
    failed = Failure("it raised KeyError: 'gone' (own.py:5)", traceback="Traceback\nKeyError: 'gone'")
    verdicts = [{"mine": to_json(result)} for result in (Verdict(1.0, "good"), failed, failed, Verdict(0.0, "bad"))]
    batch = batches.build(
        [make_prompt("a", [1]), make_prompt("b", [2])],
        [[3, 4]] * 4,
        prompt_index=[0, 0, 1, 1],
        sample_index=[0, 1, 0, 1],
        logprobs=[[-1.0, -1.0]] * 4,
        version=0,
        finish_reasons=["stop"] * 4,
    )
    batch = replace(batch, verdicts=verdicts, rewards=np.array([1.0, np.nan, np.nan, 0.0]))
    logged: list[str] = []
    scored, metrics = score(scoring(0.5, logged), batch, batch)
    assert logged == ["2 x verifier mine: it raised KeyError: 'gone' (own.py:5); first on row 'a'"]
    assert scored.loss_mask.tolist() == [True, True, False, False, False, False, True, True]
    assert (metrics["reward_failed"], metrics["reward/mean"], metrics["reward/mine"]) == (0.5, 0.5, 0.5)
    with pytest.raises(RuntimeError, match=r"^2 of 4 samples have no reward, .*on row 'a'.*\nTraceback\nKeyError"):
        score(scoring(0.4, logged), batch, batch)


def test_it_is_a_failed_verdict_and_the_run_goes_on(folder: Path) -> None:
    run_dir = folder / "goes_on"
    printed = tiny.complete(tiny.overrides(folder, run_dir, *OPTIONS, "rewards.client.max_failed=0.25"))
    assert f"4 x verifier {OWN}: {REASON}" in printed
    assert "first on row 'task-" in printed
    # Two rows, greedy and sampled.
    assert f"evaluation: 4 x verifier {OWN}: {REASON}" in printed
    samples = list(sample_files.read(run_dir))
    failed = [sample for sample in samples if sample["prompt_id"].startswith("task-")]
    assert len(failed) == 4
    assert all("Traceback" in sample["verdicts"][OWN]["traceback"] for sample in failed)
    assert [sample["reward"] for sample in failed] == [None] * 4
    assert [sample["advantage"] for sample in failed] == [0.0] * 4
    assert all(sample["reward"] is not None for sample in samples if sample not in failed)


def test_beyond_max_failed_the_run_ends_with_verifier_row_and_traceback(folder: Path) -> None:
    more = ("stage.evaluates=false", "rewards.client.max_failed=0.2")
    run = tiny.Run(tiny.overrides(folder, folder / "ends", *OPTIONS, *more))
    try:
        printed = run.output()
    finally:
        run.kill_all()
    assert run.process.returncode == 1
    error = printed[printed.index("error: ") :]
    assert error.startswith("error: 4 of 16 samples have no reward, rewards.client.max_failed=0.2: 4 x verifier")
    assert f"4 x verifier {OWN}: {REASON}" in error
    assert "first on row 'task-" in error
    assert 'raise KeyError("gone")' in error
