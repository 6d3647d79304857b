"""Writes rl.jsonl: `python -m recipes.data.safework.build`. A stand-in, as SafeWork-R1's data is not published.

The demo's RL rows, and more of its tasks: enough for the recipes' 128 prompts a step without asking one twice. It shows
that a layout trains, not that a model gets safer: put your own files in its place (conf/data/safework.yaml).
"""

import itertools
import json
from pathlib import Path

from recipes.data.demo.build import build

FOLDER = Path(__file__).parent
MORE_TASKS = 64


def rows() -> list[dict[str, object]]:
    """The demo's rows, then lists of the same words in pairs."""
    demo = build()["rl"]
    words = sorted({word for row in demo if row["kind"] == "task" for word in row["answer"].split()})
    more = [
        {
            "id": f"safework-task-{n:03d}",
            "label": "general_rule",
            "kind": "task",
            "prompt": f"What is the first word of this list: {first}, {second}?",
            "answer": first,
        }
        for n, (first, second) in enumerate(itertools.islice(itertools.combinations(words, 2), MORE_TASKS))
    ]
    return [*demo, *more]


if __name__ == "__main__":
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
    (FOLDER / "rl.jsonl").write_text(text, encoding="utf-8")
