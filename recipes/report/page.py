"""report.html of a run, one file without scripts or outside resources: `python -m recipes.report run=runs/demo`.

Needs config.yaml and metrics.jsonl; evaluation.json, samples.jsonl, events.jsonl and environment.json are shown
where the run has got as far as writing them, and named as missing where not.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from recipes.report import samples
from recipes.report.samples import Samples
from recipes.run.display import duration
from recipes.run.records import (
    choose_transcripts,
    evaluation_rows,
    model_stages,
    read_events,
    read_rows,
    reward_verifiers,
    significance,
    time_phases,
)

WIDTH, HEIGHT = 380, 220  # of a plot, in SVG units that come out near one CSS pixel, so text keeps its size on a phone
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 10, 26  # a figure of eight characters fits on the left
COLOURS = 6  # --c0 ... --c5 below
TRANSCRIPTS_OPEN = 6  # shown at once; the rest are folded away
LAUNCHES = ("start", "resume")
ORDINARY = ("start", "checkpoint", "finish")  # events that are no fault
MARKED_POINTS = 120  # up to this many steps every value is a dot with its figure on hover

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f7f9;--ink:#1d2330;--soft:#5d6675;--line:#d9dde4;
--c0:#2f6fde;--c1:#d97a1d;--c2:#1f9a6a;--c3:#9256d6;--c4:#d1455b;--c5:#2797ad;
--base:#8a93a3;--before:#d97a1d;--after:#2f6fde;--good:#157a50;--bad:#c02f47}
@media(prefers-color-scheme:dark){:root{--bg:#14171d;--card:#1d222b;--ink:#e6e9ef;--soft:#9aa4b4;--line:#343b48;
--c0:#6ea2ff;--c1:#f0a052;--c2:#4cc996;--c3:#b98cf0;--c4:#f07a8c;--c5:#5cc4d8;
--base:#98a2b3;--before:#f0a052;--after:#6ea2ff;--good:#4cc996;--bad:#f07a8c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:20px 16px 48px;background:var(--bg);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.6rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0 .7rem}h3{font-size:.95rem;margin:0 0 .3rem}
h1,h3,.legend,.head{overflow-wrap:anywhere}p{margin:.3rem 0 .8rem}.soft{color:var(--soft)}small{font-size:.85rem}
.grid{display:grid;gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr))}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 12px 10px;min-width:0}
.scroll{overflow-x:auto;margin-top:14px}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:5px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600}
td small{display:block;color:var(--soft)}.better{color:var(--good);font-weight:600}
.worse{color:var(--bad);font-weight:600}
@media(max-width:560px){th,td{padding:5px 4px;white-space:normal}td small{font-size:.75rem}}
.legend{display:flex;flex-wrap:wrap;gap:2px 12px;font-size:.82rem;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
svg{display:block;width:100%;height:auto;max-width:560px}svg text{fill:var(--soft);font-size:11px}
svg .axis{stroke:var(--line)}.band{opacity:.18}svg .fault{stroke:var(--bad);stroke-dasharray:4 3}
svg .launch{stroke:var(--after);stroke-width:9;opacity:.45}
.thought{color:var(--soft);border-left:3px solid var(--line);padding-left:8px;margin-bottom:6px;font-size:.85rem}
.words.words{text-align:left;white-space:normal;overflow-wrap:anywhere}
svg .strong{fill:var(--ink)}
.talk{margin-bottom:14px}.answers{display:grid;gap:10px;grid-template-columns:repeat(auto-fit,minmax(min(100%,260px),1fr))}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:20rem;overflow-y:auto;background:var(--bg);
border:1px solid var(--line);border-radius:8px;padding:8px 10px;font-size:.9rem}
.chip{display:inline-block;border:1px solid currentColor;border-radius:99px;padding:0 9px;font-size:.8rem;
color:var(--soft);overflow-wrap:anywhere}.chip.changed{color:var(--after);font-weight:600}
.head{display:flex;flex-wrap:wrap;gap:4px 8px;align-items:center;margin:.5rem 0 .3rem}
details{margin:.6rem 0}summary{cursor:pointer;font-weight:600}
pre{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;font-size:.85rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 14px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
"""


