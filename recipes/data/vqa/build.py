"""Writes the visual demo's files: ``python -m recipes.data.vqa.build``. Deterministic: one fixed seed.

Questions and images are those of the package easy-vqa (MIT). An image shows one coloured shape, and there are thirteen
answers. No image is in two files. sft.jsonl and rl.jsonl have the package's first and next training images,
development.jsonl has the last ones, and test.jsonl has its test images. Each image has one question, so the rows of a
kind are independent.
"""

import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import easy_vqa

FOLDER = Path(__file__).parent
SEED = 20261129
# Images of each file: a range of the package's training images, or of its test images.
SPLITS = {
    "sft": ("train", range(0, 1600)),
    "rl": ("train", range(1600, 3400)),
    "development": ("train", range(3400, 4000)),
    "test": ("test", range(0, 1000)),
}
COLOURS = {"black", "gray", "red", "green", "blue", "yellow", "teal", "brown"}


def kind_of(answer: str) -> str:
    """The row's kind, which says what the question asks for."""
    if answer in ("yes", "no"):
        return "presence"
    return "colour" if answer in COLOURS else "shape"


def build() -> dict[str, list[dict[str, Any]]]:
    """The rows of each file, in file order."""
    chance = random.Random(SEED)
    packages = {"train": easy_vqa.get_train_questions(), "test": easy_vqa.get_test_questions()}
    of_images = {name: _by_image(*questions) for name, questions in packages.items()}
    files = {}
    for split, (package, images) in SPLITS.items():
        rows = []
        for image in images:
            by_kind: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
            for question, answer in of_images[package][image]:
                by_kind[kind_of(answer)].append((question, answer))
            # Choose the kind first, so that each kind gets a third of the questions. The package has three yes-no
            # questions for each question of another kind.
            kind = chance.choice(sorted(by_kind))
            question, answer = chance.choice(by_kind[kind])
            rows.append(_row(split, package, image, question, answer))
        files[split] = rows
    return files


def _by_image(texts: Iterable[str], answers: Iterable[str], images: Iterable[int]) -> dict[int, list[tuple[str, str]]]:
    """Image → its questions with their answers."""
    questions: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for text, answer, image in zip(texts, answers, images, strict=True):
        questions[image].append((text, answer))
    return questions


def _row(split: str, package: str, image: int, question: str, answer: str) -> dict[str, Any]:
    row = {
        "id": f"vqa-{split}-{image}",
        "label": "visual",
        "kind": kind_of(answer),
        "prompt": f"<image> {question}",
        "images": [f"package:easy_vqa/data/{package}/images/{image}.png"],
        "answer": answer,
        "check": "exact",
    }
    return row | ({"response": answer} if split == "sft" else {})


def main() -> None:
    for name, rows in build().items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (FOLDER / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
