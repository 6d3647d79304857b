"""A whole run that generates one step ahead, oversamples, carries responses over, and loses its only engine; and whose
turn it is on a shared GPU."""

import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from recipes.run import records
from recipes.training.session import Session
from rewards.verifiers.served import ServedVerifier
from tests.recipes import tiny
from tests.rewards.fake_server import JUDGE, MODEL, FakeServer, good
from tests.rewards.test_client import ROW, asking

STEPS = 4
OPTIONS = ("stage.trains=[rl]", "stage.evaluates=false", "precision=fp32", "rollout.staleness=1")
OPTIONS += ("parallel=tp2_sp", "cluster.ranks=2")
CORRECTED = ("algorithm.importance_sampling=true", "algorithm.max_mismatch=5")  # large steps of a tiny model
FLOOR = ("rewards.constraint.verifier=safety", "rewards.constraint.floor=0.9", "rewards.constraint.rate=0.1")
CARRY = ("rollout.oversample=1.5", "rollout.partial_rollout_tokens=3", f"algorithm.steps={STEPS}")


def blocked(pid: int, number: signal.Signals) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(line.split()[1] for line in lines if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder; its engine was killed behind the first step, while it was working for the third."""
    folder = tmp_path_factory.mktemp("session")
    tiny.make(folder)
    run = tiny.Run(tiny.overrides(folder, folder / "run", *OPTIONS, *CORRECTED, *FLOOR, *CARRY))
    try:
        metrics = folder / "run" / "metrics.jsonl"
        run.wait_for("the first step", lambda: metrics.is_file() and metrics.read_bytes())
        processes = run.processes()
        (engine,) = [pid for pid, command in processes.items() if "rollout.engine_server" in command]
        assert blocked(engine, signal.SIGUSR1), "which is the ranks' news (recipes.run.preemption)"
        os.kill(engine, signal.SIGKILL)
        printed = run.output()
    finally:
        run.kill_all()
    assert run.process.returncode == 0, printed[-4000:]
    return folder / "run"


def test_the_run_goes_on_with_a_new_engine(run_dir: Path) -> None:
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[0]["kl/reference"] == 0.0 and rows[0]["train_inference_mismatch/max"] < 1e-4
    starts = (run_dir / "logs" / "engine_0.log").read_text().count("Initializing a V1 LLM engine")
    assert starts == 2
    events = list(records.read_rows(run_dir / "events.jsonl"))
    assert [event["kind"] for event in events if event["kind"] != "checkpoint"] == ["start", "engine restart", "finish"]
    assert next(event["engine"] for event in events if event["kind"] == "engine restart") == "engine_0"


def test_samples_are_one_update_old_and_older_where_they_were_carried_over(run_dir: Path) -> None:
    rows = list(records.read_rows(run_dir / "metrics.jsonl"))
    stale = [row["staleness/max"] for row in rows]
    assert stale[0] == 0 and all(0 <= age <= step for step, age in enumerate(stale)) and max(stale) >= 1
    assert rows[1]["train_inference_mismatch/mean"] > 1e-3, "by other weights than those that are trained"


def test_every_step_has_whole_groups_of_different_prompts(run_dir: Path) -> None:
    samples = list(records.read_rows(run_dir / "samples.jsonl"))
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


class FakeSleeper:
    """In the place of an engine that sleeps, for which a GPU would be needed: it only remembers that it was told so."""

    settings = SimpleNamespace(sleep=True)
    alive = True

    def __init__(self, events: list[str]) -> None:
        self.events = events

    def call(self, method: str, path: str, body: dict[str, Any]) -> None:
        self.events.append(f"engine: {path}")


def test_engines_fall_asleep_before_judges_wake_and_these_sleep_when_all_is_judged(tmp_path: Path) -> None:
    """All are judged in one turn, and each has its own verdict."""
    answers = [f"answer {i}" for i in range(5)]

    async def behave(number: int, request: Any, body: dict[str, Any]) -> Any:
        text = body["messages"][-1]["content"]
        return good(f"Label: {'good' if int(text[-1]) % 3 else 'bad'}")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with FakeServer(behave) as fake, asking(fake.address) as (client, _):
            verifier = ServedVerifier(JUDGE, "judge", MODEL, {}, client)
            session: Any = SimpleNamespace(
                engines=[FakeSleeper(fake.events)], control=dist.group.WORLD, client=client, node=0, nodes=1
            )
            session._tell_sleepers = partial(Session._tell_sleepers, session)
            session.sleep_engines = partial(Session.sleep_engines, session)
            found = Session.judge_together(session, answers, lambda answer: verifier(ROW, answer).score)  # type: ignore[arg-type, return-value, union-attr]
    finally:
        dist.destroy_process_group()
    assert found == [0.0, 1.0, 1.0, 0.0, 1.0]
    assert fake.events == ["engine: /sleep", "/wake_up", *["asked"] * 5, "/sleep"]
    assert session.engines_rest
