"""Write report.html of a run, a file without scripts or outside resources: `python -m recipes.report run=runs/demo`.

The report needs config.yaml and metrics.jsonl. It shows evaluation.json, samples, events.jsonl and environment.json if
they exist, and names those that are missing.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.report import answers, markup, result, samples, timeline, training
from recipes.report.markup import text
from recipes.report.samples import Samples
from recipes.run import sample_files
from recipes.run.display import duration
from recipes.run.records import read_events, read_rows

DEFAULT_MARKS = ["<think>", "</think>"]


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
    gathered = samples.gather(run_dir) if (run_dir / sample_files.FOLDER).exists() else None
    events = read_events(run_dir / "events.jsonl")
    marks = _thinking_marks(configuration)
    name = run_dir.resolve().name
    sections = [
        _header(name, rows),
        result.section(evaluation) if evaluation else _missing("evaluation.json", "Result"),
        training.section(rows, gathered or Samples(), events),
        timeline.section(events) if events else _missing("events.jsonl", "Faults and restarts"),
        answers.transcripts_section(evaluation, marks) if evaluation else "",
        answers.samples_section(gathered, marks) if gathered else _missing("samples", "Samples of one prompt"),
        f"<h2>Configuration</h2>{markup.details('config.yaml, resolved', f'<pre>{text(configuration)}</pre>')}",
        _machine(machine) if machine else _missing("environment.json", "Machine and versions"),
    ]
    path = run_dir / "report.html"
    path.write_text(markup.page(f"{name}: report", sections), encoding="utf-8")
    return path


def _thinking_marks(configuration: str) -> Sequence[str]:
    """``rollout.thinking_marks`` of a config.yaml, with a default for old files that do not have them."""
    settings = yaml.safe_load(configuration) or {}
    rollout = settings.get("rollout") or {}
    return rollout.get("thinking_marks", DEFAULT_MARKS)


def _header(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    total = sum(row["time/step"] for row in rows)
    pace = f"{len(rows)} steps in {duration(total)}, {duration(total / len(rows))} per step"
    return f'<h1>{text(name)}</h1><p class="soft">{pace}</p>'


def _missing(file: str, heading: str) -> str:
    return f'<h2>{heading}</h2><p class="soft">This run has no {file} yet.</p>'


def _machine(machine: Mapping[str, Mapping[str, Any]]) -> str:
    cards = []
    for title, facts in machine.items():
        items = [f"<dt>{text(key.replace('_', ' '))}</dt><dd>{text(value)}</dd>" for key, value in facts.items()]
        cards.append(markup.card(text(title), f"<dl>{''.join(items)}</dl>"))
    return f"<h2>Machine and versions</h2>{markup.grid(cards)}"


def _optional_json(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
