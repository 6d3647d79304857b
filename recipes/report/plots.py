"""Plots as SVG, without scripts: lines and stacked bars over steps, histograms, and intervals of scores.

An SVG unit is shown at about one CSS pixel, so that text keeps its size on a phone.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from recipes.report.markup import span, text

WIDTH = 380
HEIGHT = 220
# Margins around the plot area. A number of eight characters fits on the left.
LEFT = 62
RIGHT = 10
TOP = 10
BOTTOM = 26
# The colours --c0 to --c5 of style.css.
COLOURS = 6
# Up to this many steps, every value has a dot that shows the number on hover, and bars have gaps between them.
MARKED_STEPS = 120
INTERVAL_LEFT = 66
INTERVAL_ROW = 44

type Row = Mapping[str, Any]


def svg(parts: Sequence[str], height: float) -> str:
    """An SVG image of the elements, in their order."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def legend(names: Sequence[str]) -> str:
    """A legend: each name with the colour of its position."""
    items = []
    for index, name in enumerate(names):
        items.append(f'<span><i style="background:var(--c{index % COLOURS})"></i>{text(name)}</span>')
    return f'<div class="legend">{"".join(items)}</div>'


def round_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers that enclose [low, high]."""
    width = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(width / 4))
    round_steps = [size * factor for factor in (1, 2, 2.5, 5, 10)]
    step = next(step for step in round_steps if width / step <= 4)
    start = math.floor(low / step + 1e-9)
    end = max(math.ceil(high / step - 1e-9), start + 1)
    return [round(index * step, 12) for index in range(start, end + 1)]


def y_of(value: float, ticks: Sequence[float]) -> float:
    """The vertical position of a value between the first and the last tick."""
    share_from_top = (ticks[-1] - value) / (ticks[-1] - ticks[0])
    return TOP + share_from_top * (HEIGHT - TOP - BOTTOM)


def steps_axis(rows: Sequence[Row]) -> Callable[[int], float]:
    """A function from a step to its horizontal position, the middle of its share of the width."""
    first = rows[0]["step"]
    last = rows[-1]["step"]
    share = (WIDTH - LEFT - RIGHT) / (last - first + 1)
    return lambda step: LEFT + (step - first + 0.5) * share


def grid_lines(ticks: Sequence[float]) -> list[str]:
    """A horizontal line with its number for each tick."""
    parts = []
    for tick in ticks:
        y = y_of(tick, ticks)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    return parts


def step_axes(rows: Sequence[Row], x_of: Callable[[int], float], ticks: Sequence[float]) -> list[str]:
    """The grid, and the numbers of the first, middle and last step below it."""
    parts = grid_lines(ticks)
    first = rows[0]["step"]
    last = rows[-1]["step"]
    for step in sorted({first, (first + last) // 2, last}):
        parts.append(f'<text x="{x_of(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step}</text>')
    return parts


def line_plot(
    rows: Sequence[Row],
    series: Mapping[str, str],
    zero: bool = False,
    bands: Mapping[int, Mapping[str, Any]] | None = None,
    faults: Mapping[int, str] | None = None,
) -> str:
    """Lines of metrics over steps. Empty if no row has a value.

    Args:
        series: name in the legend -> metric. Steps without a value (absent or null) are gaps.
        zero: whether the vertical axis starts at zero.
        bands: step -> name in the legend -> a score whose interval is shaded.
        faults: step -> a description, shown as a vertical line after the step.
    """
    values = [row[key] for row in rows for key in series.values() if row.get(key) is not None]
    if not values:
        return ""
    first = rows[0]["step"]
    last = rows[-1]["step"]
    bands = {step: scores for step, scores in (bands or {}).items() if first <= step <= last}
    for scores in bands.values():
        for name, score in scores.items():
            if name in series:
                values += score["interval"]
    lowest = min(*values, 0.0) if zero else min(values)
    ticks = round_ticks(lowest, max(values))
    x_of = steps_axis(rows)
    parts = step_axes(rows, x_of, ticks)
    for step, description in sorted((faults or {}).items()):
        if first <= step <= last:
            x = x_of(step) + (x_of(1) - x_of(0)) / 2
            parts.append(
                f'<line class="fault" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>after step {step}: {text(description)}</title></line>"
            )
    for index, (name, key) in enumerate(series.items()):
        colour = f"var(--c{index % COLOURS})"
        intervals = []
        for step, scores in sorted(bands.items()):
            if name in scores:
                intervals.append((x_of(step), scores[name]["interval"]))
        if len(intervals) > 1:
            parts.append(band(intervals, ticks, colour))
        parts += curve(rows, name, key, x_of, ticks, colour)
    return svg(parts, HEIGHT) + (legend(list(series)) if len(series) > 1 else "")


def band(intervals: Sequence[tuple[float, Sequence[float]]], ticks: Sequence[float], colour: str) -> str:
    """A shaded area between the ends of intervals, which are (horizontal position, [low, high])."""
    outline = [(x, y_of(high, ticks)) for x, (_, high) in intervals]
    outline += [(x, y_of(low, ticks)) for x, (low, _) in reversed(intervals)]
    points = "L".join(f"{x:.1f} {y:.1f}" for x, y in outline)
    return f'<path class="band" d="M{points}z" fill="{colour}"/>'


def curve(
    rows: Sequence[Row], name: str, key: str, x_of: Callable[[int], float], ticks: Sequence[float], colour: str
) -> list[str]:
    """A line through a metric's values, with a dot for each value if there are few."""
    commands = []
    dots = []
    # "M" starts a new piece of the line, "L" continues it.
    command = "M"
    for row in rows:
        if row.get(key) is None:
            command = "M"
            continue
        x = x_of(row["step"])
        y = y_of(row[key], ticks)
        commands.append(f"{command}{x:.1f} {y:.1f}")
        command = "L"
        title = f"<title>step {row['step']}, {text(name)}: {row[key]:.5g}</title>"
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}">{title}</circle>')
    path = f'<path d="{"".join(commands)}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'
    return [path, *dots] if len(rows) <= MARKED_STEPS else [path]


