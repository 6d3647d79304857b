"""The report's section on faults and restarts, over wall-clock time."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.report import markup
from recipes.report.markup import text
from recipes.report.plots import LEFT, RIGHT, WIDTH, svg
from recipes.run.display import duration

LAUNCHES = ("start", "resume")
ORDINARY = ("start", "checkpoint", "finish")
HEIGHT = 74
MIDDLE = 30

type Event = Mapping[str, Any]


def is_fault(event: Event) -> bool:
    """Whether an event of events.jsonl is a fault or its consequence, such as a resume."""
    return event["kind"] not in ORDINARY


def section(events: Sequence[Event]) -> str:
    """The events on a time axis and in a table.

    ``events`` are those of events.jsonl, at least one, in order of time.
    """
    first = events[0]["time"]
    rows = []
    for event in events:
        if event["kind"] != "checkpoint":
            rows.append(
                f"<tr><td>{duration(event['time'] - first)}</td><td>{event['after_step']}</td>"
                f'<td>{text(event["kind"])}</td><td class="words">{text(_details(event))}</td></tr>'
            )
    header = '<th>time</th><th>after step</th><th>event</th><th class="words">details</th>'
    faults = sum(is_fault(event) for event in events)
    return (
        f"<h2>Faults and restarts</h2><p>{faults} among {len(events)} events; red marks here, dashed lines in the "
        "reward&rsquo;s plot. Bars are launches.</p>"
        f"{markup.grid([f'''<div class="card">{_axis(events)}</div>'''])}"
        f"{markup.table(header, rows)}"
    )


def _axis(events: Sequence[Event]) -> str:
    """Launches as bars over wall-clock time, and a mark for each event."""
    first = events[0]["time"]
    seconds = max(max(event["time"] for event in events) - first, 1e-3)
    scale = (WIDTH - LEFT - RIGHT) / seconds

    def x_of(event: Event) -> float:
        return LEFT + (event["time"] - first) * scale

    parts = []
    for start, end in _launches(events):
        parts.append(f'<line class="launch" x1="{x_of(start):.1f}" x2="{x_of(end):.1f}" y1="{MIDDLE}" y2="{MIDDLE}"/>')
    for event in events:
        colour, radius = ("var(--bad)", 6) if is_fault(event) else ("var(--soft)", 3)
        title = f"{event['kind']}, {duration(event['time'] - first)}, after step {event['after_step']}"
        parts.append(
            f'<circle cx="{x_of(event):.1f}" cy="{MIDDLE}" r="{radius}" fill="{colour}"><title>{text(title)}</title>'
            "</circle>"
        )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{duration(share * seconds)}</text>')
    return svg(parts, HEIGHT)


def _launches(events: Sequence[Event]) -> list[tuple[Event, Event]]:
    """The first and the last event of each launch."""
    launches: list[tuple[Event, Event]] = []
    for event in events:
        if not launches or event["kind"] in LAUNCHES:
            launches.append((event, event))
        else:
            start, _ = launches[-1]
            launches[-1] = (start, event)
    return launches


def _details(event: Event) -> str:
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "kind", "after_step"))
