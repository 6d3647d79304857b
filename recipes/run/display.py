"""What a run prints: its stages, one row per RL step, and the result."""

import os
import signal
import statistics
import sys
import time
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from recipes.run.records import (
    TOKENS_PER_SECOND,
    choose_transcripts,
    evaluation_rows,
    model_stages,
    reward_verifiers,
    significance,
    time_phases,
)

PHASE_STYLES = ("blue", "yellow", "magenta", "green", "cyan", "red")
SHOW_CURSOR = b"\x1b[?25h\n"
SPARKS = "▁▂▃▄▅▆▇█"
TRANSCRIPT_CHARACTERS = 480  # of each answer in the closing view; the report has all of it
HEADER_EVERY = 20  # steps between repeated column headings
PLAIN_PROGRESS_LINES = 10  # at most, per stage, in a log
HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs")  # of Unicode: control, format, surrogate
SHOWN_CONTROLS = {"\n", "\t", "\u200c", "\u200d"}  # some scripts need the two joiners


@dataclass
class _Stage:
    name: str
    started: float
    done: int = 0
    total: int = 0
    detail: str = ""
    lines: int = 0  # progress lines printed so far; in a log only


@dataclass
class _Run:
    """What the footer below the rows of the steps shows."""

    total_steps: int = 0
    rows: list[Mapping[str, Any]] = field(default_factory=list)


