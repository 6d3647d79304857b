"""The run object on one rank: what it writes where, and what its phases cost."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext import platform
from recipes.run import records
from recipes.run.clock import PhaseClock
from recipes.run.display import Display
from recipes.run.run import Run
from recipes.run.watchdog import Watchdog


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run of one rank in an empty folder; what its logger gets is in ``logged``."""
    platform.activate("cpu")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    watchdog = Watchdog(tmp_path, 0, seconds=600)
    folder = tmp_path / "run"
    folder.mkdir()
    logged: list[tuple[Mapping[str, Any], str]] = []
    assert dist.group.WORLD is not None
    one = Run(
        root=folder,
        folder=folder,
        run_id="id",
        rank=0,
        control=dist.group.WORLD,
        processes=1,
        device=torch.device("cpu"),
        display=Display(active=False),
        clock=PhaseClock(watchdog),
        loggers=[lambda row, prefix: logged.append((row, prefix))],
        checkpoint_every=2,
        checkpoints_kept=2,
        slow_factor=100.0,
        write_settings=lambda: None,
    )
    one.logged = logged  # type: ignore[attr-defined]
    yield one
    watchdog.stop()
    dist.destroy_process_group()


def test_a_step_s_line_has_the_seconds_of_its_phases_and_the_next_one_only_its_own(run: Run) -> None:
    with run.phase("generate"):
        time.sleep(0.05)
    first = run.record({"step": 1})
    assert not any(name.startswith("throughput/") for name in first), "nothing was counted"
    assert first["memory/rank_peak_gib"] > 0 and first["memory/node_gib"] > first["memory/rank_peak_gib"] / 2
    with run.phase("train"):
        run.count(tokens=60, flops=1e9)
        run.count(tokens=40)
    second = run.record({"step": 2})
    assert second["throughput/tokens_per_second_per_rank"] == pytest.approx(100 / second["time/step"])
    assert "throughput/mfu" not in second, "a CPU's peak is not known"
    assert first["time/generate"] >= 0.05 and first["time/step"] == first["time/generate"]
    assert "time/generate" not in second and second["time/step"] == second["time/train"]
    assert list(records.read_rows(run.folder / "metrics.jsonl")) == [first, second]


def test_a_part_writes_into_its_own_folder_under_its_own_name_and_events_into_the_run_s(run: Run) -> None:
    part = run.part("warm_start")
    part.record({"step": 1})
    run.record({"step": 1})
    part.event("checkpoint", step=1)
    assert [prefix for _, prefix in run.logged] == ["warm_start/", ""]  # type: ignore[attr-defined]
    assert (run.folder / "warm_start" / "metrics.jsonl").is_file()
    assert [event["kind"] for event in records.read_events(run.root / "events.jsonl")] == ["checkpoint"]


def test_a_resumed_run_drops_the_records_of_the_steps_that_it_makes_again(run: Run) -> None:
    for step in (1, 2, 3):
        run.record({"step": step})
    run.begin(1)
    assert [row["step"] for row in records.read_rows(run.folder / "metrics.jsonl")] == [1]