def stacked_bars(rows: Sequence[Row], series: Mapping[str, str], unit: str) -> str:
    """A bar per step that is divided among metrics.

    Args:
        series: name in the legend -> metric.
        unit: the format of a mean over steps, such as "{:.2f} s per step".
    """
    totals = []
    for row in rows:
        totals.append(sum(row.get(key, 0.0) for key in series.values()))
    ticks = round_ticks(0.0, max(totals))
    x_of = steps_axis(rows)
    width_with_gap = (WIDTH - LEFT - RIGHT) / len(rows)
    width = width_with_gap * (0.8 if len(rows) <= MARKED_STEPS else 1.0)
    parts = step_axes(rows, x_of, ticks)
    below = [0.0] * len(rows)
    for index, (name, key) in enumerate(series.items()):
        bars = []
        for place, row in enumerate(rows):
            value = row.get(key, 0.0)
            if value:
                left = x_of(row["step"]) - width / 2
                bars.append(bar(left, width, below[place], below[place] + value, ticks))
            below[place] += value
        mean = sum(row.get(key, 0.0) for row in rows) / len(rows)
        title = f"<title>{text(name)}: {unit.format(mean)}</title>"
        parts.append(f'<path d="{"".join(bars)}" fill="var(--c{index % COLOURS})">{title}</path>')
    return svg(parts, HEIGHT) + legend(list(series))


def bar(left: float, width: float, low: float, high: float, ticks: Sequence[float]) -> str:
    """The path of a bar from the value ``low`` to the value ``high``."""
    top = y_of(high, ticks)
    bottom = y_of(low, ticks)
    return f"M{left:.1f} {top:.1f}h{width:.2f}V{bottom:.1f}h{-width:.2f}z"


def histogram(edges: Sequence[int], shares: Mapping[str, Sequence[float]]) -> str:
    """Two histograms side by side: name -> the share of values in each bin."""
    ticks = round_ticks(0.0, max(share for of_bins in shares.values() for share in of_bins))
    width = (WIDTH - LEFT - RIGHT) / (len(edges) - 1)
    parts = grid_lines(ticks)
    for place in range(0, len(edges), 4):
        x = LEFT + width * place
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{edges[place]}</text>')
    for index, (name, of_bins) in enumerate(shares.items()):
        bars = []
        for place, share in enumerate(of_bins):
            if share:
                left = LEFT + width * (place + 0.08 + 0.42 * index)
                bars.append(bar(left, width * 0.42, 0.0, share, ticks))
        parts.append(f'<path d="{"".join(bars)}" fill="var(--c{index})"><title>{name}</title></path>')
    return svg(parts, HEIGHT) + legend(list(shares))


def interval_plot(models: Sequence[tuple[str, str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """Scores with their intervals on an axis from 0 to 1, greedy (filled) above sampled (open) for each model.

    ``models``: (heading, colour in style.css, decoding -> score).
    """
    height = INTERVAL_ROW * len(models) + BOTTOM
    scale = WIDTH - INTERVAL_LEFT - 18
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = INTERVAL_LEFT + tick * scale
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 9}" text-anchor="middle">{tick:g}</text>')
    for index, (heading, model, scores) in enumerate(models):
        middle = 4 + INTERVAL_ROW * (index + 0.5)
        parts.append(f'<text class="strong" x="0" y="{middle + 4:.1f}">{heading}</text>')
        for decoding, score in scores.items():
            is_greedy = decoding == "greedy"
            y = middle + (-8 if is_greedy else 8)
            fill = f"var(--{model})" if is_greedy else "var(--card)"
            low, high = score["interval"]
            title = f"{heading}, {decoding}: {score['mean']:.3f} ({span(score, '.3f')}, n = {score['n']})"
            parts.append(
                f'<g stroke="var(--{model})" stroke-width="2"><title>{title}</title>'
                f'<line x1="{INTERVAL_LEFT + low * scale:.1f}" x2="{INTERVAL_LEFT + high * scale:.1f}" '
                f'y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<circle cx="{INTERVAL_LEFT + score["mean"] * scale:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}"/></g>'
            )
    return svg(parts, height)
