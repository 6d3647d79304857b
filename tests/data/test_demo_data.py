"""The demo's data: what build.py writes, and verifiers that fit it. tests/data/test_splits.py compares the splits."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir

from recipes.config import parse
from recipes.data.demo.build import (
    FOLDER,
    KINDS,
    OVERCAUTIOUS,
    OVERCAUTIOUS_RESPONSES,
    SPLITS,
    TASK_WORDS,
    build,
    safety_row,
    topics,
)
from recipes.launch.requirements import check_parts
from rewards.mixing import label_weights, mix, verifier_names, verify
from rewards.registry import find_rule
from rewards.verifiers import helpfulness, safety
from rewards.verifiers.text import hits, is_degenerate, words

CONF = Path(__file__).parents[2] / "conf"
NAMES = (*SPLITS, "outside")
FILES: dict[str, list[dict[str, Any]]] = {
    name: [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()] for name in NAMES
}
ROWS = [row for rows in FILES.values() for row in rows]
TOPICS = [topic for kind in KINDS for topic in topics(kind)]


def test_files_are_what_the_generator_writes() -> None:
    assert build() == FILES


@pytest.mark.parametrize("data", ["demo", "demo_development"])
def test_a_run_takes_the_files(data: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(compose("config", ["recipe=demo", f"data={data}"]))
    check_parts(config)
    assert ("test.jsonl" in str(config.data.evaluation)) == (data == "demo")


def test_ids_are_unique_and_rows_follow_the_schema() -> None:
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for split in SPLITS:
        for row in FILES[split]:
            fields = {"answer", "tags"} if row["kind"] == "task" else {"keywords"}
            optional = {"response"} if split == "sft" else set()
            assert set(row) == {"id", "label", "kind", "prompt"} | fields | optional, row["id"]
            assert row["label"] == {"task": "general_rule", "harmful": "safety"}.get(row["kind"], "harmless")
    assert {tuple(row) for row in FILES["outside"]} == {("id", "label", "kind", "prompt")}


def test_no_prompt_occurs_twice() -> None:
    assert [prompt for prompt, count in Counter(row["prompt"] for row in ROWS).items() if count > 1] == []


@pytest.mark.parametrize(
    ("split", "least"),
    [
        ("sft", (54, 150, 150, 96)),
        ("rl", (702, 434, 229, 192)),
        ("development", (120, 90, 100, 90)),
        ("test", (60, 50, 50, 192)),
    ],
)
def test_there_is_enough_of_each_kind(split: str, least: tuple[int, ...]) -> None:
    counts = Counter(row["kind"] for row in FILES[split])
    assert tuple(counts[kind] for kind in (*KINDS, "task")) == least


def test_no_frequent_beginning_tells_a_harmful_prompt_of_rl() -> None:
    """Otherwise RL refuses the wording and goes on answering the same requests in other words (docs/stages.md)."""
    beginnings: dict[str, Counter[str]] = {}
    for label in ("safety", "harmless"):
        prompts = [row["prompt"].lower().split() for row in FILES["rl"] if row["label"] == label]
        beginnings[label] = Counter(" ".join(prompt[:2]) for prompt in prompts)
    harmful, harmless = (counts.total() for counts in beginnings.values())
    for beginning, count in beginnings["safety"].items():
        share = count / harmful
        if share >= 0.05:
            assert beginnings["harmless"][beginning] / harmless >= share / 2, beginning


def test_outside_prompts_are_thirty_of_each_kind() -> None:
    assert Counter(row["kind"] for row in FILES["outside"]) == {f"outside_{kind}": 30 for kind in KINDS}


def task_words(row: dict[str, Any]) -> list[str]:
    """The words of a task's list: the first three in a row, parted by commas."""
    match = re.search(r"([A-Za-z]+), ([a-z]+), ([a-z]+)", row["prompt"])
    assert match is not None, row["prompt"]
    return [word.lower() for word in match.groups()]


def test_every_split_has_its_own_words_of_tasks_and_each_side_its_own_wordings() -> None:
    """No wording of development or test is in training, which is sft and rl."""
    used = []
    wordings_of_sides: dict[str, set[str]] = {}
    for split in SPLITS:
        tasks = [row for row in FILES[split] if row["kind"] == "task"]
        used.append({word for row in tasks for word in task_words(row)})
        assert used[-1] <= set(TASK_WORDS)
        wordings = {re.sub(r"[A-Za-z]+, [a-z]+, [a-z]+", "…", row["prompt"]) for row in tasks}
        assert len(wordings) == 3 * {"sft": 8, "rl": 38, "development": 4, "test": 4}[split]
        wordings_of_sides.setdefault("training" if split in ("sft", "rl") else split, set()).update(wordings)
    assert sum(map(len, used)) == len(set().union(*used))
    assert [len(wordings) for wordings in wordings_of_sides.values()] == [114, 12, 12]
    assert len(set().union(*wordings_of_sides.values())) == 138


def test_task_answers_are_right_and_neither_a_list_nor_an_echo_is() -> None:
    """By an independent reading of the prompt."""
    capability = find_rule("capability")
    for row in (row for row in ROWS if row["kind"] == "task"):
        first, second, third = task_words(row)
        expected = {"first": first, "second": second, "last": third}[row["tags"][0]]
        assert row["answer"] == expected, row["id"]
        for wrong in (f"{first}, {second}, {third}", row["prompt"], f"The list is {first}, {second}, {third}."):
            assert capability(row, wrong).score == 0, row["id"]  # type: ignore[union-attr]


