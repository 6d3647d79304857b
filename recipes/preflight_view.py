"""The preflight as a person reads it: what is being done, then the checks, the ranks and a bar of memory for each."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from recipes.preflight import Report

WIDTH = 40  # cells of a bar; the last one is the device's last GiB
STATES = {"weights": "blue", "gradients": "cyan", "optimizer": "magenta"}
TRAINING = {"critic": "red", "activations": "green", "logits": "yellow", "workspace": "white"}
GENERATING = {"critic_idle": "red", "kv_cache": "green", "vllm": "yellow"}
RESERVE = {"reserve": "bright_black"}
LETTERS = {
    "weights": "W", "gradients": "G", "optimizer": "O", "activations": "A", "logits": "L", "workspace": "w",
    "kv_cache": "K", "vllm": "V", "reserve": "r",
    "critic": "C", "critic_idle": "C",
}  # fmt: skip


def console() -> Console:
    return Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 120)


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done, on a terminal; nothing elsewhere."""
    with console().status("preflight") as status:
        yield lambda text: status.update(f"preflight: {text}")


def show(report: "Report") -> None:
    out = console()
    total = f", {report.parameters_total:,} parameters" if report.parameters_total else ""
    out.print(Text(f"{report.recipe}: {report.model}{total}", style="bold"))
    if report.memory_gib:
        out.print(memory_table(report))
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


def memory_table(report: "Report") -> Group:
    """One row for each stage whose tensor-parallel ranks are alike, one for each rank otherwise; sizes in GiB."""
    counts = {(rank["pp"], rank["tp"]): rank["count"] for rank in report.parameters_per_rank}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for rank in report.memory_gib:
        alike = tuple(value for name, value in rank.items() if name != "tp")
        groups.setdefault((*alike, counts[rank["pp"], rank["tp"]]), []).append(rank)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in ("stage", "tensor", "parameters", "states", "training", "generating"):
        table.add_column(name, justify="right")
    table.add_column(f"of {report.device_memory_gib} GiB, {report.device}: training above, generating below")
    for ranks in groups.values():
        first = ranks[0]
        tensor = f"{first['tp']}-{ranks[-1]['tp']}" if len(ranks) > 1 else str(first["tp"])
        states = sum(first[name] for name in STATES)
        bars = Text("\n").join(
            bar(first, STATES | parts | RESERVE, report.device_memory_gib) for parts in (TRAINING, GENERATING)
        )
        table.add_row(
            str(first["pp"]), tensor, f"{counts[first['pp'], first['tp']]:,}", f"{states:.1f}",
            f"{first['training']:.1f}", f"{first['generating']:.1f}", bars,
        )  # fmt: skip
    names = {**STATES, **TRAINING, **GENERATING, **RESERVE}
    names = {name: style for name, style in names.items() if any(rank[name] for rank in report.memory_gib)}
    names.pop("critic_idle", None)  # the critic's letter is there once
    legend = Text("  ").join(Text(f"{LETTERS[name]} {name}", style=style) for name, style in names.items())
    return Group(table, legend)


def bar(rank: dict[str, Any], parts: dict[str, str], room: float) -> Text:
    """Letters in proportion to the device's memory; what does not fit goes on beyond its end, in red."""
    text, gib = Text(), 0.0
    for name, style in parts.items():
        start, gib = round(gib * WIDTH / room), gib + rank[name]
        end = round(gib * WIDTH / room)
        inside = max(0, min(end, WIDTH) - start)
        text.append(LETTERS[name] * inside, style=style)
        text.append(LETTERS[name] * (end - start - inside), style="bold red")
    return text.append("." * max(0, WIDTH - len(text)), style="bright_black")
