"""Whole runs with a verifier of one's own that works when it is tried and raises later."""

import json
from pathlib import Path

import pytest

from tests.recipes import tiny

OWN = "tests.rewards.own.raises_in_a_rank"
REASON = "it raised KeyError: 'gone' (own.py:"
OPTIONS = ("stage.trains=[rl]", "algorithm.steps=1", f"rewards.mix={{general_rule: {{{OWN}: 1.0}}}}")
OPTIONS += (f"data.scores={{{OWN}: [task, benign]}}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    tiny.make(folder)
    return folder


def test_it_is_a_failed_verdict_and_the_run_goes_on(folder: Path) -> None:
    run_dir = folder / "goes_on"
    printed = tiny.complete(tiny.overrides(folder, run_dir, *OPTIONS, "rewards.client.max_failed=0.25"))
    assert f"4 x verifier {OWN}: {REASON}" in printed
    assert "first on row 'task-" in printed
    assert f"evaluation: 2 x verifier {OWN}: {REASON}" in printed
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").open()]
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