def test_keywords_are_stems_that_the_prompt_does_not_have() -> None:
    """So that an answer which repeats the question earns nothing."""
    for topic in TOPICS:
        assert all(re.fullmatch("[a-z]{3,}", keyword) for keyword in topic.keywords), topic
        assert hits(topic.prompt, topic.keywords) == [], topic
        assert len(set(topic.keywords)) == len(topic.keywords) >= (3 if topic.kind == "harmful" else 7), topic


def test_words_of_any_refusal_are_no_keywords_of_harm() -> None:
    general = {
        "illegal",
        "crime",
        "crimin",
        "law",
        "wrong",
        "harm",
        "hurt",
        "danger",
        "bad",
        "people",
        "help",
        "request",
    }
    assert [topic for topic in topics("harmful") if general & set(topic.keywords)] == []


def test_honest_answers_are_what_the_verifiers_reward() -> None:
    """Full marks, in sentences and few tokens, for every prompt of every split."""
    for topic in TOPICS:
        row = {"id": topic.prompt, **safety_row(topic)}
        wanted = "safe with warning" if topic.kind == "harmful" else "safe without risk"
        assert safety.score(row, topic.response).label == wanted, topic
        assert not is_degenerate(topic.response, 7) and len(topic.response.split()) <= 24, topic
        if topic.kind != "harmful":
            assert helpfulness.score(row, topic.response).label == "helpful"


def test_an_honest_answer_to_another_prompt_earns_next_to_nothing() -> None:
    for kind in KINDS:
        of_kind = topics(kind)
        rows = [{"id": topic.prompt, **safety_row(topic)} for topic in of_kind]
        scores = [
            safety.score(row, other.response).score
            for number, row in enumerate(rows)
            for other in of_kind[number % 17 :: 17]
            if other.prompt != row["prompt"]
        ]
        assert sum(scores) / len(scores) < (0.1 if kind == "harmful" else 0.03), kind


def test_the_wording_does_not_give_the_kind_away() -> None:
    """No opening of two words is used in training five times for harmful prompts alone, or for harmless ones alone."""
    openings: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for row in (row for split in ("sft", "rl") for row in FILES[split] if row["kind"] in KINDS):
        openings[row["kind"] == "harmful"][" ".join(words(row["prompt"])[:2])] += 1
    for one, other in ((True, False), (False, True)):
        assert [
            opening for opening, count in openings[one].items() if count >= 5 and not openings[other][opening]
        ] == []


def is_overcautious(row: dict[str, Any]) -> bool:
    return row["kind"] != "harmful" and row["response"] in OVERCAUTIOUS_RESPONSES


def test_the_warm_start_refuses_some_borderline_prompts_without_a_reason() -> None:
    overcautious = [row for row in FILES["sft"] if is_overcautious(row)]
    assert [row["kind"] for row in overcautious] == ["borderline"] * OVERCAUTIOUS
    refusal = find_rule("refusal")
    assert {refusal(row, row["response"]).label for row in overcautious} == {"refused"}  # type: ignore[union-attr]
    assert {safety.score(row, row["response"]).label for row in overcautious} == {"unnecessary refusal"}


def test_other_warm_start_responses_are_honest_answers_or_their_beginnings() -> None:
    """Every second one is complete and has full marks; a beginning decides as the complete answer does."""
    table = yaml.safe_load((CONF / "rewards" / "demo.yaml").read_text())["mix"]
    verifiers = {name: find_rule(name) for name in verifier_names(table)}
    refusal = find_rule("refusal")
    complete = {topic.prompt: topic.response for topic in TOPICS}
    whole = []
    shown = [row for row in FILES["sft"] if not is_overcautious(row)]
    for row in shown:
        weights = label_weights(row, table)
        reward = mix(verify(row, row["response"], weights, verifiers), weights)
        if row["kind"] == "task" or row["response"].endswith(complete[row["prompt"]]):
            assert reward == 1.0, row["id"]
            whole.append(row)
            continue
        beginning = row["response"].removeprefix("Sure. ").rstrip(".")
        assert complete[row["prompt"]].startswith(beginning), row["id"]
        assert refusal(row, row["response"]).label == ("refused" if row["kind"] == "harmful" else "not refused")  # type: ignore[union-attr]
        assert safety.score(row, row["response"]).label != "unsafe"
    counts = Counter(row["kind"] for row in whole)
    # A harmful topic whose answer is one sentence, or a short one without a comma, is complete out of turn.
    assert all(count >= len([row for row in shown if row["kind"] == kind]) // 2 for kind, count in counts.items())
    assert all(row["response"].startswith("Sure. ") == (row["label"] == "harmless") for row in shown)


@pytest.mark.parametrize("size", [8, 16, 24])
def test_stuffing_the_commonest_keywords_never_pays(size: int) -> None:
    harmless = [row for row in ROWS if row["kind"] in ("borderline", "benign")]
    common = Counter(keyword for row in harmless for keyword in row["keywords"]).most_common(size)
    stuffed = ", ".join(keyword for keyword, _ in common)
    assert {helpfulness.score(row, stuffed).score for row in harmless} == {0.0}
    sentence = "Use some " + " and the ".join(keyword for keyword, _ in common[:8])
    assert sum(helpfulness.score(row, sentence).label == "helpful" for row in harmless) < 0.2 * len(harmless)
