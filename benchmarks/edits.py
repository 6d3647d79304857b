"""Measures what SFT on edited answers teaches: ``python -m benchmarks.edits --run FOLDER [field=value …]``.

It writes ``benchmarks/results/edits.json`` and prints its table. The edits and both SFT runs are in
``build/benchmarks/edits/``. A script replaces the person at the page (docs/page.md) and uses the same code as the page:

1. The run's exported model answers the safety prompts that the run trained with (``data.prompts``), greedily.
2. If the run's verifier ``safety`` finds a fault, the script edits the answer to the beginning of a better one
   (CORRECTIONS), and the model continues from there. ``kept`` is the share of these answers without the fault, by
   fault.
3. Every edit is saved as the page saves it. One SFT starts from the run's model and trains on the saved rows. Another
   starts from the same model and trains on the unedited answers to the same prompts, with the same number of steps.
4. Both models answer the run's held-out prompts (``data.evaluation``). Their rates are compared by prompt.

``field=value`` sets both SFT runs, such as ``stage.sft.steps=20``.
"""

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import figures
from recipes import serve
from recipes.data.rows import load_rows
from recipes.data.sources import Row
from recipes.evaluate import run_config
from recipes.evaluation.statistics import mean_interval, paired_difference
from recipes.page.conversation import Conversation, Refused
from recipes.page.saving import SFT_FILE, EditFiles, about, edit_rows
from recipes.page.settings import Setup
from recipes.page.writing import Writer, open_writer
from recipes.run import records
from rewards.serve import stop_on_signals
from rewards.verifiers import safety
from rollout.guidance.edits import EditRefused

RESULT = Path("benchmarks/results/edits.json")
FOLDER = Path("build/benchmarks/edits")
EDITED, UNEDITED = "edited", "unedited"
UNSAFE, BARE, OVER_REFUSAL = "unsafe", "safe with refusal", "unnecessary refusal"
# Fault → what the script writes. It appends the beginning of a reason to a bare refusal, and replaces any other answer.
CORRECTIONS = {UNSAFE: "I can't help with that. It", BARE: " It", OVER_REFUSAL: "Sure."}
SFT_SETTINGS = [
    "stage.sft.epochs=null",
    "stage.sft.steps=16",
    "stage.sft.rows_per_step=16",
    "stage.sft.learning_rate=5.0e-5",
]
AT_ONCE = 16  # concurrent answers


@dataclass(frozen=True)
class Edited:
    """An answer with a fault, and the answer after the edit.

    ``is_saved``: the answer has an end, without which an edit can't be saved.
    """

    row: Row
    fault: str
    before: str
    after: str
    label: str
    is_saved: bool


def fault_of(row: Row, answer: str) -> str | None:
    """The label if the script corrects such answers, else None."""
    label = safety_label(row, answer)
    return label if label in CORRECTIONS else None


def safety_label(row: Row, answer: str) -> str:
    return safety.score(row, answer).label


def edited_text(fault: str, answer: str) -> str:
    """The edited text, from which the model continues."""
    return answer.rstrip() + CORRECTIONS[fault] if fault == BARE else CORRECTIONS[fault]


async def edit_answers(setup: Setup, rows: Sequence[Row]) -> tuple[list[Edited], int]:
    """Edits all answers with a fault and saves them as the page does. Returns the edits and the number of answers.

    An answer that can't be edited at a token boundary is left out. One without an end is not saved.
    """
    files = EditFiles(setup.edits, setup.page.max_saved_mib)
    slots = asyncio.Semaphore(AT_ONCE)
    async with open_writer(setup) as writer:

        async def one(row: Row) -> Edited | None:
            async with slots:
                return await edit_answer(writer, files, row)

        edits = await asyncio.gather(*(one(row) for row in rows))
    return [edit for edit in edits if edit is not None], len(edits)


async def edit_answer(writer: Writer, files: EditFiles, row: Row) -> Edited | None:
    """Ask for an answer, and edit it if it has a fault. None without a fault, or if the edit is refused."""
    conversation = Conversation()
    writer.ask(conversation, row["prompt"])
    await ended(conversation)
    turn = conversation.turns[-1]
    answer = turn.branches[0].text
    fault = fault_of(row, answer)
    if fault is None:
        return None
    try:
        await writer.continue_from(conversation, 0, 0, edited_text(fault, answer))
    except EditRefused:
        return None
    await ended(conversation)
    branch = turn.branches[-1]
    try:
        files.append(
            edit_rows(conversation.turns, branch, about("script", writer.model), writer.guidance.thinking_marks)
        )
        is_saved = True
    except Refused:
        is_saved = False
    return Edited(row, fault, answer, branch.text, safety_label(row, branch.text), is_saved)


async def ended(conversation: Conversation) -> None:
    """Wait for the answer in progress. Raises RuntimeError if it failed."""
    if conversation.task is not None:
        await conversation.task
    branch = conversation.turns[-1].branches[-1]
    if branch.notice is not None:
        raise RuntimeError(f"an answer failed: {branch.notice}")


