"""Records on disk: valid JSON always, whole after a resume, the old file or the new one and nothing between."""

import json
import resource

import numpy as np
import pytest
import torch

from recipes.run import records


def rows_of_step(step):
    return [
        {"step": step, "sample_index": i, "response": f"line\nbreak \u2028 你好 {i}", "reward": 0.1 * i}
        for i in range(3)
    ]


def test_a_resumed_file_equals_an_unbroken_one(tmp_path):
    unbroken, resumed = tmp_path / "unbroken.jsonl", tmp_path / "resumed.jsonl"
    for step in range(1, 11):
        records.append_rows(unbroken, rows_of_step(step))
    for step in range(1, 8):
        records.append_rows(resumed, rows_of_step(step))
    with resumed.open("ab") as file:
        file.write(b'{"step": 8, "sample_index": 0, "resp')  # killed in the middle of a line
    assert records.truncate_after(resumed, 5) == 15
    for step in range(6, 11):
        records.append_rows(resumed, rows_of_step(step))
    assert resumed.read_bytes() == unbroken.read_bytes()
    assert [row["step"] for row in records.read_rows(resumed)] == [s for s in range(1, 11) for _ in range(3)]


def test_truncating_keeps_nothing_at_step_zero_and_accepts_a_file_not_yet_begun(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert records.truncate_after(path, 0) == 0
    assert not path.exists()
    records.append_rows(path, rows_of_step(1))
    assert records.truncate_after(path, 0) == 0
    assert path.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_not_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        records.truncate_after(path, 1)
    assert path.read_text().count("\n") == 3
    with pytest.raises(ValueError, match="line 2"):
        list(records.read_rows(path))


def test_every_row_is_on_disk_before_the_next_is_asked_for(tmp_path):
    path = tmp_path / "samples.jsonl"
    seen = []

    def rows():
        for step in (1, 2, 3):
            seen.append(path.read_bytes().count(b"\n"))
            yield {"step": step}

    records.append_rows(path, rows())
    assert seen == [0, 1, 2]


def test_a_line_for_which_there_is_no_room_is_not_written_in_part_and_hides_no_error(tmp_path):
    """A write that crosses the limit is cut off there, as on a disk that gets full, and only the next one fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    events, metrics = tmp_path / "events.jsonl", tmp_path / "metrics.jsonl"
    records.append_rows(metrics, [{"step": 1}])
    try:
        with pytest.raises(ZeroDivisionError), records.launch(tmp_path, resume=False):
            before = events.read_bytes(), metrics.read_bytes()
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[0]) + 20, limits[1]))
            raise ZeroDivisionError
        with pytest.raises(OSError, match=r"go on with resume=true: '.*/metrics\.jsonl'"):
            records.append_rows(metrics, [{"step": 2, "text": "x" * 200}])
        with pytest.raises(OSError, match=r"File too large.*/events\.jsonl"):
            records.event(tmp_path, "checkpoint", step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (events.read_bytes(), metrics.read_bytes()) == before
    records.event(tmp_path, "resume")
    assert [event["kind"] for event in records.read_events(events)] == ["start", "resume"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), torch.tensor(float("-inf"))])
def test_nan_is_refused_by_name_and_null_is_allowed(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match=r"metrics\.jsonl: grad_norm is (nan|inf|-inf)"):
        records.append_rows(path, [{"step": 1, "grad_norm": bad}])
    assert path.read_bytes() == b""
    with pytest.raises(ValueError, match=r"evaluation\.json: after: interval\[1\]"):
        records.write_json(tmp_path / "evaluation.json", {"after": {"interval": [0.0, bad]}})
    records.append_rows(path, [{"step": 1, "grad_norm": None}])
    assert path.read_text() == '{"step": 1, "grad_norm": null}\n'


def test_scalars_of_numpy_and_torch_and_odd_text_become_plain_json(tmp_path):
    path = tmp_path / "samples.jsonl"
    text = "lone \ud800 surrogate, \x00 zero"
    records.append_rows(path, [{"step": 1, "a": np.float32(0.5), "b": torch.tensor(3), "c": (np.int64(2),), "t": text}])
    assert json.loads(path.read_bytes()) == {"step": 1, "a": 0.5, "b": 3, "c": [2], "t": text}


def test_a_row_needs_its_step(tmp_path):
    with pytest.raises(ValueError, match="step is None"):
        records.append_rows(tmp_path / "metrics.jsonl", [{"reward/mean": 1.0}])


def test_write_json_leaves_the_old_file_when_it_fails_and_no_partial_file(tmp_path):
    path = tmp_path / "evaluation.json"
    records.write_json(path, {"after": 1})
    with pytest.raises(ValueError):
        records.write_json(path, {"after": float("nan")})
    with pytest.raises(TypeError):
        records.write_json(path, {"after": object()})
    assert json.loads(path.read_text()) == {"after": 1}
    records.write_json(path, {"after": 2})
    assert json.loads(path.read_text()) == {"after": 2}
    assert [file.name for file in tmp_path.iterdir()] == ["evaluation.json"]


def test_phases_come_in_the_order_of_the_loop_then_by_name():
    rows = [{"time/step": 1, "time/zip": 1, "time/sync": 1, "time/generate": 1}, {"time/train": 1, "time/advantage": 1}]
    assert records.time_phases(rows) == ["generate", "train", "sync", "advantage", "zip"]


def test_significance_is_read_off_the_interval():
    for score, rise, fall in (("capability", "better", "worse"), ("unsafe/harmful", "worse", "better")):
        assert records.significance(score, {"interval": [0.01, 0.2]}) == rise
        assert records.significance(score, {"interval": [-0.2, -0.01]}) == fall
        assert records.significance(score, {"interval": [0.0, 0.2]}) == "not significant"


def test_transcripts_show_every_kind_and_changes_first():
    def item(name, kind, before, after):
        return {"id": name, "kind": kind, "labels": {"before": before, "after": after}}

    items = [
        item("a", "harmful", "safe", "safe"),
        item("b", "harmful", "unsafe", "safe"),
        item("c", "harmful", "unsafe", "safe"),
        item("d", "benign", "helpful", "helpful"),
    ]
    assert [chosen["id"] for chosen in records.choose_transcripts(items, 3)] == ["b", "d", "c"]


def test_environment_names_machine_and_versions():
    environment = records.environment("cpu", processes=2)
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["versions"]["numpy"] == np.__version__
    assert environment["machine"]["device"] == "cpu"
    assert environment["machine"]["processes"] == 2
    assert environment["machine"]["memory_gib"] > 0


def test_events_have_the_step_that_they_follow(tmp_path):
    """A server's come from a process that knows no steps; an error leaves a stop, and its first line."""
    with pytest.raises(OSError), records.launch(tmp_path, resume=False):
        records.append_rows(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2, "text": "x" * 70_000}])
        records.event(tmp_path, "checkpoint", step=2)
        with (tmp_path / "events.jsonl").open("a") as file:
            file.write('{"time": 4e9, "kind": "server restart", "server": "judge_0"}\n')
        raise OSError("no room\nat all")
    with records.launch(tmp_path, resume=True):
        pass
    events = records.read_events(tmp_path / "events.jsonl")
    assert [(each["kind"], each["after_step"]) for each in events] == [
        ("start", 0),
        ("checkpoint", 2),
        ("stop", 2),
        ("resume", 2),
        ("finish", 2),
        ("server restart", 2),
    ]
    assert events[2]["why"] == "OSError: no room"
