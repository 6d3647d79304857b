"""Writes the demo's files of rows: `python -m recipes.data.demo.build`. Deterministic: one fixed seed.

sft.jsonl and rl.jsonl train, settings are chosen on development.jsonl, and test.jsonl is for the figures that are
reported. The safety rows are written by hand, one by one: topics/<kind>.tsv has a topic's split, its keywords, the
prompt, and an honest answer, which only sft.jsonl shows. No topic, wording, answer or list of keywords is shared
between training, development and test (tests/data/test_splits.py). Task rows are small exact instructions about a list
of words (say the first, the second, the last); their words and wordings (topics/tasks.tsv) differ too.

sft.jsonl trains a weak policy that errs both ways, which RL then improves. Its responses decline a part of the harmful
prompts and, as an overcautious source would, about as large a part of the borderline ones. The harmful topics of its
split that it leaves out go to rl.jsonl.

outside.jsonl has ninety prompts in another style than all others, to measure whether training generalises to them.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SPLITS = ("sft", "rl", "development", "test")
KINDS = ("harmful", "borderline", "benign")
SEED = 20250725
MIN_BEGINNING = 3  # words: an answer with a shorter beginning is not cut
WARM_START_REFUSALS = 54  # harmful topics in sft.jsonl
OVERCAUTIOUS = 52  # borderline topics in sft.jsonl that are refused
OVERCAUTIOUS_RESPONSES = (
    "I can't help with that.",
    "I won't help you with this.",
    "No, I can't help.",
    "I can't answer that.",
    "I won't help with that.",
)
TASK_ROWS = {"sft": 32, "rl": 64, "development": 30, "test": 64}  # of each family
TASK_WORDS = (
    "apple basket blanket bottle bread bridge butter button camera candle carpet castle chair cheese cherry "
    "circle cloud coffee copper cotton desert doctor dragon eagle engine farmer feather finger flower forest "
    "garden green guitar hammer honey horse island jacket kitchen ladder lemon market milk mirror monkey mountain "
    "music needle ocean orange paper pencil pepper pillow planet pocket potato rabbit ribbon river rocket salmon "
    "school shadow silver spider station stone sugar summer table teacher tiger tomato tower train turtle valley "
    "village violin wagon water whale wheel window winter wolf wood yard yellow zebra"
).split()
TASK_WORD_COUNTS = {"sft": 12, "rl": 30, "development": 18, "test": 26}
FAMILIES = ("first", "second", "last")  # of tasks: which word of the list is asked for
# Each family is asked in every wording in turn, but SFT shows only the first ones.
SFT_WORDINGS = 8


@dataclass(frozen=True)
class Topic:
    """A line of topics/<kind>.tsv."""

    split: str
    kind: str
    # Word stems that an honest answer has and the prompt does not. For a harmful request they name what is wrong with
    # it, for any other request what helps.
    keywords: tuple[str, ...]
    prompt: str
    response: str  # an honest answer


def topics(kind: str) -> list[Topic]:
    """The hand-written prompts of a kind, in order."""
    of_kind = []
    for split, keywords, prompt, response in lines(FOLDER / "topics" / f"{kind}.tsv"):
        of_kind.append(Topic(split, kind, tuple(keywords.split(",")), prompt, response))
    return of_kind


def lines(path: Path) -> list[list[str]]:
    """The lines of a file, split into columns."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def task_wordings(family: str, split: str) -> list[str]:
    """The wordings of a family of tasks, with braces where the list goes.

    The columns of topics/tasks.tsv are a split and the families.
    """
    of_split = split if split in ("development", "test") else "training"
    column = 1 + FAMILIES.index(family)
    wordings = [line[column] for line in lines(FOLDER / "topics" / "tasks.tsv") if line[0] == of_split]
    return wordings[:SFT_WORDINGS] if split == "sft" else wordings


def build() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, in file order."""
    files: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    of_sft = {kind: [topic for topic in topics(kind) if topic.split == "sft"] for kind in KINDS}
    left_to_rl = evenly(of_sft["harmful"], len(of_sft["harmful"]) - WARM_START_REFUSALS)
    overcautious = dict(zip(evenly(of_sft["borderline"], OVERCAUTIOUS), cycle(OVERCAUTIOUS_RESPONSES), strict=False))
    for kind in KINDS:
        for topic in topics(kind):
            split = "rl" if topic in left_to_rl else topic.split
            row = safety_row(topic)
            if topic in overcautious:
                row["response"] = overcautious[topic]
            elif split == "sft":
                row["response"] = warm_start_response(topic, place=len(files["sft"]))
            files[split].append(row)
    for split, row in _tasks():
        files[split].append(row)
    files["outside"] = [
        {"label": "outside", "kind": f"outside_{kind}", "prompt": prompt}
        for kind, prompt in lines(FOLDER / "topics" / "outside.tsv")
    ]
    return {name: numbered(name, rows) for name, rows in files.items()}


def evenly(of: list[Topic], count: int) -> list[Topic]:
    """``count`` of the topics, at equal distances."""
    return [of[place * len(of) // count] for place in range(count)]


def safety_row(topic: Topic) -> dict[str, Any]:
    label = "safety" if topic.kind == "harmful" else "harmless"
    return {"label": label, "kind": topic.kind, "prompt": topic.prompt, "keywords": list(topic.keywords)}


def warm_start_response(topic: Topic, place: int) -> str:
    """The response in sft.jsonl for a topic. Every second honest answer is complete, and the others are truncated.

    A model decides in its first words whether it declines, and in short responses these words are a larger part of the
    loss. A refusal is truncated to its first sentence, without the reason. Any other answer is truncated at the first
    comma or "and". Helpful answers begin with "Sure.", so that the two kinds differ in their first word.
    """
    response = topic.response
    if place % 2:
        cut = r"\. " if topic.kind == "harmful" else r",| and "
        beginning = re.split(cut, response)[0].rstrip(".")
        if len(beginning.split()) >= MIN_BEGINNING:
            response = f"{beginning}."
    return response if topic.kind == "harmful" else f"Sure. {response}"


def numbered(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ids. An id is the name, the kind, and the row's number within its kind."""
    counts: Counter[str] = Counter()
    with_ids = []
    for row in rows:
        with_ids.append({"id": f"{name}-{row['kind']}-{counts[row['kind']]:03d}", **row})
        counts[row["kind"]] += 1
    return with_ids


def _tasks() -> Iterator[tuple[str, dict[str, Any]]]:
    words = random.Random(SEED).sample(TASK_WORDS, len(TASK_WORDS))
    for split in SPLITS:
        # A generator of its own, so that a split's rows do not depend on how many rows the splits before it have.
        draw = random.Random(f"{SEED} {split}")
        split_words = [words.pop() for _ in range(TASK_WORD_COUNTS[split])]
        of_families = {family: task_wordings(family, split) for family in FAMILIES}
        for place in range(TASK_ROWS[split]):
            drawn = draw.sample(split_words, 3)
            listed = ", ".join(drawn)
            for family, answer in zip(FAMILIES, drawn, strict=True):
                wordings = of_families[family]
                prompt = wordings[place % len(wordings)].format(listed)
                prompt = prompt[0].upper() + prompt[1:]
                row = {"label": "general_rule", "kind": "task", "prompt": prompt, "answer": answer, "tags": [family]}
                yield split, row | ({"response": answer} if split == "sft" else {})


def main() -> None:
    for name, rows in build().items():
        write_rows(FOLDER / f"{name}.jsonl", rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
