"""report.html of a ladder: every measure stage by stage, and the same prompts answered by each stage's model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluation.evaluate import Answers
from recipes.report.page import BOTTOM, HEIGHT, LEFT, RIGHT, STYLE, TOP, WIDTH, round_ticks, span, svg, text

HEADINGS = {
    "safety": "Safety",
    "helpfulness": "Helpfulness on benign prompts",
    "accuracy": "Accuracy",
    "reasoning_length": "Reasoning length, tokens",
    "false_certain": "False and certain",
}
PROMPTS_PER_KIND = 2


def write_pipeline_report(
    folder: Path, ladder: Mapping[str, Any], answers: Mapping[str, Answers], rows: Mapping[str, Mapping[str, Any]]
) -> None:
    """``folder/report.html``. ``ladder``: what ladder.json holds; ``answers`` by stage; ``rows``: the prompts by id."""
    stages = ladder["stages"]
    measures = [name for name in HEADINGS if any(name in stage for stage in stages)]
    plots = "".join(
        f'<div class="card"><h3>{HEADINGS[name]}</h3>{_plot([s for s in stages if name in s], name)}</div>'
        for name in measures
    )
    title = text(folder.resolve().name)
    folder.joinpath("report.html").write_text(
        "\n".join(
            [
                "<!doctype html>",
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{title}: the ladder</title><style>{STYLE}</style></head><body>",
                f'<h1>{title}</h1><p class="soft">Each stage starts from the model of the one before. Greedy answers '
                "to the same held-out prompts, mean and 95&nbsp;% interval; with a sign: the change from the stage "
                "before.</p>",
                f'<div class="grid">{plots}</div>',
                _table(stages, measures),
                "<h2>The same prompts, stage by stage</h2>",
                *_answers(answers, rows),
                "</body></html>",
            ]
        ),
        encoding="utf-8",
    )


def _plot(stages: Sequence[Mapping[str, Any]], name: str) -> str:
    """A dot with its interval for each stage, left to right."""
    marks = round_ticks(
        0.0, max(1.0 if name != "reasoning_length" else 0.0, *(s[f"{name}_interval"][1] for s in stages))
    )
    share = (WIDTH - LEFT - RIGHT) / len(stages)
    parts = []

    def y_of(value: float) -> float:
        return TOP + (marks[-1] - value) / (marks[-1] - marks[0]) * (HEIGHT - TOP - BOTTOM)

    for mark in marks:
        y = y_of(mark)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    for index, stage in enumerate(stages):
        x, (low, high) = LEFT + share * (index + 0.5), stage[f"{name}_interval"]
        parts.append(
            f'<g stroke="var(--after)" stroke-width="2"><title>{text(stage["stage"])}: {stage[name]:.3f} '
            f"({low:.3f} to {high:.3f}, n = {stage[f'{name}_n']})</title>"
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(low):.1f}" y2="{y_of(high):.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y_of(stage[name]):.1f}" r="4.5" fill="var(--after)"/></g>'
        )
        label = text(stage["stage"].removeprefix("rl_"))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    return svg(parts, HEIGHT)


def _table(stages: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> str:
    heads = "".join(f"<th>{HEADINGS[name]}</th>" for name in measures)
    body = []
    for stage in stages:
        cells = []
        for name in measures:
            if name not in stage:
                cells.append("<td></td>")
                continue
            form = ".1f" if name == "reasoning_length" else ".2f"
            interval = span({"interval": stage[f"{name}_interval"]}, form)
            small = f"<small>{interval}, n = {stage[f'{name}_n']}</small>"
            if f"{name}_change" in stage:
                by = span({"interval": stage[f"{name}_change_interval"]}, "+" + form)
                small += f"<small>{stage[f'{name}_change']:+{form}} ({by})</small>"
            cells.append(f"<td>{stage[name]:{form}}{small}</td>")
        name = text(stage["stage"])
        own = name if stage["stage"] == "base" else f'<a href="{name}/report.html">{name}</a>'
        body.append(f"<tr><td>{own}</td>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr><th>stage</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _answers(answers: Mapping[str, Answers], rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Cards of the first prompts of each kind whose answers differ most from stage to stage."""
    by_stage = {stage: {row["id"]: row for row in found["greedy"]} for stage, found in answers.items()}
    shown: dict[str, list[str]] = {}
    for row_id, row in sorted(rows.items(), key=lambda item: -_changes(by_stage, item[0])):
        cards = shown.setdefault(row["kind"], [])
        if len(cards) == PROMPTS_PER_KIND:
            continue
        parts = []
        for stage, found in by_stage.items():
            scores = found[row_id]["scores"]
            labels = ", ".join(f"{name}: {score.get('label', 'no verdict')}" for name, score in scores.items())
            parts.append(
                f'<div><div class="head"><b>{text(stage)}</b><span class="chip">{text(labels)}</span></div>'
                f'<div class="text">{text(found[row_id]["response"])}</div></div>'
            )
        cards.append(
            f'<div class="card talk"><div class="head"><b>Prompt</b><span class="soft">{text(row["kind"])}</span></div>'
            f'<div class="text">{text(row["prompt"])}</div><div class="answers">{"".join(parts)}</div></div>'
        )
    return [card for cards in shown.values() for card in cards]


def _changes(by_stage: Mapping[str, Mapping[str, Any]], row_id: str) -> int:
    """How many different sets of labels the stages' answers to a prompt have."""
    return len({str([s.get("label") for s in found[row_id]["scores"].values()]) for found in by_stage.values()})
