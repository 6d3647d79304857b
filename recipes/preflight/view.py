"""Print the preflight in a terminal: a progress line, then the memory of each rank by phase, and the checks."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from recipes.preflight.report import FAILS, HOLDS, NOT_CHECKED, Proposal, Report, size

STYLES = {HOLDS: "green", FAILS: "bold red", NOT_CHECKED: "yellow"}
# Cells of a bar. The bar stands for the whole memory of the device.
WIDTH = 40
# Field of memory.Memory → letter and colour. A phase shows the critic either trained or idle.
PARTS = {
    "weights": ("W", "blue"), "gradients": ("G", "cyan"), "optimizer": ("O", "magenta"),
    "critic": ("C", "red"), "critic_idle": ("C", "red"),
    "activations": ("A", "green"), "logits": ("L", "yellow"), "workspace": ("w", "white"),
    "buffers": ("B", "bright_cyan"), "micro_batches": ("M", "bright_blue"),
    "vllm": ("V", "yellow"), "kv_cache": ("K", "green"),
    "judges": ("J", "bright_magenta"), "judges_asleep": ("j", "bright_magenta"), "reserve": ("r", "bright_black"),
}  # fmt: skip


def console() -> Console:
    """A console as wide as the terminal, or 120 columns wide if the output is a file or a pipe."""
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that shows what is done next beside a spinner. Without a terminal it prints nothing."""
    with console().status("starting") as status:
        yield status.update


def show(reports: Sequence[Report]) -> None:
    """Print a single report in full. Of the reports of a ladder, leave out the memory and add an overview."""
    out = console()
    for report in reports:
        stage = f", stage {report.stage}" if len(reports) > 1 else ""
        total = f", {report.parameters_total:,} parameters" if report.parameters_total else ""
        out.print(Text(f"{report.recipe}{stage}: {report.model}{total}", style="bold"))
        if len(reports) == 1 and report.memory_gib and "memory" not in report.in_state(NOT_CHECKED):
            out.print(memory_table(report))
            out.print(phase_table(report))
        out.print(check_table(report))
        if report.cost:
            out.print(Text("GPU hours, an estimate:", style="bold"))
        for line in report.cost:
            out.print(Text(f"    {line}"), soft_wrap=True)
        for title, proposals in report.proposals.items():
            show_proposals(out, title, proposals)
        if len(reports) == 1:
            show_submission(out, reports)
        out.print(Text(f"{report.verdict}, in {report.seconds:.0f} s", style=STYLES[worst(report)]))
        out.print()
    if len(reports) > 1:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("stage")
        table.add_column("checks")
        for report in reports:
            table.add_row(report.stage, Text(report.verdict, style=STYLES[worst(report)]))
        out.print(table)
        if all(report.disk_bytes for report in reports):
            on_disk = size(sum(report.disk_bytes for report in reports))
            out.print(Text(f"On disk the stages take at most {on_disk} together, if each keeps its checkpoints"))
        show_submission(out, reports)


def show_submission(out: Console, reports: Sequence[Report]) -> None:
    """Print the command that submits the run, or all stages of a ladder, unless a check fails."""
    command = reports[0].submit
    if command and all(report.ok for report in reports):
        out.print(Text("To submit it:", style="bold"))
        out.print(Text(f"    {command}"), soft_wrap=True)


def worst(report: Report) -> str:
    """The state of the whole report: the worst of its checks' states."""
    return next((state for state in (FAILS, NOT_CHECKED) if report.in_state(state)), HOLDS)


def check_table(report: Report) -> Table:
    """A table with one row for each check. Consecutive checks that wait for the same earlier check share a row."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("what was found, what to change, or how to check it", overflow="fold")
    for (state, detail), checks in groupby(report.checks, key=lambda check: (check.state, check.detail)):
        names = [check.name for check in checks]
        if len(names) > 1:
            detail = f"{', '.join(names)}: {detail}"
        shown = names[0] if len(names) == 1 else f"{len(names)} checks"
        table.add_row(Text(state, style=STYLES[state]), shown, detail)
    return table


def show_proposals(out: Console, title: str, proposals: Sequence[Proposal]) -> None:
    """Print overrides that hold, ready to be copied, and below each of them the layout and memory of the run."""
    end = " (each was checked and holds):" if proposals else ""
    out.print(Text(f"{title}{end}", style="bold"))
    for proposal in proposals:
        out.print(Text(f"    {' '.join(proposal.overrides)}"), soft_wrap=True)
        out.print(Text(f"        {proposal.detail}", style="bright_black"))


def memory_table(report: Report) -> Group:
    """The memory of the ranks in GiB, as bars. Tensor-parallel ranks of a stage with equal sizes share a row."""
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
    """A table with one row for each phase: what the fullest GPU holds, and what is offloaded to a node's host."""
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
    """The sizes of the parts and their sum, as text."""
    shown = " + ".join(f"{name} {size:.1f}" for name, size in parts.items() if size)
    return f"{shown} = {total:.1f}" if shown else "nothing"


def bar(rank: dict[str, Any], parts: list[str], room: float) -> Text:
    """A bar of letters in proportion to the device's memory. What does not fit extends beyond its end, in red."""
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
