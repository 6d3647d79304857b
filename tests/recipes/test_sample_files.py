"""The files of the responses: a step's is there when it is whole, and resuming opens none."""

import os
import threading
from pathlib import Path

import pytest

from recipes.run import sample_files
from recipes.run.sample_files import SampleWriter


def rows(step: int, *names: str) -> list[dict[str, object]]:
    return [{"step": step, "prompt_id": name} for name in names]


def test_rows_come_step_by_step_and_rank_by_rank(tmp_path: Path) -> None:
    writers = [SampleWriter(tmp_path, rank) for rank in (0, 8)]
    for step in (1, 2, 10):
        for writer in reversed(writers):
            writer.write(step, lambda step=step, rank=writer.rank: rows(step, f"a{rank}", f"b{rank}"))
    for writer in writers:
        writer.wait()
    read = [(row["step"], row["prompt_id"]) for row in sample_files.read(tmp_path)]
    assert read == [(step, name) for step in (1, 2, 10) for name in ("a0", "b0", "a8", "b8")]


def test_a_step_is_written_aside_and_waits_for_the_step_before(tmp_path: Path) -> None:
    gate = threading.Event()
    writer = SampleWriter(tmp_path, 0)

    def slow() -> list[dict[str, object]]:
        assert gate.wait(60)
        return rows(1, "late")

    writer.write(1, slow)
    assert not list(sample_files.read(tmp_path)), "no part of a step is shown"
    gate.set()
    writer.write(2, lambda: rows(2, "next"))
    assert next(sample_files.read(tmp_path))["prompt_id"] == "late"
    writer.wait()


def test_what_goes_wrong_in_the_thread_is_raised_at_the_next_step_and_at_a_checkpoint(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path, 0)
    writer.write(1, lambda: [{"step": None}])
    for again in (lambda: writer.write(2, lambda: rows(2, "x")), writer.wait):
        with pytest.raises(ValueError, match="step is None"):
            again()
    assert not list(sample_files.read(tmp_path))


def test_resuming_removes_later_steps_and_what_was_cut_off_and_reads_nothing(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path, 0)
    for step in (1, 2, 3):
        writer.write(step, lambda step=step: rows(step, "x"))
        writer.wait()
    folder = tmp_path / sample_files.FOLDER
    (folder / "step_000002_rank_00008.jsonl.partial").write_text('{"step": 2}\n')
    (folder / "notes.txt").write_text("a user's")
    kept = folder / "step_000001_rank_00000.jsonl"
    os.utime(kept, (1, kept.stat().st_mtime))
    sample_files.drop_after(tmp_path, 2)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["notes.txt", "step_000001_rank_00000.jsonl", "step_000002_rank_00000.jsonl"]
    assert kept.stat().st_atime == 1
    sample_files.drop_after(tmp_path / "no run yet", 0)
