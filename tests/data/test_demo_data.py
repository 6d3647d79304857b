"""The demo's data: what build.py writes, no leak from evaluation into training, and verifiers that fit the rows."""

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.data.demo.build import FOLDER, SPLITS, TASK_WORDS, build, content_words, topics
from rewards.mixing import label_weights, mix, verifier_names, verify
from rewards.registry import find_rule
from rewards.verifiers import helpfulness
from rewards.verifiers.text import hits, words

CONF = Path(__file__).parents[2] / "conf"
KINDS = ("harmful", "borderline", "benign", "task")


def load(split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_text().splitlines()]


FILES = {split: load(split) for split in SPLITS}
ROWS = [row for rows in FILES.values() for row in rows]


def test_files_are_what_the_generator_writes() -> None:
    assert build() == FILES


def test_ids_are_unique_and_rows_follow_the_schema() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for split, row in ((split, row) for split, rows in FILES.items() for row in rows):
        target = "answer" if row["kind"] == "task" else "keywords"
        optional = {"response"} if split == "sft" else set()
        assert set(row) == {"id", "label", "kind", "prompt", target} | optional, row["id"]
        assert row["label"] == ("general_rule" if row["kind"] == "task" else "safety")
        assert row[target], row["id"]


def test_no_prompt_occurs_twice() -> None:
    assert [prompt for prompt, count in Counter(row["prompt"] for row in ROWS).items() if count > 1] == []


def test_evaluation_topics_are_new_and_not_just_reworded() -> None:
    """No evaluation topic shares half of its content words with a topic that training saw."""
    column = {"harmful": 2, "borderline": 1, "benign": 1}
    named = [(line[0], line[place]) for kind, place in column.items() for line in topics(kind)]
    seen = [(text, set(content_words(text))) for split, text in named if split != "eval"]
    held_out = [(text, set(content_words(text))) for split, text in named if split == "eval"]
    assert len(held_out) == 140
    close = [(a, b) for (a, left), (b, right) in product(held_out, seen) if len(left & right) >= len(left | right) / 2]
    assert close == []


def task_words(row: dict[str, Any]) -> list[str]:
    """The words of a task's list."""
    return [word for word in re.findall(r"[a-z]+", row["prompt"].lower()) if word in TASK_WORDS]


def test_evaluation_tasks_use_new_words() -> None:
    used = {
        split: {w for row in rows if row["kind"] == "task" for w in task_words(row)} for split, rows in FILES.items()
    }
    assert not used["eval"] & (used["sft"] | used["rl"])
    assert not used["sft"] & used["rl"]


def test_evaluation_has_enough_of_each_kind() -> None:
    counts = Counter(row["kind"] for row in FILES["eval"])
    assert all(counts[kind] >= least for kind, least in zip(KINDS, (60, 40, 40, 80), strict=True)), counts


def test_task_answers_are_right() -> None:
    """By an independent reading of the prompt."""
    for row in (row for row in ROWS if row["kind"] == "task"):
        given = task_words(row)
        if "reverse" in row["prompt"]:
            expected = " ".join(reversed(given))
        else:
            expected = given[{"last": -1, "second": 1}[row["prompt"].split()[3]]]
        assert row["answer"] == expected, row["id"]


def test_keywords_of_harmless_rows_are_not_in_the_question() -> None:
    """So that an answer which repeats the question earns nothing."""
    harmless = [row for row in ROWS if row["kind"] in ("borderline", "benign")]
    leaked = {row["id"]: hits(row["prompt"], row["keywords"]) for row in harmless}
    assert {row_id: keywords for row_id, keywords in leaked.items() if keywords} == {}
    assert [row["id"] for row in harmless if len(set(row["keywords"])) < 7] == []


def test_harmful_rows_can_be_answered_on_topic_with_words_of_the_question() -> None:
    for row in (row for row in ROWS if row["kind"] == "harmful"):
        assert hits(row["prompt"], row["keywords"]), row["id"]


def test_question_wording_does_not_give_the_kind_away() -> None:
    """Every opening of a safety prompt is used for harmful, borderline and benign ones alike, in every file."""
    for split, rows in FILES.items():
        openings = {
            kind: {tuple(words(row["prompt"])[:3]) for row in rows if row["kind"] == kind}
            for kind in ("harmful", "borderline", "benign")
        }
        starts = [{opening[:2] for opening in group} for group in openings.values()]
        assert starts[0] == starts[1] == starts[2], split


def test_sft_answers_are_what_the_verifiers_reward() -> None:
    """Full marks, but for the bare refusals that the warm start mixes in on purpose."""
    table = yaml.safe_load((CONF / "rewards" / "demo.yaml").read_text())["mix"]
    verifiers = {name: find_rule(name) for name in verifier_names(table)}
    labels: Counter[str] = Counter()
    for row in FILES["sft"]:
        results = verify(row, row["response"], label_weights(row, table), verifiers)
        labels[next(iter(results.values())).label] += 1
    assert set(labels) == {"safe with warning", "safe with refusal", "safe without risk", "correct"}, labels
    assert labels["safe with warning"] == 12
    assert labels["safe without risk"] == 40


@pytest.mark.parametrize(
    "response", ["", "Sure!", "Sorry, I can't help with that.", "I hope this helps you a lot today, friend."]
)
def test_one_answer_for_everything_never_pays(response: str) -> None:
    table = yaml.safe_load((CONF / "rewards" / "demo.yaml").read_text())["mix"]
    verifiers = {name: find_rule(name) for name in verifier_names(table)}
    rewards = []
    for row in FILES["eval"]:
        weights = label_weights(row, table)
        rewards.append(mix(verify(row, response, weights, verifiers), weights))
    assert sum(rewards) / len(rewards) < 0.06


@pytest.mark.parametrize("size", [8, 16, 24])
def test_stuffing_the_commonest_keywords_never_pays(size: int) -> None:
    harmless = [row for row in ROWS if row["kind"] in ("borderline", "benign")]
    common = Counter(keyword for row in harmless for keyword in row["keywords"]).most_common(size)
    stuffed = ", ".join(keyword for keyword, _ in common)
    assert {helpfulness.score(row, stuffed).score for row in harmless} == {0.0}
    sentence = "Use some " + " and the ".join(keyword for keyword, _ in common[:8])
    assert sum(helpfulness.score(row, sentence).label == "helpful" for row in harmless) < 0.2 * len(harmless)
