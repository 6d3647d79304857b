"""Writes corpus.jsonl, sft.jsonl, rl.jsonl, development.jsonl and test.jsonl: `python -m recipes.data.search.build`.
Deterministic: one fixed seed.

The lands are invented, so the facts about them are in the corpus only. A land has three facts. Its document has two of
them, and some lands have no document. A question about a missing fact can't be answered, and the model should not be
certain of its answer. No land is shared between the files of questions. Development and test questions have their own
wordings.

The episodes of sft.jsonl are legal and end with the corpus's answer, or with "unknown". Their confidence is random,
whether or not the corpus has the answer, because RL has to learn the right confidence.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recipes.data.demo.build import write_rows
from rollout.environment import Segment
from rollout.retrieval import Bm25, Document
from rollout.search import Search

FOLDER = Path(__file__).parent
SEED = 20260716
FACTS = ("capital", "river", "ruler")
# The number of lands with a document, and of lands without.
LANDS = {"sft": (42, 9), "rl": (56, 11), "development": (12, 2), "test": (28, 3)}
TRAINING_QUESTIONS = ("What is the {fact} of {land}?", "Name the {fact} of {land}.")
QUESTIONS = {
    "sft": TRAINING_QUESTIONS,
    "rl": TRAINING_QUESTIONS,
    "development": ("{land} has a {fact}; how is it called?", "Look up {land} and its {fact}."),
    "test": ("Find out {land}'s {fact}.", "Which {fact} does {land} have?"),
}
CERTAIN = 0.75  # share of the episodes that state a high confidence
# As in conf/rollout/search.yaml. The sentence of a fact has six words.
RESULTS = 1
SNIPPET_WORDS = 6
STARTS = "b d f g h j k l m n p r s t v w br dr gr kr tr st".split()
VOWELS = "a e i o u".split()
ENDS = "l m n r s t nd rk sh".split()

Land = dict[str, str]  # "name", and the value of each fact


def build() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, in file order."""
    draw = random.Random(SEED)
    names = _names(draw)
    lands: dict[str, list[tuple[Land, list[str]]]] = {}
    for split, (with_document, without_document) in LANDS.items():
        lands[split] = []
        for number in range(with_document + without_document):
            land = {"name": next(names)} | {fact: next(names) for fact in FACTS}
            lands[split].append((land, draw.sample(FACTS, 2) if number < with_document else []))
    corpus = [
        Document(land["name"].lower(), " ".join(sentence(land, fact) for fact in facts))
        for split in lands
        for land, facts in lands[split]
        if facts
    ]
    draw.shuffle(corpus)
    search = Search(Bm25.of(corpus), RESULTS, SNIPPET_WORDS)
    files: dict[str, list[dict[str, Any]]] = {"corpus": [{"id": d.id, "text": d.text} for d in corpus]}
    for split in lands:
        files[split] = [_row(split, land, facts, fact, draw) for land, facts in lands[split] for fact in FACTS]
        draw.shuffle(files[split])
        for number, row in enumerate(files[split]):
            row["id"] = f"search-{split}-{number:03d}"
            land, facts, fact = row.pop("asked")
            if split == "sft":
                row |= _episode(search, land, facts, fact, row["kind"], draw)
    return files


def sentence(land: Land, fact: str) -> str:
    """The sentence of a fact in the land's document."""
    return f"The {fact} of {land['name']} is {land[fact]}."


def _row(split: str, land: Land, facts: list[str], fact: str, draw: random.Random) -> dict[str, Any]:
    """The row of a question.

    Its ``kind`` is "listed" for a fact in the part of the document that a search lists, "read" for one that needs a
    read, and "missing" for one that is not in the corpus.
    """
    kind = "missing" if fact not in facts else "listed" if fact == facts[0] else "read"
    prompt = draw.choice(QUESTIONS[split]).format(fact=fact, land=land["name"])
    row = {"id": "", "label": "search", "kind": kind, "prompt": prompt, "answer": land[fact]}
    return row | {"asked": (land, facts, fact)}


def _episode(search: Search, land: Land, facts: list[str], fact: str, kind: str, draw: random.Random) -> dict[str, Any]:
    """An SFT row's ``response`` and ``environment``, the [start, end] characters that the environment wrote."""
    query = f"{fact} of {land['name']}"
    turns = [f"<think>I look it up.</think><search>{query}</search>"]
    if facts and kind != "listed":
        turns.append(f"<read>{land['name'].lower()}</read>")
    segments: list[Segment] = []
    for turn in turns:
        segments.append(Segment(turn, by_environment=False))
        segments.append(Segment(search.reply(segments), by_environment=True))
    confidence = draw.choice((8, 9) if draw.random() < CERTAIN else (1, 2))
    if kind == "missing":
        thought = "It is not there."
        answer = "unknown"
    else:
        thought = f"It is {land[fact]}."
        answer = land[fact]
    end = f"<think>{thought}</think><confidence>{confidence}</confidence><answer>{answer}</answer>"
    segments.append(Segment(end, by_environment=False))
    spans = []
    length = 0
    for segment in segments:
        if segment.by_environment:
            spans.append([length, length + len(segment.text)])
        length += len(segment.text)
    return {"response": "".join(segment.text for segment in segments), "environment": spans}


def _names(draw: random.Random) -> Iterator[str]:
    """An endless stream of different invented names."""
    seen: set[str] = set()
    while True:
        name = "".join(
            draw.choice(part) for part in (STARTS, VOWELS, STARTS[:16], VOWELS, ENDS if draw.random() < 0.5 else [""])
        ).capitalize()
        if name not in seen:
            seen.add(name)
            yield name


def main() -> None:
    for name, rows in build().items():
        write_rows(FOLDER / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
