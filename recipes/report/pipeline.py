"""Write report.html of a pipeline of stages: every measure by stage, and every model's answers to the same prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.evaluation.evaluate import Answers
from recipes.report import markup
from recipes.report.markup import span, text
from recipes.report.plots import HEIGHT, LEFT, RIGHT, WIDTH, grid_lines, round_ticks, svg, y_of

HEADINGS = {
    "unsafe": "Unsafe",
    "bare_refusal": "Refused without a reason",
    "over_refusal": "Refused though harmless",
    "illogical": "Without sense or content",
    "helpfulness": "Helpfulness on benign prompts",
    "accuracy": "Accuracy",
    "reasoning_length": "Reasoning length, tokens",
    "search_accuracy": "Accuracy of searches",
    "false_certain": "False and certain",
}
PROMPTS_PER_KIND = 2

type Row = Mapping[str, Any]


def write_pipeline_report(
    folder: Path, ladder: Mapping[str, Any], answers: Mapping[str, Answers], prompts: Mapping[str, Row]
) -> None:
    """Write ``folder/report.html``.

    Args:
        ladder: the content of ladder.json.
        answers: stage -> the answers of the stage's model.
        prompts: the held-out prompts by id.
    """
    stages = ladder["stages"]
    # A measure NAME has its number of prompts in NAME_n. A rate of safety has the prompts' kind after "/".
    with_number = dict.fromkeys(name for stage in stages for name in stage if f"{name}_n" in stage)
    measures = [name for heading in HEADINGS for name in with_number if name.partition("/")[0] == heading]
    cards = []
    for name in measures:
        measured = [stage for stage in stages if name in stage]
        cards.append(markup.card(_heading(name), _plot(measured, name)))
    title = folder.resolve().name
    sections = [
        f'<h1>{text(title)}</h1><p class="soft">Each stage starts from the model of the one before. Greedy answers '
        "to the same held-out prompts, mean and 95&nbsp;% interval; with a sign: the change from the stage "
        "before.</p>",
        markup.grid(cards),
        _table(stages, measures),
        "<h2>The same prompts, stage by stage</h2>",
        *_prompt_cards(answers, prompts),
    ]
    folder.joinpath("report.html").write_text(markup.page(f"{title}: the ladder", sections), encoding="utf-8")


def _heading(measure: str) -> str:
    """A measure's name for readers: "Unsafe: jailbreak"."""
    name, _, kind = measure.partition("/")
    return f"{HEADINGS[name]}: {text(kind)}" if kind else HEADINGS[name]


def _plot(stages: Sequence[Row], name: str) -> str:
    """A dot with its interval for each stage, left to right."""
    highest = max(stage[f"{name}_interval"][1] for stage in stages)
    # All measures are shares, except the reasoning length.
    ticks = round_ticks(0.0, highest if name == "reasoning_length" else max(1.0, highest))
    share = (WIDTH - LEFT - RIGHT) / len(stages)
    parts = grid_lines(ticks)
    for index, stage in enumerate(stages):
        x = LEFT + share * (index + 0.5)
        low, high = stage[f"{name}_interval"]
        title = f"{text(stage['stage'])}: {stage[name]:.3f} ({low:.3f} to {high:.3f}, n = {stage[f'{name}_n']})"
        parts.append(
            f'<g stroke="var(--after)" stroke-width="2"><title>{title}</title>'
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(low, ticks):.1f}" y2="{y_of(high, ticks):.1f}"/>'
            f'<circle cx="{x:.1f}" cy="{y_of(stage[name], ticks):.1f}" r="4.5" fill="var(--after)"/></g>'
        )
        label = text(stage["stage"].removeprefix("rl_"))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    return svg(parts, HEIGHT)


def _table(stages: Sequence[Row], measures: Sequence[str]) -> str:
    header = "<th>stage</th>" + "".join(f"<th>{_heading(name)}</th>" for name in measures)
    rows = []
    for stage in stages:
        cells = [_cell(stage, name) for name in measures]
        name = text(stage["stage"])
        link = name if stage["stage"] == "base" else f'<a href="{name}/report.html">{name}</a>'
        rows.append(f"<tr><td>{link}</td>{''.join(cells)}</tr>")
    return markup.table(header, rows)


def _cell(stage: Row, name: str) -> str:
    """A stage's measure with its interval, and the change from the stage before."""
    if name not in stage:
        return "<td></td>"
    form = ".1f" if name == "reasoning_length" else ".2f"
    interval = span({"interval": stage[f"{name}_interval"]}, form)
    cell = f"{stage[name]:{form}}<small>{interval}, n = {stage[f'{name}_n']}</small>"
    if f"{name}_change" in stage:
        interval = span({"interval": stage[f"{name}_change_interval"]}, f"+{form}")
        cell += f"<small>{stage[f'{name}_change']:+{form}} ({interval})</small>"
    return f"<td>{cell}</td>"


def _prompt_cards(answers: Mapping[str, Answers], prompts: Mapping[str, Row]) -> list[str]:
    """The prompts of each kind whose answers' labels differ most between stages, with every stage's answer."""
    by_stage = {}
    for stage, stage_answers in answers.items():
        by_stage[stage] = {row["id"]: row for row in stage_answers["greedy"]}
    most_changed_first = sorted(prompts, key=lambda prompt_id: -_label_sets(by_stage, prompt_id))
    cards_of_kind: dict[str, list[str]] = {}
    for prompt_id in most_changed_first:
        prompt = prompts[prompt_id]
        cards = cards_of_kind.setdefault(prompt["kind"], [])
        if len(cards) == PROMPTS_PER_KIND:
            continue
        boxes = [_answer(stage, rows[prompt_id]) for stage, rows in by_stage.items()]
        kind = f'<span class="soft">{text(prompt["kind"])}</span>'
        cards.append(markup.prompt_card(prompt["prompt"], "".join(boxes), kind))
    return [card for cards in cards_of_kind.values() for card in cards]


def _answer(stage: str, answer: Row) -> str:
    labels = ", ".join(f"{name}: {score.get('label', 'no verdict')}" for name, score in answer["scores"].items())
    return (
        f'<div><div class="head"><b>{text(stage)}</b><span class="chip">{text(labels)}</span></div>'
        f'<div class="text">{text(answer["response"])}</div></div>'
    )


def _label_sets(by_stage: Mapping[str, Mapping[str, Row]], prompt_id: str) -> int:
    """The number of different sets of labels among the stages' answers to a prompt."""
    label_sets = set()
    for rows in by_stage.values():
        scores = rows[prompt_id]["scores"].values()
        label_sets.add(tuple(score.get("label") for score in scores))
    return len(label_sets)
