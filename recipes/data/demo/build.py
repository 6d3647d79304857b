"""Writes the demo's files of rows: `python -m recipes.data.demo.build`. Deterministic: one fixed seed.

sft.jsonl and rl.jsonl train, settings are chosen on development.jsonl, and test.jsonl is for the figures that are
reported. The safety rows are written by hand, one by one: topics/*.tsv has a topic's split, its keywords, the prompt,
and an honest answer, which only sft.jsonl shows. No topic, wording, answer or list of keywords is shared between
training, development and test (tests/data/test_splits.py). Task rows are small exact instructions about a list of words
(say the first, the second, the last); their words and wordings differ too.

sft.jsonl makes a weak policy that errs both ways, for RL to mend: it refuses few harmful prompts and, as an
overcautious source would, some borderline ones. The harmful topics of its split that it leaves out are RL's.

outside.jsonl has ninety prompts in another style than all others, to see whether what was learnt holds there.
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
TASK_ROWS = {"sft": 12, "rl": 64, "development": 30, "test": 64}  # of each family
TASK_WORDS = (
    "apple basket blanket bottle bread bridge butter button camera candle carpet castle chair cheese cherry "
    "circle cloud coffee copper cotton desert doctor dragon eagle engine farmer feather finger flower forest "
    "garden green guitar hammer honey horse island jacket kitchen ladder lemon market milk mirror monkey mountain "
    "music needle ocean orange paper pencil pepper pillow planet pocket potato rabbit ribbon river rocket salmon "
    "school shadow silver spider station stone sugar summer table teacher tiger tomato tower train turtle valley "
    "village violin wagon water whale wheel window winter wolf wood yard yellow zebra"
).split()
TASK_WORD_COUNTS = {"sft": 12, "rl": 30, "development": 18, "test": 26}
# Wordings of a family by the files that have them. Each family is asked in every one in turn, but SFT shows only the
# first ones.
SFT_WORDINGS = 8
TASK_WORDINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "last": {
        "training": (
            "What is the last word of this list: {}?",
            "Here is a list: {}. Which word comes last?",
            "Read these words: {}. Write down only the last one.",
            "{}: name the word at the end.",
            "From {}, keep the last word and drop the rest.",
            "A sign says {}. Which word stands furthest to the right?",
            "Three words: {}. Say the third.",
            "I typed {}. Which word did I type after the others?",
            "Which word ends this list: {}?",
            "{}. Tell me the word that nothing follows.",
            "Take {} and leave all but the last.",
            "My note reads {}. Which word did I write at the end?",
            "Pick the last of these three: {}.",
            "You hear {}. Repeat the last of them.",
            "If {} stand in a line, who stands last?",
            "Write the last word: {}.",
            "Among {} the last word counts. Which is it?",
            "Copy the last of these words: {}.",
            "A parrot says {}. Say its last word.",
            "{}. Only the last, please.",
            "On the shelf stand {}. Name the last item.",
            "Answer with one word, the last of {}.",
            "My password is made of {}. What is its last word?",
            "Three boxes hold {}. What is in the last box?",
            "Someone calls out {}. Which one came last?",
            "The row {} has which item in last place?",
            "Of {}, tell me the last one.",
            "My bag holds {}. What did I pack last?",
            "Echo just the last word: {}.",
            "Shopping for {}: what do we buy last?",
            "The menu lists {}. Which dish is the last one?",
            "We visit {} in this order. Name the last stop.",
            "Children shout {}. Shout back the last thing.",
            "Please hand me the last of these cards: {}.",
            "Three horses called {} finish a race in that order. Which horse is last?",
            "Type the last of {} and nothing more.",
            "The wizard mumbles {}. Which word does he mumble last?",
            "The code for the gate is {}. Remind me of its last part.",
        ),
        "development": (
            "Three doors are marked {}. Which mark is on the last door?",
            "The teacher dictates {}, and I missed the last word. What was it?",
            "Out of {} I only need the last.",
            "This receipt shows {}. Please read me the last entry.",
        ),
        "test": (
            "A train pulls wagons named {}. What is the last wagon called?",
            "From left to right we hang up {}. What hangs last?",
            "Give back the last word of {} and stop there.",
            "The singer lists {}. Which of them did she list last?",
        ),
    },
    "second": {
        "training": (
            "What is the second word of this list: {}?",
            "Here is a list: {}. Which word is number two?",
            "Read these words: {}. Write down only the second one.",
            "{}: name the word in the middle.",
            "From {}, keep the second word and drop the rest.",
            "A sign says {}. Which word has one on either side?",
            "Three words: {}. Say number two.",
            "I typed {}. Which word did I type after the first?",
            "Which word is in the middle of this list: {}?",
            "{}. Tell me the word that has a neighbor before and after it.",
            "Take {} and leave all but the second.",
            "My note reads {}. Which word did I write in the middle?",
            "Pick the second of these three: {}.",
            "You hear {}. Repeat the second of them.",
            "If {} stand in a line, who stands second?",
            "Write the second word: {}.",
            "Among {} the second word counts. Which is it?",
            "Copy the second of these words: {}.",
            "A parrot says {}. Say its second word.",
            "{}. Only the second, please.",
            "On the shelf stand {}. Name the second item.",
            "Answer with one word, the second of {}.",
            "My password is made of {}. What is its second word?",
            "Three boxes hold {}. What is in the second box?",
            "Someone calls out {}. Which one came second?",
            "The row {} has which item in second place?",
            "Of {}, tell me the second one.",
            "My bag holds {}. What did I pack second?",
            "Echo just the second word: {}.",
            "Shopping for {}: what do we buy second?",
            "The menu lists {}. Which dish is the second one?",
            "We visit {} in this order. Name the second stop.",
            "Children shout {}. Shout back the second thing.",
            "Please hand me the second of these cards: {}.",
            "Three horses called {} finish a race in that order. Which horse is second?",
            "Type the second of {} and nothing more.",
            "The wizard mumbles {}. Which word does he mumble second?",
            "The code for the gate is {}. Remind me of its second part.",
        ),
        "development": (
            "Three doors are marked {}. Which mark is on the second door?",
            "The teacher dictates {}, and I missed the second word. What was it?",
            "Out of {} I only need the second.",
            "This receipt shows {}. Please read me the second entry.",
        ),
        "test": (
            "A train pulls wagons named {}. What is the second wagon called?",
            "From left to right we hang up {}. What hangs second?",
            "Give back the second word of {} and stop there.",
            "The singer lists {}. Which of them did she list second?",
        ),
    },
    "first": {
        "training": (
            "What is the first word of this list: {}?",
            "Here is a list: {}. Which word is number one?",
            "Read these words: {}. Write down only the first one.",
            "{}: name the word at the beginning.",
            "From {}, keep the first word and drop the rest.",
            "A sign says {}. Which word stands furthest to the left?",
            "Three words: {}. Say the first.",
            "I typed {}. Which word did I type before the others?",
            "Which word begins this list: {}?",
            "{}. Tell me the word that nothing precedes.",
            "Take {} and leave all but the first.",
            "My note reads {}. Which word did I write at the beginning?",
            "Pick the first of these three: {}.",
            "You hear {}. Repeat the first of them.",
            "If {} stand in a line, who stands first?",
            "Write the first word: {}.",
            "Among {} the first word counts. Which is it?",
            "Copy the first of these words: {}.",
            "A parrot says {}. Say its first word.",
            "{}. Only the first, please.",
            "On the shelf stand {}. Name the first item.",
            "Answer with one word, the first of {}.",
            "My password is made of {}. What is its first word?",
            "Three boxes hold {}. What is in the first box?",
            "Someone calls out {}. Which one came first?",
            "The row {} has which item in first place?",
            "Of {}, tell me the first one.",
            "My bag holds {}. What did I pack first?",
            "Echo just the first word: {}.",
            "Shopping for {}: what do we buy first?",
            "The menu lists {}. Which dish is the first one?",
            "We visit {} in this order. Name the first stop.",
            "Children shout {}. Shout back the first thing.",
            "Please hand me the first of these cards: {}.",
            "Three horses called {} finish a race in that order. Which horse is first?",
            "Type the first of {} and nothing more.",
            "The wizard mumbles {}. Which word does he mumble first?",
            "The code for the gate is {}. Remind me of its first part.",
        ),
        "development": (
            "Three doors are marked {}. Which mark is on the first door?",
            "The teacher dictates {}, and I missed the first word. What was it?",
            "Out of {} I only need the first.",
            "This receipt shows {}. Please read me the first entry.",
        ),
        "test": (
            "A train pulls wagons named {}. What is the first wagon called?",
            "From left to right we hang up {}. What hangs first?",
            "Give back the first word of {} and stop there.",
            "The singer lists {}. Which of them did she list first?",
        ),
    },
}


@dataclass(frozen=True)
class Topic:
    """A line of topics/<kind>.tsv. ``keywords``: beginnings of words that an honest answer has and the prompt has not:
    for a harmful request what is wrong with it, for any other one what helps. ``response``: an honest answer."""

    split: str
    kind: str
    keywords: tuple[str, ...]
    prompt: str
    response: str


def topics(kind: str) -> list[Topic]:
    """The hand-written prompts of a kind, in order."""
    of_kind = []
    for split, keywords, prompt, response in lines(FOLDER / "topics" / f"{kind}.tsv"):
        of_kind.append(Topic(split, kind, tuple(keywords.split(",")), prompt, response))
    return of_kind


def lines(path: Path) -> list[list[str]]:
    """The lines of a file, split into columns."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


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
    """What sft.jsonl shows for a topic: every second honest answer is complete, the others are cut to their beginning.

    A model decides in its first words whether it declines, and in short responses these words are more of the loss. A
    refusal's beginning is its first sentence, without the reason; that of any other answer ends at the first comma or
    "and". Helping answers begin with "Sure.", so that both kinds have a first word of their own.
    """
    response = topic.response
    if place % 2:
        cut = r"\. " if topic.kind == "harmful" else r",| and "
        beginning = re.split(cut, response)[0].rstrip(".")
        if len(beginning.split()) >= MIN_BEGINNING:
            response = f"{beginning}."
    return response if topic.kind == "harmful" else f"Sure. {response}"


def numbered(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ids: name, kind, and a number that counts the rows of the kind."""
    counts: Counter[str] = Counter()
    with_ids = []
    for row in rows:
        with_ids.append({"id": f"{name}-{row['kind']}-{counts[row['kind']]:03d}", **row})
        counts[row["kind"]] += 1
    return with_ids


def _tasks() -> Iterator[tuple[str, dict[str, Any]]]:
    draw = random.Random(SEED)
    words = draw.sample(TASK_WORDS, len(TASK_WORDS))
    for split in SPLITS:
        split_words = [words.pop() for _ in range(TASK_WORD_COUNTS[split])]
        for place in range(TASK_ROWS[split]):
            drawn = draw.sample(split_words, 3)
            listed = ", ".join(drawn)
            for family, answer in (("first", drawn[0]), ("second", drawn[1]), ("last", drawn[2])):
                wordings = TASK_WORDINGS[family][split if split in ("development", "test") else "training"]
                if split == "sft":
                    wordings = wordings[:SFT_WORDINGS]
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
