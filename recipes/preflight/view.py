"""The preflight in a terminal: a progress line, then each rank's memory by phase, and the checks."""

import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from recipes.preflight.report import Report

# Cells of a bar; the last one is the device's last GiB.
WIDTH = 40
# Field of memory.Memory → its letter and colour. A phase shows the critic either trained or idle.
PARTS = {
    "weights": ("W", "blue"), "gradients": ("G", "cyan"), "optimizer": ("O", "magenta"),
    "critic": ("C", "red"), "critic_idle": ("C", "red"),
    "activations": ("A", "green"), "logits": ("L", "yellow"), "workspace": ("w", "white"),
    "vllm": ("V", "yellow"), "kv_cache": ("K", "green"),
    "judges": ("J", "bright_magenta"), "judges_asleep": ("j", "bright_magenta"), "reserve": ("r", "bright_black"),
}  # fmt: skip


def console() -> Console:
    """The terminal, or 120 columns of a file or pipe."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that shows what is done next beside a spinner; it prints nothing if the output is no terminal."""
    with console().status("starting") as status:
        yield status.update


@contextmanager
def quiet() -> Iterator[None]:
    """Hide what libraries write to standard error; it is shown if the block fails."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as notes, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(notes.fileno(), 2)
        try:
            yield
        except Exception:
            sys.stderr.flush()
            notes.seek(0)
            os.write(stderr, notes.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


def show(report: Report) -> None:
    """Print the complete report."""
    out = console()
    total = f", {report.parameters_total:,} parameters" if report.parameters_total else ""
    out.print(Text(f"{report.recipe}: {report.model}{total}", style="bold"))
    if report.memory_gib:
        out.print(memory_table(report))
        out.print(phase_table(report))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("")
    table.add_column("check")
    table.add_column("found, or to change", overflow="fold")
    for check in report.checks:
        mark = Text("ok", style="green") if check.ok else Text("FAIL", style="bold red")
        table.add_row(mark, check.name, check.detail)
    out.print(table)
    failed = sum(not check.ok for check in report.checks)
    verdict = "every check holds" if report.ok else f"{failed} of {len(report.checks)} checks fail"
    out.print(Text(f"{verdict}, in {report.seconds:.0f} s", style="bold green" if report.ok else "bold red"))


def memory_table(report: Report) -> Group:
    """Memory in GiB as bars: one row for tensor-parallel ranks of a stage with equal sizes, else one per rank."""
    counts = {(rank["pp"], rank["tp"]): rank["count"] for rank in report.parameters_per_rank}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for rank in report.memory_gib:
        alike = tuple(value for name, value in rank.items() if name != "tp")
        groups.setdefault((*alike, counts[rank["pp"], rank["tp"]]), []).append(rank)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("stage", "tensor", "parameters"):
        table.add_column(name, justify="right")
    table.add_column(f"GiB of {report.device_memory_gib}, {report.device}")
    for ranks in groups.values():
        first = ranks[0]
        tensor = f"{first['tp']}-{ranks[-1]['tp']}" if len(ranks) > 1 else str(first["tp"])
        bars = Text("\n").join(
            Text(f"{phase:<10} {first[phase]:6.1f} ").append(bar(first, parts, report.device_memory_gib))
            for phase, parts in report.phases.items()
        )
        table.add_row(str(first["pp"]), tensor, f"{counts[first['pp'], first['tp']]:,}", bars)
    entries = []
    for name, (letter, style) in PARTS.items():
        if name != "critic_idle" and any(rank[name] for rank in report.memory_gib):
            entries.append(Text(f"{letter} {name}", style=style))
    legend = Text("  ").join(entries)
    return Group(table, legend)


def phase_table(report: Report) -> Table:
    """One row per phase: what is on the GPU that is fullest in it, and what is offloaded to a node's host."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("phase", "on the fullest GPU, GiB", "asleep on a node's host, GiB"):
        table.add_column(name, overflow="fold")
    for phase, names in report.phases.items():
        rank = max(report.memory_gib, key=lambda rank: rank[phase])
        on_device = sums({name: rank[name] for name in names}, rank[phase])
        on_host = report.host_gib[phase]
        table.add_row(phase, on_device, sums(on_host, sum(on_host.values())))
    return table


def sums(parts: dict[str, float], total: float) -> str:
    """The sizes of the parts and their sum."""
    shown = " + ".join(f"{name} {size:.1f}" for name, size in parts.items() if size)
    return f"{shown} = {total:.1f}" if shown else "nothing"


def bar(rank: dict[str, Any], parts: list[str], room: float) -> Text:
    """Letters in proportion to the device's memory; what does not fit extends beyond its end, in red."""
    text = Text()
    gib = 0.0
    for name in parts:
        letter, style = PARTS[name]
        start = round(gib * WIDTH / room)
        gib += rank[name]
        end = round(gib * WIDTH / room)
        inside = max(0, min(end, WIDTH) - start)
        text.append(letter * inside, style=style)
        text.append(letter * (end - start - inside), style="bold red")
    return text.append("." * max(0, WIDTH - len(text)), style="bright_black")