def write_report(run_dir: Path) -> Path:
    """Build `run_dir`/report.html from the run's records and return its path.

    Raises:
        FileNotFoundError: config.yaml or metrics.jsonl is missing.
        ValueError: metrics.jsonl has no rows, or a record is not valid JSON.
    """
    configuration = (run_dir / "config.yaml").read_text()
    rows = list(read_rows(run_dir / "metrics.jsonl"))
    if not rows:
        raise ValueError(f"{run_dir / 'metrics.jsonl'} is empty: the report needs at least one finished step")
    evaluation = _optional_json(run_dir / "evaluation.json")
    machine = _optional_json(run_dir / "environment.json")
    gathered = samples.gather(run_dir / "samples.jsonl") if (run_dir / "samples.jsonl").exists() else None
    events = read_events(run_dir / "events.jsonl")
    marks = ((yaml.safe_load(configuration) or {}).get("rollout") or {}).get("thinking_marks", ["<think>", "</think>"])
    name = run_dir.resolve().name
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(name)}: report</title><style>{STYLE}</style></head><body>",
        _header(name, rows),
        _result(evaluation) if evaluation else _missing("evaluation.json", "Result"),
        _training(rows, gathered or Samples(), events),
        _timeline(events) if events else _missing("events.jsonl", "Faults and restarts"),
        _transcripts(evaluation, marks) if evaluation else "",
        _samples(gathered, marks) if gathered else _missing("samples.jsonl", "What RL learned from"),
        "<h2>Configuration</h2><details><summary>config.yaml, resolved</summary>"
        f"<pre>{text(configuration)}</pre></details>",
        _machine(machine) if machine else _missing("environment.json", "Machine and versions"),
        "</body></html>",
    ]
    path = run_dir / "report.html"
    path.write_text("\n".join(part for part in parts if part), encoding="utf-8")
    return path


def _header(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    total = sum(row["time/step"] for row in rows)
    pace = f"{len(rows)} steps in {duration(total)}, {duration(total / len(rows))} per step"
    return f'<h1>{text(name)}</h1><p class="soft">{pace}</p>'


def _missing(file: str, heading: str) -> str:
    return f'<h2>{heading}</h2><p class="soft">This run has no {file} yet.</p>'


def _result(evaluation: Mapping[str, Any]) -> str:
    stages = model_stages(evaluation)
    table = list(evaluation_rows(evaluation))
    panels = []
    for verifier in dict.fromkeys(row[0] for row in table):
        scores = {decoding: of for name, decoding, of, _ in table if name == verifier}
        plot = _interval_plot(
            [(heading, stage, {d: of[stage] for d, of in scores.items()}) for stage, heading in stages.items()]
        )
        panels.append(f'<div class="card"><h3>{text(verifier)}</h3>{plot}</div>')
    body = []
    for verifier, decoding, scores, difference in table:
        verdict = significance(difference)
        cells = [f"<td>{score['mean']:.2f}<small>{span(score, '.2f')}</small></td>" for score in scores.values()]
        name = f"{text(verifier)}<small>{decoding}, n = {scores['after']['n']}</small>"
        effect = f"{difference['mean']:+.2f}<small>{span(difference, '+.2f')}</small>"
        effect += f'<span class="{verdict.split()[0]}">{verdict}</span>'
        body.append(f"<tr><td>{name}</td>{''.join(cells)}<td>{effect}</td></tr>")
    heads = "".join(f"<th>{heading}</th>" for heading in stages.values())
    return (
        "<h2>Result on held-out prompts</h2>"
        "<p>Mean score per verifier with its 95&nbsp;% interval: filled dot greedy decoding, open dot sampled at "
        "temperature&nbsp;1.</p>"
        f'<div class="grid">{"".join(panels)}</div>'
        '<div class="scroll"><table><thead><tr><th>verifier</th>'
        f"{heads}<th>effect</th></tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        f'<p class="soft"><small>The effect is {stages["after"]} minus {stages["before"]} on the same prompts; '
        "&ldquo;better&rdquo; or &ldquo;worse&rdquo; where its 95&nbsp;% interval leaves out zero. n counts prompts; "
        "several samples of one prompt are averaged first.</small></p>"
    )


def _interval_plot(entries: Sequence[tuple[str, str, Mapping[str, Mapping[str, Any]]]]) -> str:
    """One line per model on a 0 to 1 axis: greedy (filled) above sampled (open), each with its interval."""
    left, row = 66, 44
    height = row * len(entries) + BOTTOM
    scale = WIDTH - left - 18
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * scale
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 9}" text-anchor="middle">{tick:g}</text>')
    for index, (heading, stage, scores) in enumerate(entries):
        middle = 4 + row * (index + 0.5)
        parts.append(f'<text class="strong" x="0" y="{middle + 4:.1f}">{heading}</text>')
        for name, score in scores.items():
            offset, fill = (-8, f"var(--{stage})") if name == "greedy" else (8, "var(--card)")
            low, high = score["interval"]
            y, x = middle + offset, left + score["mean"] * scale
            parts.append(
                f'<g stroke="var(--{stage})" stroke-width="2"><title>{heading}, {name}: {score["mean"]:.3f} '
                f"({span(score, '.3f')}, n = {score['n']})</title>"
                f'<line x1="{left + low * scale:.1f}" x2="{left + high * scale:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}"/></g>'
            )
    return svg(parts, height)