def kept(edits: Sequence[Edited]) -> dict[str, Any]:
    """Fault → the share of edited answers without it, the counts of their labels, and how many were saved."""
    of_faults = {}
    for fault in CORRECTIONS:
        of_fault = [edit for edit in edits if edit.fault == fault]
        if not of_fault:
            continue
        labels = [edit.label for edit in of_fault]
        of_faults[fault] = {
            **mean_interval([float(label != fault) for label in labels]),
            "labels": {label: labels.count(label) for label in sorted(set(labels))},
            "saved": sum(edit.is_saved for edit in of_fault),
        }
    return of_faults


def write_unedited(edits: Sequence[Edited], saved: Path, path: Path) -> None:
    """Write the rows of ``saved`` with the unedited answers instead of the edited ones."""
    before = {edit.row["prompt"]: edit.before for edit in edits}
    lines = []
    with saved.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            asked, _ = row["messages"]
            answer = {"role": "assistant", "content": before[asked["content"]]}
            lines.append(json.dumps({"id": row["id"], "messages": [asked, answer]}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def fine_tune(run: Path, recipe: str, rows: Path, run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Run an SFT on the rows from the run's model and return its evaluation. Raises CalledProcessError."""
    settings = [f"recipe={recipe}", "stage=sft", f"model.path={run / 'hf'}", f"data.sft={rows}", f"run_dir={run_dir}"]
    subprocess.run([sys.executable, "-m", "recipes.train", *settings, *SFT_SETTINGS, *overrides], check=True)
    evaluation: dict[str, Any] = json.loads((run_dir / "evaluation.json").read_text())
    return evaluation


def held_out(edited: Mapping[str, Any], unedited: Mapping[str, Any]) -> dict[str, Any]:
    """Compares the rates of greedy answers.

    Rate → its means before SFT, after SFT on the edits and after SFT on the unedited answers, the change by SFT on the
    edits, and the difference of both models on the same prompts.
    """
    measures = {}
    greedy = {name: measure for name, measure in edited["difference"].items() if name != "sampled"}
    for name, difference in greedy.items():
        measures[name] = {
            "before": edited["before"][name],
            EDITED: edited["after"][name],
            UNEDITED: unedited["after"][name],
            "edited − before": difference,
        }
    for fault, kind, name in (
        ("unsafe", "harmful", "unsafe/harmful"),
        (OVER_REFUSAL, "borderline", "over_refusal/borderline"),
        (OVER_REFUSAL, "benign", "over_refusal/benign"),
    ):
        if name in measures:
            measures[name]["edited − unedited"] = paired_difference(
                has_label(unedited, kind, fault), has_label(edited, kind, fault)
            )
    return measures


def has_label(evaluation: Mapping[str, Any], kind: str, label: str) -> list[float]:
    """1 for each prompt of a kind if ``safety`` labels the answer after training with ``label``, else 0."""
    of_kind = [row["labels"]["after"] for row in evaluation["transcripts"] if row["kind"] == kind]
    return [float(f"safety: {label}" in labels) for labels in of_kind]


def table(result: Mapping[str, Any]) -> Table:
    shown = Table("", "before", "SFT on edits", "SFT on unedited", "edits − unedited", title="held-out prompts")
    for name, measure in result["held_out"].items():
        means = [f"{measure[key]['mean']:.2f}" for key in ("before", EDITED, UNEDITED)]
        difference = measure.get("edited − unedited")
        text = "" if difference is None else figures.with_interval(difference, "+.2f")
        shown.add_row(name, *means, text)
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path, help="folder of the run whose model answers")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="settings of both SFT runs")
    options = parser.parse_args()
    made_by = figures.source("benchmarks.edits")
    stop_on_signals()
    shutil.rmtree(FOLDER, ignore_errors=True)
    config = run_config(options.run, [])
    rows = [row for row in load_rows(config.data.prompts) if row.get("keywords")]
    own = {"model": str(options.run / "hf")}
    limit = config.rollout.max_response_tokens
    page = [f"page.edits={FOLDER / 'saved'}", "page.temperature=0", f"page.max_answers={AT_ONCE}"]
    setup = serve.read_setup(own, [*page, f"guidance.max_tokens={limit}"])
    with serve.served(setup, own):
        edits, answers = asyncio.run(edit_answers(setup, rows))
    saved, unedited_rows = FOLDER / "saved" / SFT_FILE, FOLDER / "unedited.jsonl"
    write_unedited(edits, saved, unedited_rows)
    sources = {EDITED: saved, UNEDITED: unedited_rows}
    evaluations = {
        name: fine_tune(options.run, config.recipe.name, path, FOLDER / name, options.overrides)
        for name, path in sources.items()
    }
    result = {
        **records.environment("cpu", 1),
        "answers": answers,
        "corrections": CORRECTIONS,
        "kept": kept(edits),
        "sft": [*SFT_SETTINGS, *options.overrides],
        "held_out": held_out(evaluations[EDITED], evaluations[UNEDITED]),
    }
    figures.write(RESULT, " ".join(["python -m benchmarks.edits", *sys.argv[1:]]), made_by, result)
    console = Console(width=None if sys.stdout.isatty() else 120)
    for fault, share in result["kept"].items():
        console.print(f"{fault}: {share['n']} edits, kept by {figures.with_interval(share, '.2f')}")
    console.print(table(result), f"{RESULT} has the raw figures", sep="\n")


if __name__ == "__main__":
    main()
