"""The live view on a pseudo-terminal of 80 columns and, as under CI or a job's log, on a pipe."""

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from recipes.run.display import Display, _Footer, _Run, _Stage, duration, eta, server_health, sparkline, step_columns

HOSTILE = "[bold red]markup[/bold red] [/] \x1b[31mcolour\x1b[0m \u202eturned 你好 \ud800"
ANSI = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


def metrics(step):
    return {
        "step": step,
        "reward/mean": 0.5,
        "reward/safety": 0.25 + step / 100,
        "reward/capability": 0.75,
        "reward/helpfulness": 1.0,
        "kl/reference": 0.001,
        "train_inference_mismatch/mean": 0.0004,
        "train_inference_mismatch/max": 0.006,
        "grad_norm": 1.25,
        "response_length/mean": 48.0,
        "tokens_per_second": 612.4,
        "time/step": 10.0,
        "time/generate": 6.0,
        "time/train": 3.5,
        "sync/bytes": 1000,
        **{f"servers/judge/{what}": n for what, n in (("asked", 64), ("replies", 66), ("retries", 2), ("failed", 0))},
        **{f"servers/value/{what}": n for what, n in (("asked", 8), ("replies", 7), ("retries", 0), ("failed", 1))},
    }


def evaluation():
    def score(mean):
        return {"mean": mean, "interval": [mean - 0.1, mean + 0.1], "n": 60}

    def stage(mean):
        scores = {"safety": score(mean), "capability": score(mean - 0.1), "helpfulness": score(0.7)}
        return scores | {"sampled": dict(scores)}

    effect = {
        "safety": {"mean": 0.3, "interval": [0.2, 0.4]},
        "capability": {"mean": -0.3, "interval": [-0.4, -0.2]},
        "helpfulness": {"mean": 0.0, "interval": [-0.1, 0.1]},
    }
    return {
        "base": stage(0.2),
        "before": stage(0.4),
        "after": stage(0.7),
        "difference": effect | {"sampled": dict(effect)},
        "transcripts": [
            {
                "id": "x",
                "kind": "harmful",
                "prompt": HOSTILE,
                "base": HOSTILE,
                "before": HOSTILE,
                "after": "word " * 400,
                "labels": {"base": "unsafe", "before": "unsafe", "after": "safe with warning"},
            }
        ],
    }


def whole_run(display: Display, run_dir: Path):
    (run_dir / "report.html").touch()
    with display:
        display.message(HOSTILE)
        with display.stage("load model"):
            pass
        with display.stage("SFT warm start"):
            for done in range(1, 101):
                display.progress(done, 100, f"loss {1 / done:.2f}")
        for step in range(1, 23):
            display.step(metrics(step), 22)
        display.finish(evaluation(), run_dir)