def _training(rows: Sequence[Mapping[str, Any]], samples: Samples, events: Sequence[Mapping[str, Any]]) -> str:
    verifiers, phases = reward_verifiers(rows), time_phases(rows)
    megabytes = [{**row, "sync/megabytes": row["sync/bytes"] / 1e6} for row in rows if "sync/bytes" in row]
    plots = [
        (
            "Reward per verifier, with 95&nbsp;% interval over prompts",
            _lines(rows, {name: f"reward/{name}" for name in verifiers}, bands=samples.scores, events=events),
        ),
        ("Loss", _lines(rows, {"loss": "loss"})),
        ("Mean reward", _lines(rows, {"mean": "reward/mean"})),
        ("KL to the reference policy", _lines(rows, {"KL": "kl/reference"}, zero=True)),
        ("Log-prob gap to vLLM, mean", _lines(rows, {"mean": "train_inference_mismatch/mean"}, zero=True)),
        ("Log-prob gap to vLLM, largest", _lines(rows, {"max": "train_inference_mismatch/max"}, zero=True)),
        ("Gradient norm", _lines(rows, {"norm": "grad_norm"}, zero=True)),
        ("Response length, tokens", _lines(rows, {"mean": "response_length/mean"}, zero=True)),
        ("Time per phase, seconds", _stacked(rows, {name: f"time/{name}" for name in phases})),
        ("Weight sync, megabytes", _lines(megabytes, {"sent": "sync/megabytes"}, zero=True)),
    ]
    plots += [
        (f"Labels of {text(name)}, share of samples", _labels(rows, of_steps))
        for name, of_steps in samples.labels.items()
    ]
    plots.append(("Response length, early and late", _lengths(samples.tokens)))
    if "sync" in phases:
        plots.append(("Weight sync, seconds", _lines(rows, {"time": "time/sync"}, zero=True)))
    cards = "".join(f'<div class="card"><h3>{title}</h3>{plot}</div>' for title, plot in plots if plot)
    return f'<h2>Training, per step</h2><div class="grid">{cards}</div>'


