"""A complete run that generates one step ahead, oversamples, carries partial rollouts over, and loses its only
engine; and one whose updates reach the engines in flight."""

import os
import signal
from pathlib import Path

import pytest

from recipes.run import records, sample_files
from tests.recipes import tiny

STEPS = 4
OPTIONS = ("stage.trains=[rl]", "stage.evaluates=false", "precision=fp32", "rollout.staleness=1")
OPTIONS += ("parallel=tp2_sp", "cluster.ranks=2")
CORRECTED = ("algorithm.importance_sampling=token_truncated", "algorithm.max_mismatch=5")  # large steps of a tiny model
FLOOR = ("rewards.constraint.verifier=safety", "rewards.constraint.floor=0.9", "rewards.constraint.rate=0.1")
CARRY = ("rollout.oversample=1.5", "rollout.partial_rollout_tokens=3", f"algorithm.steps={STEPS}")


def blocked(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def engines(run: tiny.Run) -> set[int]:
    return {pid for pid, command in run.processes().items() if "rollout.engine_server" in command}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; its engine was killed after the first step, while it was working for the third."""
    folder = tmp_path_factory.mktemp("session")
    tiny.make(folder)
    run = tiny.Run(tiny.overrides(folder, folder / "run", *OPTIONS, *CORRECTED, *FLOOR, *CARRY))
    try:
        metrics = folder / "run" / "metrics.jsonl"
        run.wait_for("the first step", lambda: metrics.is_file() and metrics.read_bytes())
        (engine,) = engines(run)
        assert blocked(engine, signal.SIGUSR1), "which is the ranks' news (recipes.run.preemption)"
        os.kill(engine, signal.SIGKILL)
        run.wait_for("a new engine", lambda: engines(run) - {engine})
        printed = run.output()
    finally:
        run.kill_all()
    assert run.process.returncode == 0, printed[-4000:]
    return folder / "run"


def test_the_run_goes_on_with_a_new_engine(run_dir: Path) -> None:
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["kl/reference"] == 0.0 and rows[0]["train_inference_mismatch/max"] < 1e-4
    events = list(records.read_rows(run_dir / "events.jsonl"))
    assert [event["kind"] for event in events if event["kind"] != "checkpoint"] == ["start", "engine restart", "finish"]
    assert next(event["engine"] for event in events if event["kind"] == "engine restart") == "engine_0"


def test_samples_are_one_update_old_and_older_where_they_were_carried_over(run_dir: Path) -> None:
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    stale = [row["staleness/max"] for row in rows]
    assert stale[0] == 0 and all(0 <= age <= step for step, age in enumerate(stale)) and max(stale) >= 1
    assert rows[1]["train_inference_mismatch/mean"] > 1e-3, "by other weights than those that are trained"


def test_every_step_has_whole_groups_of_different_prompts(run_dir: Path) -> None:
    samples = list(sample_files.read(run_dir))
    assert [s["step"] for s in samples] == [step for step in range(1, STEPS + 1) for _ in range(16)]
    assert [s["sample_index"] for s in samples] == [0, 1, 2, 3] * 4 * STEPS
    taken = [s["prompt_id"] for s in samples[::4]]
    assert all(len(set(taken[4 * step : 4 * step + 4])) == 4 for step in range(STEPS))


def test_the_multiplier_rises_by_what_safety_lacks(run_dir: Path) -> None:
    expected = 0.0
    for row in records.read_rows(run_dir / "metrics.jsonl"):
        expected = max(0.0, expected + 0.1 * (0.9 - row.get("reward/safety", 0.9)))
        assert row["constraint/multiplier"] == pytest.approx(expected)
    assert expected > 0


def test_a_run_whose_updates_reach_the_engines_in_flight(tmp_path: Path) -> None:
    """Also a tiny model's weights come while the next step's batch is the engine's, which may have ended it by then."""
    tiny.make(tmp_path)
    options = (*OPTIONS, *CORRECTED, "rollout.in_flight_updates=true", "algorithm.steps=3")
    tiny.complete(tiny.overrides(tmp_path, tmp_path / "run", *options))
    rows = list(records.read_rows(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["staleness/max"] == rows[0]["staleness/mean"] == 0
    assert all(0 <= row["staleness/mean"] <= row["staleness/max"] <= 1 for row in rows)
    assert all(row["sync/bytes"] == rows[0]["sync/bytes"] > 0 for row in rows)