class Display:
    """Shows one run. It is a context manager, which restores the terminal after an error or Ctrl-C.

    On a terminal it shows a spinner and a clock for the current stage, a permanent line when the stage ends, and a
    permanent row per step. Below the rows it shows progress, ETA, phase times and one reward curve per verifier.
    Anywhere else (a pipe, CI, a job's log file) it uses no cursor movement and no colour. There it prints one flushed
    line per event, which starts with the seconds since the start of the run. Both fit 80 columns.

    Every rank may call it. Only rank 0's display, with `active=True`, prints. Text from models is shown literally:
    control characters are replaced, and markup is not interpreted.

    On a terminal a background thread repaints. Start processes with spawn or subprocess, not fork, and send their
    output to a file, since output of another process on the terminal breaks the repainted lines.
    """

    def __init__(self, active: bool = True, stream: TextIO | None = None) -> None:
        """
        Args:
            active: whether to print.
            stream: where to write, standard output by default.
        """
        target = stream or sys.stdout
        self._active = active
        self._terminal = target.isatty() and os.environ.get("TERM") != "dumb"
        self._encoding = target.encoding or "utf-8"
        self._console = Console(
            file=target,
            force_terminal=self._terminal,
            width=None if self._terminal else 100,
            highlight=False,
            markup=False,
            emoji=False,
        )
        self._started = time.monotonic()
        self._stages: list[_Stage] = []
        self._run = _Run()
        self._columns: list[str] = []
        self._live: Live | None = None
        self._on_sigterm: Any = signal.SIG_DFL

    def __enter__(self) -> Self:
        if self._active and self._terminal:
            self._live = Live(
                _Footer(self._stages, self._run), console=self._console, refresh_per_second=5, transient=True
            )
            self._live.start()
            # On Ctrl-C the ranks get SIGTERM, which by default leaves the terminal's cursor hidden.
            self._on_sigterm = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_live()

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        os.write(self._console.file.fileno(), SHOW_CURSOR)
        signal.signal(number, self._on_sigterm)
        os.kill(os.getpid(), number)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show the block as a timed stage: with a tick and its seconds when it ends, with a cross when it raises."""
        stage = _Stage(name, time.monotonic())
        self._stages.append(stage)
        if not self._terminal:
            self._event(f"{name} ...")
        try:
            yield
        except BaseException:
            self._stages.remove(stage)
            self._stage_line("✗", "red", stage, "failed after ")
            raise
        self._stages.remove(stage)
        self._stage_line("✓", "green", stage, "")

    def progress(self, done: int, total: int, detail: str = "") -> None:
        """Show the progress of the current stage: ``done`` of ``total`` steps or prompts. ``detail`` may be the loss.

        Raises:
            RuntimeError: outside a stage.
        """
        if not self._stages:
            raise RuntimeError("progress() outside a stage: wrap the work in `with display.stage(name):`")
        stage = self._stages[-1]
        stage.done = done
        stage.total = total
        stage.detail = detail
        if self._terminal or done * PLAIN_PROGRESS_LINES < (stage.lines + 1) * total:
            return
        stage.lines = done * PLAIN_PROGRESS_LINES // total
        elapsed = time.monotonic() - stage.started
        remaining = duration(elapsed / done * (total - done))
        self._event(f"{stage.name}: {done}/{total}{'  ' + detail if detail else ''}  {remaining} left")

    def step(self, metrics: Mapping[str, Any], total_steps: int) -> None:
        """Show a finished RL step. ``metrics`` has the keys of metrics.jsonl (records.REQUIRED_METRICS)."""
        self._run.rows.append(metrics)
        self._run.total_steps = total_steps
        if self._terminal:
            columns = step_columns(metrics, total_steps, self._console.width)
            if [name for name, _ in columns] != self._columns or (len(self._run.rows) - 1) % HEADER_EVERY == 0:
                self._columns = [name for name, _ in columns]
                self._print(Text("  ".join(name.rjust(len(value)) for name, value in columns), style="bold dim"))
            self._print(Text("  ".join(value for _, value in columns)))
            return
        columns = step_columns(metrics, total_steps, 200)[1:]
        parts = [f"{name.strip()} {value.strip()}" for name, value in columns]
        parts += [f"{name} {metrics[f'time/{name}']:.1f}s" for name in time_phases([metrics])]
        parts += [f"server {name}: {counts}" for name, _, counts in server_health(metrics)]
        self._event(f"step {metrics['step']}/{total_steps}  {'  '.join(parts)}  ETA {eta(self._run.rows, total_steps)}")

    def message(self, text: str) -> None:
        """Show one line of information."""
        if self._terminal:
            self._print(Text(f"  {self._printable(text)}", style="dim"))
        else:
            self._event(text)

    def finish(self, evaluation: Mapping[str, Any], run_dir: Path) -> None:
        """Show the closing view: the table of results, up to three transcripts, and the files of the run.

        Args:
            evaluation: the content of evaluation.json, whose "transcripts" it chooses from.
            run_dir: the run's folder.
        """
        self._stop_live()
        self._print(Text(""))
        self._print(result_table(evaluation))
        self._print(Text(result_note(evaluation), style="dim"))
        for transcript in choose_transcripts(evaluation["transcripts"], 3):
            self._print(self._transcript(transcript, model_stages(evaluation)))
        self._print(Text("\nFiles", style="bold"))
        for name, description in (
            ("report.html", "the report: open it in a browser"),
            ("evaluation.json", "the table above with every transcript"),
            ("metrics.jsonl", "one object per step"),
            ("samples", "every response of RL, with its reward and advantage"),
            ("config.yaml", "the resolved configuration"),
            ("hf", "the trained model, for transformers and vLLM"),
        ):
            if (run_dir / name).exists():
                self._print(Text.assemble((f"  {run_dir / name}", "cyan"), f"  {description}"))
        self._print(Text(f"  total time {duration(time.monotonic() - self._started)}"))

    def _transcript(self, transcript: Mapping[str, Any], headings: Mapping[str, str]) -> Table:
        compared = [model for model in ("before", "after") if model in headings]
        labels = " -> ".join(transcript["labels"][model] for model in compared)
        title = Text(self._printable(f"{transcript['kind']}: {labels}"), style="bold")
        table = Table(box=None, show_header=False, title=title, title_justify="left", padding=(0, 1), expand=True)
        table.add_column(style="dim", width=9, no_wrap=True)
        table.add_column(overflow="fold", ratio=1)
        for key, heading in (("prompt", "prompt"), *((model, headings[model]) for model in compared)):
            text = self._printable(transcript[key])
            short = text if len(text) <= TRANSCRIPT_CHARACTERS else text[:TRANSCRIPT_CHARACTERS] + " [...]"
            table.add_row(heading, Text(short))
        table.add_row("", "")
        return table

    def _stage_line(self, mark: str, style: str, stage: _Stage, verb: str) -> None:
        elapsed = duration(time.monotonic() - stage.started)
        if not self._terminal:
            self._event(f"{stage.name}: {verb or 'done in '}{elapsed}")
            return
        tail = f"  {verb}{elapsed}"
        detail = f"  {stage.detail}" if stage.detail else ""
        self._print(Text.assemble((mark, style), f" {stage.name}", (f"{detail}{tail}", "dim")))

    def _event(self, text: str) -> None:
        """Print one line of a log and flush it. The line is never wrapped, so that grep finds it."""
        if self._active:
            line = f"[{time.monotonic() - self._started:8.1f}s] {self._printable(text)}".replace("\n", " ")
            print(line, file=self._console.file, flush=True)

    def _print(self, content: Text | Table) -> None:
        if self._active:
            self._console.print(content)
            self._console.file.flush()

    def _printable(self, text: str) -> str:
        """The text in the stream's encoding, with its control and direction-changing characters replaced."""
        hidden = {character for character in set(text) if unicodedata.category(character) in HIDDEN_CATEGORIES}
        clean = text.translate({ord(character): "\ufffd" for character in hidden - SHOWN_CONTROLS})
        return clean.encode(self._encoding, "replace").decode(self._encoding)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            signal.signal(signal.SIGTERM, self._on_sigterm)