def _lines(
    rows: Sequence[Mapping[str, Any]],
    series: Mapping[str, str],
    zero: bool = False,
    bands: Mapping[int, Mapping[str, Any]] | None = None,
    events: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Line plot of metrics over steps.

    Args:
        series: legend -> metric key; steps without a value (absent or null) are gaps.
        zero: whether the vertical axis starts at zero.
        bands: step -> legend -> an interval, drawn behind the line.
        events: faults among them are upright lines behind the step that they follow.
    """
    values = [row[key] for row in rows for key in series.values() if row.get(key) is not None]
    if not values:
        return ""
    bands = {step: of for step, of in (bands or {}).items() if rows[0]["step"] <= step <= rows[-1]["step"]}
    values += [
        bound for of in bands.values() for name, score in of.items() if name in series for bound in score["interval"]
    ]
    low, high = min(values), max(values)
    ticks = round_ticks(min(low, 0.0) if zero else low, high)
    low, high = ticks[0], ticks[-1]
    x_of = _steps_axis(rows)
    parts = _axes(rows, x_of, ticks)
    for step in sorted({event["after_step"] for event in events if event["kind"] not in ORDINARY}):
        if rows[0]["step"] <= step <= rows[-1]["step"]:
            x = x_of(step) + (x_of(1) - x_of(0)) / 2
            what = ", ".join(event["kind"] for event in events if event["after_step"] == step)
            parts.append(
                f'<line class="fault" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>after step {step}: {text(what)}</title></line>"
            )
    for index, (name, key) in enumerate(series.items()):
        colour = f"var(--c{index % COLOURS})"
        edges = [(x_of(step), *of[name]["interval"]) for step, of in sorted(bands.items()) if name in of]
        if len(edges) > 1:
            outline = [(x, _y(top, low, high)) for x, _, top in edges]
            outline += [(x, _y(bottom, low, high)) for x, bottom, _ in reversed(edges)]
            points = "L".join(f"{x:.1f} {y:.1f}" for x, y in outline)
            parts.append(f'<path class="band" d="M{points}z" fill="{colour}"/>')
        commands, dots, pen = [], [], "M"
        for row in rows:
            if row.get(key) is None:
                pen = "M"
                continue
            x, y = x_of(row["step"]), _y(row[key], low, high)
            commands.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
            label = f"<title>step {row['step']}, {text(name)}: {row[key]:.5g}</title>"
            dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2" fill="{colour}">{label}</circle>')
        parts.append(
            f'<path d="{"".join(commands)}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-linejoin="round"/>'
        )
        if len(rows) <= MARKED_POINTS:
            parts += dots
    return svg(parts, HEIGHT) + (_legend(list(series)) if len(series) > 1 else "")


def _stacked(rows: Sequence[Mapping[str, Any]], series: Mapping[str, str], unit: str = "{:.2f} s per step") -> str:
    """One bar per step, split by series; legend -> metric key. ``unit``: how a mean over steps is written."""
    ticks = round_ticks(0.0, max(sum(row.get(key, 0.0) for key in series.values()) for row in rows))
    high = ticks[-1]
    x_of = _steps_axis(rows)
    width = (WIDTH - LEFT - RIGHT) / len(rows) * (0.8 if len(rows) <= MARKED_POINTS else 1.0)
    parts = _axes(rows, x_of, ticks)
    below = [0.0] * len(rows)
    for index, (name, key) in enumerate(series.items()):
        bars = []
        for place, row in enumerate(rows):
            value = row.get(key, 0.0)
            if value:
                top = _y(below[place] + value, 0.0, high)
                bars.append(
                    f"M{x_of(row['step']) - width / 2:.1f} {top:.1f}h{width:.2f}"
                    f"V{_y(below[place], 0.0, high):.1f}h{-width:.2f}z"
                )
            below[place] += value
        mean = sum(row.get(key, 0.0) for row in rows) / len(rows)
        label = f"<title>{text(name)}: {unit.format(mean)}</title>"
        parts.append(f'<path d="{"".join(bars)}" fill="var(--c{index % COLOURS})">{label}</path>')
    return svg(parts, HEIGHT) + _legend(list(series))


def _labels(rows: Sequence[Mapping[str, Any]], of_steps: Mapping[int, Mapping[str, int]]) -> str:
    """One bar per step, split by the labels that a verifier gave."""
    steps = [row["step"] for row in rows if row["step"] in of_steps]
    names = sorted({label for step in steps for label in of_steps[step]})
    shares = [
        {"step": step, **{f"label/{name}": n / sum(of_steps[step].values()) for name, n in of_steps[step].items()}}
        for step in steps
    ]
    return _stacked(shares, {name: f"label/{name}" for name in names}, "{:.0%} of all samples") if shares else ""


def _lengths(tokens: Mapping[int, Sequence[int]]) -> str:
    """Histograms of the first and of the last third of the steps, in tokens."""
    steps = sorted(tokens)
    third = max(1, len(steps) // 3)
    if len(steps) < 2:
        return ""
    early, late = ([n for step in part for n in tokens[step]] for part in (steps[:third], steps[-third:]))
    groups = {f"steps {steps[0]} to {steps[third - 1]}": early, f"steps {steps[-third]} to {steps[-1]}": late}
    edges, shares = samples.bins(groups)
    ticks = round_ticks(0.0, max(share for of in shares.values() for share in of))
    width = (WIDTH - LEFT - RIGHT) / (len(edges) - 1)
    parts = _grid(ticks)
    for place in range(0, len(edges), 4):
        x = LEFT + width * place
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{edges[place]}</text>')
    for index, (name, of) in enumerate(shares.items()):
        bars = "".join(
            f"M{LEFT + width * (i + 0.08 + 0.42 * index):.1f} {_y(share, 0.0, ticks[-1]):.1f}h{width * 0.42:.2f}"
            f"V{_y(0.0, 0.0, ticks[-1]):.1f}h{-width * 0.42:.2f}z"
            for i, share in enumerate(of)
            if share
        )
        parts.append(f'<path d="{bars}" fill="var(--c{index})"><title>{name}</title></path>')
    return svg(parts, HEIGHT) + _legend(list(groups))


def _timeline(events: Sequence[Mapping[str, Any]]) -> str:
    """Launches as bars over wall-clock time, everything else as marks on it, and all of it as a table."""
    first, last = events[0]["time"], max(event["time"] for event in events)
    seconds = max(last - first, 1e-3)
    scale, height, middle = (WIDTH - LEFT - RIGHT) / seconds, 74, 30

    def x_of(event: Mapping[str, Any]) -> float:
        return LEFT + (event["time"] - first) * scale

    parts, begun = [], events[0]
    for event, before in zip([*events, None], [None, *events], strict=True):
        if before is not None and (event is None or event["kind"] in LAUNCHES):
            parts.append(
                f'<line class="launch" x1="{x_of(begun):.1f}" x2="{x_of(before):.1f}" y1="{middle}" y2="{middle}"/>'
            )
        if event is not None and event["kind"] in LAUNCHES:
            begun = event
    for event in events:
        colour = "var(--soft)" if event["kind"] in ORDINARY else "var(--bad)"
        radius = 3 if event["kind"] in ORDINARY else 6
        what = f"{event['kind']}, {duration(event['time'] - first)}, after step {event['after_step']}"
        parts.append(
            f'<circle cx="{x_of(event):.1f}" cy="{middle}" r="{radius}" fill="{colour}"><title>{text(what)}</title>'
            "</circle>"
        )
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        x = LEFT + share * (WIDTH - LEFT - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="{anchor}">{duration(share * seconds)}</text>')
    shown = [event for event in events if event["kind"] != "checkpoint"]
    body = "".join(
        f"<tr><td>{duration(event['time'] - first)}</td><td>{event['after_step']}</td><td>{text(event['kind'])}</td>"
        f'<td class="words">{text(_details(event))}</td></tr>'
        for event in shown
    )
    faults = sum(event["kind"] not in ORDINARY for event in events)
    return (
        f"<h2>Faults and restarts</h2><p>{faults} among {len(events)} events; red marks here, dashed lines in the "
        "reward&rsquo;s plot. Bars are launches.</p>"
        f'<div class="grid"><div class="card">{svg(parts, height)}</div></div>'
        '<div class="scroll"><table><thead><tr><th>time</th><th>after step</th><th>event</th>'
        f'<th class="words">details</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _details(event: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "kind", "after_step"))


def _steps_axis(rows: Sequence[Mapping[str, Any]]) -> Callable[[int], float]:
    """A function from a step to its horizontal place: one equal share of the plot per step, drawn in its middle."""
    first, last = rows[0]["step"], rows[-1]["step"]
    share = (WIDTH - LEFT - RIGHT) / (last - first + 1)
    return lambda step: LEFT + (step - first + 0.5) * share


def _axes(rows: Sequence[Mapping[str, Any]], x_of: Callable[[int], float], ticks: Sequence[float]) -> list[str]:
    parts = _grid(ticks)
    first, last = rows[0]["step"], rows[-1]["step"]
    for step in sorted({first, (first + last) // 2, last}):
        parts.append(f'<text x="{x_of(step):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{step}</text>')
    return parts


def _grid(ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in ticks:
        y = _y(tick, ticks[0], ticks[-1])
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.6g}</text>')
    return parts


def round_ticks(low: float, high: float) -> list[float]:
    """Two to six round numbers that enclose [low, high]."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / 4))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= 4)
    start = math.floor(low / step + 1e-9)
    end = max(math.ceil(high / step - 1e-9), start + 1)
    return [round(index * step, 12) for index in range(start, end + 1)]


def _y(value: float, low: float, high: float) -> float:
    return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)


def svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<span><i style="background:var(--c{index % COLOURS})"></i>{text(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def _transcripts(evaluation: Mapping[str, Any], marks: Sequence[str]) -> str:
    everything = evaluation["transcripts"]
    stages = model_stages(evaluation)
    cards = [_transcript(item, stages, marks) for item in choose_transcripts(everything, len(everything))]
    folded = cards[TRANSCRIPTS_OPEN:]
    more = f"<details><summary>{len(folded)} more</summary>{''.join(folded)}</details>" if folded else ""
    return (
        "<h2>Transcripts</h2><p>Greedy answers to held-out prompts, each with its verdict; a coloured verdict is one "
        f"training changed.</p>{''.join(cards[:TRANSCRIPTS_OPEN])}{more}"
    )


def _transcript(item: Mapping[str, Any], stages: Mapping[str, str], marks: Sequence[str]) -> str:
    labels = item["labels"]
    answers = []
    for stage, heading in stages.items():
        changed = " changed" if stage == "after" and labels["after"] != labels["before"] else ""
        answers.append(
            f'<div><div class="head"><b>{heading}</b><span class="chip{changed}">{text(labels[stage])}</span></div>'
            f"{_response(item[stage], marks)}</div>"
        )
    return (
        f'<div class="card talk"><div class="head"><b>Prompt</b><span class="soft">{text(item["kind"])}</span></div>'
        f'<div class="text">{text(item["prompt"])}</div><div class="answers">{"".join(answers)}</div></div>'
    )


def _response(response: str, marks: Sequence[str]) -> str:
    """The answer, with its thinking above it where there is any."""
    thinking, answer = samples.split_thinking(response, marks)
    thought = f'<div class="thought"><b>thinking</b> {text(thinking)}</div>' if thinking else ""
    return f'<div class="text">{thought}{text(answer)}</div>'


def _samples(samples: Samples, marks: Sequence[str]) -> str:
    """The same prompts over training, then a group of the first and the last step: what the algorithm compares."""
    blocks = [
        f"<h2>The same prompts over training</h2><p>{'' if samples.followed else 'No prompt came a second time. '}"
        "The best sample of each time that a prompt came, from early to late.</p>"
    ]
    for answers in samples.followed:
        cards = "".join(_sample(row, f"step {row['step']}", marks) for row in answers)
        blocks.append(_talk(answers[0]["prompt"], cards))
    blocks.append(
        "<h2>What RL learned from</h2><p>All samples of one prompt, with reward and advantage: the prompt of that step "
        "whose rewards differ most.</p>"
    )
    for group in samples.groups:
        cards = "".join(_sample(row, "", marks) for row in group)
        blocks.append(
            f"<details><summary>Step {group[0]['step']}</summary>{_talk(group[0]['prompt'], cards)}</details>"
        )
    return "".join(blocks)


def _talk(prompt: str, cards: str) -> str:
    return (
        f'<div class="card talk"><div class="head"><b>Prompt</b></div><div class="text">{text(prompt)}</div>'
        f'<div class="answers">{cards}</div></div>'
    )


def _sample(row: Mapping[str, Any], when: str, marks: Sequence[str]) -> str:
    verdicts = "".join(
        f'<span class="chip">{text(name)}: {text(verdict.get("label", "no verdict"))}</span>'
        for name, verdict in row["verdicts"].items()
    )
    reward = "no reward" if row["reward"] is None else f"reward {row['reward']:.2f}"
    return (
        f'<div><div class="head"><b>{f"{when}: " if when else ""}{reward}</b><span class="soft">advantage '
        f"{row['advantage']:+.2f}</span>{verdicts}</div>{_response(row['response'], marks)}</div>"
    )


def _machine(machine: Mapping[str, Mapping[str, Any]]) -> str:
    cards = []
    for title, facts in machine.items():
        items = "".join(f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
        cards.append(f'<div class="card"><h3>{text(title)}</h3><dl>{items}</dl></div>')
    return f'<h2>Machine and versions</h2><div class="grid">{"".join(cards)}</div>'


def span(score: Mapping[str, Any], form: str) -> str:
    low, high = score["interval"]
    return f"{low:{form}} to {high:{form}}"


def text(value: Any) -> str:
    """Escaped for HTML, with the characters HTML does not allow or that turn the reading direction made visible."""
    return escape(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", str(value)))


def _optional_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