def on_terminal(action, monkeypatch, columns=80) -> str:
    """What `action(stream)` writes to a pseudo-terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    main, side = pty.openpty()
    chunks = []

    def read():
        while True:
            try:
                chunk = os.read(main, 65536)
            except OSError:  # Linux reports the closed other side this way
                return
            chunks.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(side, "w", encoding="utf-8") as stream:
            action(stream)
    finally:
        reader.join(timeout=60)
        os.close(main)
    return b"".join(chunks).decode()


def test_a_step_of_a_run_without_a_reference_has_no_kl_column():
    row = metrics(3)
    del row["kl/reference"]
    names = [name.strip() for name, _ in step_columns(row, 10, 200)]
    assert names == [name.strip() for name, _ in step_columns(metrics(3), 10, 200) if name.strip() != "KL"]
    stream = io.StringIO()
    with Display(stream=stream) as display:
        display.step(row, 10)
    assert "mismatch 0.0004" in stream.getvalue() and "KL" not in stream.getvalue()


def test_a_log_is_plain_with_one_line_per_event(tmp_path):
    stream = io.StringIO()
    whole_run(Display(stream=stream), tmp_path)
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text and "\u202e" not in text
    lines = text.splitlines()
    events = [line for line in lines if line.startswith("[")]
    assert all(re.match(r"\[ *\d+\.\d+s\] ", line) for line in events)
    steps = [line for line in events if "step " in line and "/22  reward" in line]
    assert len(steps) == 22
    for part in (
        "safety 0.260",
        "helpfulness 1.000",
        "tok/s 612",
        "generate 6.0s",
        "train 3.5s",
        "judge: 64 asked, 2",
        "ETA 3 min 30 s",
    ):
        assert part in steps[0]
    assert sum("SFT warm start: " in line and "/100" in line for line in events) == 10
    assert any("load model: done in" in line for line in events)
    assert "[bold red]markup[/bold red] [/]" in text


def test_the_closing_view_has_table_transcripts_and_places(tmp_path):
    stream = io.StringIO()
    whole_run(Display(stream=stream), tmp_path)
    closing = stream.getvalue().partition("Held-out prompts")[2]
    for part in ("after SFT", "after RL", "0.70", "0.60..0.80", "+0.20..+0.40", "better", "worse", "not significant"):
        assert part in closing
    assert closing.count("greedy") == closing.count("sampled") == 3
    assert "harmful: unsafe -> safe with warning" in closing
    assert "[...]" in closing  # the long answer is cut here, not in the report
    assert str(tmp_path / "report.html") in closing
    assert str(tmp_path / "hf") not in closing  # only what exists


def test_a_log_line_can_be_read_while_the_stage_still_runs():
    program = (
        "import sys\nfrom recipes.run.display import Display\nwith Display() as d:\n"
        "    with d.stage('load model'):\n        sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"},
    ) as child:
        assert child.stdin and child.stdout
        ready, _, _ = select.select([child.stdout], [], [], 30)
        if not ready:
            child.kill()
        assert ready, "the line was still in a buffer"
        assert "load model ..." in child.stdout.readline()
        assert child.poll() is None
        child.stdin.close()
        assert "load model: done in" in child.stdout.readline()


def test_a_terminal_of_80_columns(tmp_path, monkeypatch):
    text = on_terminal(lambda stream: whole_run(Display(stream=stream), tmp_path), monkeypatch)
    plain = ANSI.sub("", text)
    assert "✓ load model" in plain and "✓ SFT warm start" in plain
    # Whatever ANSI codes the view sends are its own: those in model text lost their escape character.
    assert "\ufffd[31mcolour" in plain and "\u202e" not in plain
    rows = [line for line in re.split(r"[\r\n]+", plain) if re.match(r" *\d+/22 +0\.500", line)]
    assert len(rows) == 22
    headings = [line for line in re.split(r"[\r\n]+", plain) if " step  reward  safety" in line]
    assert len(headings) == 2  # steps 1 and 21
    for line in re.split(r"[\r\n]+", plain):
        assert len(line) <= 80 or "/report.html" in line, line
    assert "ETA" in plain and "…" not in plain.partition("Held-out prompts")[2]
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is visible again
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_the_lines_under_the_rows_of_80_columns():
    stage = _Stage("SFT warm start", time.monotonic() - 30, done=25, total=100, detail="loss 1.25")
    run = _Run(total_steps=40, rows=[metrics(step) for step in range(1, 11)])
    console = Console(file=io.StringIO(), width=80, color_system=None)
    with console.capture() as capture:
        console.print(_Footer([stage], run))
    lines = capture.get().splitlines()
    assert max(len(line) for line in lines) <= 80
    assert re.search(r"SFT warm start +30\.0 s .* 25/100 +loss 1\.25  1 min 30 s left", lines[0])
    assert re.search(r"RL .* 10/40 +ETA 5 min 00 s", lines[2])
    assert len(lines[3].rstrip()) == 78 and set(lines[3].strip()) == {"█"}
    assert re.search(r"generate.6\.0s .*train.3\.5s", lines[4])
    assert lines[5].rstrip() == "servers  ● judge 64 asked, 2 retries  ● value 8 asked, 1 failed"
    assert [well for _, well, _ in server_health(metrics(1))] == [True, False]
    curves = {line.split()[0]: line for line in lines[6:]}
    assert list(curves) == ["safety", "capability", "helpfulness"]
    assert "0.26 → 0.35" in curves["safety"] and "▁" in curves["safety"] and "█" in curves["safety"]


def test_an_error_leaves_the_terminal_whole_and_names_the_stage(monkeypatch):
    def fail(stream):
        with pytest.raises(KeyboardInterrupt), Display(stream=stream) as display, display.stage("start engine"):
            raise KeyboardInterrupt

    text = on_terminal(fail, monkeypatch)
    assert "✗ start engine  failed after" in ANSI.sub("", text)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_only_the_active_display_prints(tmp_path):
    stream = io.StringIO()
    whole_run(Display(active=False, stream=stream), tmp_path)
    assert stream.getvalue() == ""


def test_a_stream_that_knows_only_ascii_gets_ascii(tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    whole_run(Display(stream=stream), tmp_path)
    stream.flush()
    assert b"turned ??" in raw.getvalue()


def test_progress_belongs_to_a_stage():
    with pytest.raises(RuntimeError, match="outside a stage"):
        Display(stream=io.StringIO()).progress(1, 2)


@pytest.mark.parametrize("width", [60, 70, 80, 120])
def test_columns_are_left_out_to_fit(width):
    columns = step_columns(metrics(3), 22, width)
    assert sum(len(name) for name, _ in columns) + 2 * (len(columns) - 1) <= width
    names = [name.strip() for name, _ in columns]
    assert names[:5] == ["step", "reward", "safety", "capability", "helpfulness"]
    assert (names[-1] == "grad") == (width == 120)


def test_duration_eta_and_sparkline():
    assert [duration(s) for s in (4.21, 59.97, 185, 7620)] == ["4.2 s", "1 min 00 s", "3 min 05 s", "2 h 07 min"]
    rows = [metrics(step) | {"time/step": 100.0 if step == 1 else 2.0} for step in (1, 2, 3)]
    assert eta(rows, 13) == "20.0 s"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 0, 1, 1], 2) == "▁█"
    assert sparkline([0.5, 0.5], 10) == "▁▁"