@dataclass
class _Footer:
    """The repainted lines: the current stages, then the progress of RL."""

    stages: Sequence[_Stage]
    run: _Run

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for stage in list(self.stages):
            yield _stage_footer(stage)
        if self.run.rows and self.run.rows[-1]["step"] < self.run.total_steps:
            yield _run_footer(self.run, options.max_width)


def _stage_footer(stage: _Stage) -> Table:
    elapsed = time.monotonic() - stage.started
    spinner = Spinner("dots", style="blue")
    spinner.start_time = stage.started
    grid = Table.grid(padding=(0, 1))
    cells: list[Any] = [spinner, Text(stage.name, no_wrap=True), Text(duration(elapsed), "dim")]
    if stage.done:
        cells += [ProgressBar(stage.total, stage.done, width=16), Text(f"{stage.done}/{stage.total}", no_wrap=True)]
        left = duration(elapsed / stage.done * (stage.total - stage.done))
        cells.append(Text(f"{stage.detail}  {left} left".strip(), "dim", no_wrap=True, overflow="ellipsis"))
    grid.add_row(*cells)
    return grid


def _run_footer(run: _Run, width: int) -> Group:
    last = run.rows[-1]
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text("RL", "bold"),
        ProgressBar(run.total_steps, last["step"], width=max(10, width - 44)),
        Text(f"{last['step']}/{run.total_steps}"),
        Text(f"ETA {eta(run.rows, run.total_steps)}", "bold", no_wrap=True),
    )
    lines: list[Any] = [Text(""), bar]
    phases = time_phases(run.rows)
    if phases:
        lines += _phase_lines({name: last.get(f"time/{name}", 0.0) for name in phases}, width)
    health = server_health(last)
    if health:
        line = Text("servers  ", no_wrap=True, overflow="ellipsis")
        for name, healthy, counts in health:
            line.append("● ", "green" if healthy else "red").append(f"{name} {counts}  ")
        lines.append(line)
    for verifier in reward_verifiers(run.rows):
        values = [row[f"reward/{verifier}"] for row in run.rows if f"reward/{verifier}" in row]
        curve = sparkline(values, width - 32)
        lines.append(Text(f"{verifier[:13]:13} {curve} {values[0]:.2f} → {values[-1]:.2f}", "green", no_wrap=True))
    return Group(*lines)


def server_health(metrics: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """(name, whether it answered every request of the step, its request counts) for each verifier's server."""
    names = dict.fromkeys(key.split("/")[1] for key in metrics if key.startswith("servers/"))
    health = []
    for name in names:
        failed = metrics[f"servers/{name}/failed"]
        retries = metrics[f"servers/{name}/retries"]
        counts = f"{metrics[f'servers/{name}/asked']} asked"
        if retries:
            counts += f", {retries} retries"
        if failed:
            counts += f", {failed} failed"
        health.append((name, failed == 0, counts))
    return health


def _phase_lines(seconds: Mapping[str, float], width: int) -> list[Text]:
    """A bar that is divided among the phases in proportion to their seconds, and its legend."""
    total = sum(seconds.values()) or 1.0
    bar = Text(no_wrap=True)
    legend = Text()
    end = 0.0
    for index, (name, value) in enumerate(seconds.items()):
        style = PHASE_STYLES[index % len(PHASE_STYLES)]
        # Round the ends of the pieces rather than their lengths, so that the lengths add up to that of the bar.
        end += value
        bar.append("█" * (round(end / total * (width - 2)) - len(bar)), style)
        if value:
            legend.append("■\u00a0", style).append(f"{name}\u00a0{value:.1f}s  ")
    return [bar, legend]


def step_columns(metrics: Mapping[str, Any], total_steps: int, width: int) -> list[tuple[str, str]]:
    """(heading, value) per column of a step's row, padded to the same width.

    Rewards come first, then time, tokens/s, length, KL, training-inference mismatch and gradient norm. Columns that do
    not fit into `width` characters are left out from the right, but never the step and the rewards.
    """
    digits = len(str(total_steps))
    columns = [("step", f"{metrics['step']:>{digits}}/{total_steps}"), ("reward", f"{metrics['reward/mean']:.3f}")]
    columns += [(name[:12], f"{metrics[f'reward/{name}']:.3f}") for name in reward_verifiers([metrics])]
    rate = metrics.get(TOKENS_PER_SECOND)
    optional = [
        ("time", f"{metrics['time/step']:.1f}s"),
        ("tok/s", _number(rate, 0)),
        ("length", f"{metrics['response_length/mean']:.0f}"),
        # A run without a reference has no KL.
        *([("KL", _number(metrics["kl/reference"], 4))] if "kl/reference" in metrics else []),
        ("mismatch", _number(metrics["train_inference_mismatch/mean"], 4)),
        ("grad", _number(metrics["grad_norm"], 2)),
    ]
    minimum = {"time": 6, "tok/s": 5, "KL": 7, "mismatch": 8, "grad": 6}
    padded = []
    used = 0
    for index, (name, value) in enumerate(columns + optional):
        size = max(len(name), len(value), minimum.get(name, 0))
        used += size + (2 if index else 0)
        if index >= len(columns) and used > width:
            break
        padded.append((name.rjust(size), value.rjust(size)))
    return padded


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def result_table(evaluation: Mapping[str, Any]) -> Table:
    """Mean and interval of each model per verifier and decoding, and the paired difference after - before."""
    stages = model_stages(evaluation)
    table = Table(
        box=box.SIMPLE_HEAD, title="Held-out prompts", title_justify="left", title_style="bold", padding=(0, 1, 0, 0)
    )
    table.add_column("verifier", no_wrap=True)
    table.add_column("decoding", no_wrap=True)
    for heading in stages.values():
        table.add_column(heading, justify="right", no_wrap=True)
    if "before" in stages:
        table.add_column("effect", justify="right", no_wrap=True)
    styles = {"better": "bold green", "worse": "bold red", "not significant": "dim"}
    previous = ""
    for verifier, decoding, scores, difference in evaluation_rows(evaluation):
        effects = []
        if difference:
            effect = Text.assemble(f"{difference['mean']:+.2f}\n", (_range(difference, "+.2f"), "dim"))
            verdict = significance(verifier, difference)
            effect.append(f"\n{verdict}", styles[verdict])
            effects.append(effect)
        table.add_row(
            f"{verifier}\n" if verifier != previous else "",
            Text.assemble(f"{decoding}\n", (f"n={scores['after']['n']}", "dim")),
            *(Text.assemble(f"{score['mean']:.2f}\n", (_range(score, ".2f"), "dim")) for score in scores.values()),
            *effects,
            end_section=decoding == "sampled",
        )
        previous = verifier
    return table


def result_note(evaluation: Mapping[str, Any]) -> str:
    """Two lines that explain the table, or one where a single model was evaluated."""
    stages = model_stages(evaluation)
    if "before" not in stages:
        return "Mean score, 95 % interval.\n"
    return (
        f"Mean score, 95 % interval. Effect: {stages['after']} minus {stages['before']}, same prompts;\n"
        "better or worse where its 95 % interval excludes zero.\n"
    )


def _range(score: Mapping[str, Any], form: str) -> str:
    low, high = score["interval"]
    return f"{low:{form}}..{high:{form}}"


def eta(rows: Sequence[Mapping[str, Any]], total_steps: int) -> str:
    """The time that the remaining steps take at the median pace of the last ten."""
    pace = statistics.median(row["time/step"] for row in rows[-10:])
    return duration(pace * (total_steps - rows[-1]["step"]))


def duration(seconds: float) -> str:
    """Seconds in words: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a curve of at most `width` block characters.

    The minimum has the lowest block and the maximum the full one. With more values than characters, a character shows
    the mean of several values.
    """
    count = min(len(values), max(1, width))
    bounds = [len(values) * i // count for i in range(count + 1)]
    means = [statistics.fmean(values[start:end]) for start, end in pairwise(bounds)]
    low = min(means)
    span = max(means) - low
    line = ""
    for mean in means:
        height = round((mean - low) / span * (len(SPARKS) - 1)) if span else 0
        line += SPARKS[height]
    return line
