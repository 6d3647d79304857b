"""The ladder demo's data: what build.py writes, and answers as the verifiers want them.

tests/data/test_splits.py compares the splits.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from recipes.config import parse
from recipes.data.ladder import safety, tasks
from recipes.data.ladder.build import FOLDER, SPLITS, SUFFIXES, build
from recipes.data.rows import load_rows
from recipes.launch.requirements import check_parts
from rewards.mixing import label_weights, mix, verifier_names, verify
from rewards.registry import open_verifiers
from rewards.verdict import Verdict
from rewards.verifiers import rule_check
from rewards.verifiers import safety as safety_rule
from rewards.verifiers.helpfulness import HARMFUL
from rewards.verifiers.judges import written_label
from rewards.verifiers.templates import SAFETY
from rewards.verifiers.text import hits

CONF = Path(__file__).parents[2] / "conf"
FILES: dict[str, list[dict[str, Any]]] = {
    **{path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in FOLDER.glob("*.jsonl")},
    **{path.stem: [dict(row) for row in load_rows(str(path), ("id",))] for path in FOLDER.glob("*.parquet")},
}
ROWS = [row for name in SPLITS for row in FILES[name]]
KINDS = ("harmful", "jailbreak", "borderline", "benign", "value", "task")


@pytest.fixture(scope="module")
def config() -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse(compose("config", ["recipe=demo", "data=ladder", "rewards=ladder"]))


@pytest.fixture(scope="module")
def verifiers(config: Any) -> Any:
    return open_verifiers(verifier_names(config.rewards.mix), config.rewards, None)


def test_files_are_what_the_generator_writes() -> None:
    assert build() == FILES


def test_a_run_takes_the_files(config: Any) -> None:
    check_parts(config)


@pytest.mark.parametrize("data", ["ladder", "ladder_development"])
def test_the_held_out_prompts_are_those_of_the_data_s_name(data: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = parse(compose("config", ["recipe=ladder_demo", f"data={data}"]))
    split = "development" if data.endswith("development") else "test"
    assert config.data.evaluation == [f"recipes/data/{folder}/{split}.jsonl" for folder in ("ladder", "search")]


def test_there_is_enough_of_each_kind() -> None:
    counts = {
        "sft": (155, 155, 225, 225, 56, 120),
        "rl": (601, 601, 651, 344, 128, 220),
        "development": (120, 120, 135, 150, 36, 50),
        "test": (60, 60, 75, 75, 60, 80),
    }
    for name, of_kinds in counts.items():
        by_kind = Counter(row["kind"] for row in FILES[name])
        assert tuple(by_kind[kind] for kind in KINDS) == of_kinds, name
    pairs_and_judged = {
        side: (len(FILES[f"preference{suffix}"]), len(FILES[f"judge{suffix}"])) for side, suffix in SUFFIXES.items()
    }
    assert pairs_and_judged == {"training": (300, 1320), "development": (50, 180), "test": (100, 240)}
    for name in SPLITS:
        families = Counter(row["tags"][0] for row in FILES[name] if row["kind"] == "task")
        assert set(families) == {family.__name__ for family in tasks.FAMILIES}
        assert len(set(families.values())) == 1


def test_ids_are_unique() -> None:
    ids = [row["id"] for rows in FILES.values() for row in rows]
    assert len(set(ids)) == len(ids)


def test_no_prompt_occurs_twice() -> None:
    pairs = [row for suffix in SUFFIXES.values() for row in FILES[f"preference{suffix}"]]
    for rows in (ROWS, pairs):
        assert [prompt for prompt, n in Counter(row["prompt"] for row in rows).items() if n > 1] == []


LIST = re.compile(r"[A-Za-z]+(?:, [a-z]+)+")


def expected(row: dict[str, Any]) -> str:
    """A task's answer, by an independent reading of its prompt."""
    prompt = row["prompt"]
    numbers = [int(n) for n in re.findall(r"\d+", prompt)]
    listed = [word.lower() for word in (LIST.search(prompt) or ["it"])[0].split(", ")]
    quoted = re.search('"(.+)"', prompt)
    match row["tags"][0]:
        case "add":
            return str(sum(numbers))
        case "multiply":
            return str(numbers[0] * numbers[1] + numbers[2])
        case "larger":
            return str(max(numbers))
        case "parity":
            return ["even", "odd"][numbers[0] % 2]
        case "sort":
            return ", ".join(map(str, sorted(numbers)))
        case "letter":
            assert quoted is not None
            return quoted[1][-1]
        case "count":
            return str(len(listed))
        case "last":
            return listed[-1]
        case "reverse":
            return ", ".join(listed[::-1])
    name = next(name for name in tasks.CATEGORIES if re.search(rf"\b{name}\b", prompt))
    (letter,) = [m[0] for m in re.findall(r"([ABC]): (\w+)", prompt) if m[1] in tasks.CATEGORIES[name].split()]
    return letter


def test_task_answers_are_right_and_the_checks_read_them() -> None:
    rows = [row for row in ROWS if row["kind"] == "task"]
    assert [(row["id"], row["answer"]) for row in rows] == [(row["id"], expected(row)) for row in rows]
    for row in (row for row in ROWS if row["kind"] in ("task", "value")):
        right = "Answer: " + row["answer"] if row["check"] == "choice" else row["answer"]
        assert rule_check.score(row, f"<think>x</think>\n{right}").score == 1, row["id"]
        assert rule_check.score(row, "<think>x</think>\nAnswer: Z").score == 0, row["id"]


def test_rl_meets_each_family_of_tasks_in_many_wordings() -> None:
    """Otherwise the policy learns the wordings, and its accuracy on others does not rise (docs/stages.md)."""
    for family in tasks.FAMILIES:
        name = family.__name__
        counts = {split: len(set(tasks.wordings(name, split))) for split in SPLITS}
        assert counts == {"sft": 2, "rl": 10, "development": 4, "test": 4}
        in_training, in_development, in_test = (set(tasks.wordings(name, split)) for split in SPLITS[1:])
        assert not (in_training & in_development | in_training & in_test | in_development & in_test)


def test_no_category_has_anothers_word() -> None:
    words = [word for members in tasks.CATEGORIES.values() for word in members.split()]
    assert len(set(words)) == len(words)


def test_harmless_rows_do_not_say_their_keywords_and_have_enough() -> None:
    harmless = [row for row in ROWS if row["kind"] in ("borderline", "benign")]
    left = {row["id"]: set(row["keywords"]) - set(hits(row["prompt"], row["keywords"])) for row in harmless}
    assert {row_id: keywords for row_id, keywords in left.items() if len(keywords) < 6} == {}


def test_sft_responses_are_well_formed_and_right(verifiers: Any, config: Any) -> None:
    labels: Counter[str] = Counter()
    for row in FILES["sft"]:
        weights = label_weights(row, config.rewards.mix)
        results = verify(row, row["response"], weights, verifiers)
        row_labels = {result.label for result in results.values() if isinstance(result, Verdict)}
        assert "well-formed" in row_labels, row["id"]
        labels.update(row_labels - {"well-formed"})
        assert mix(results, weights) == 2.0, row["id"]
    assert labels == {"safe with warning": 310, "safe without risk": 450, "correct": 176}


def test_half_of_the_thinking_is_verbose_and_says_no_more() -> None:
    for kind in KINDS:
        lengths: dict[str, list[int]] = {"terse": [], "verbose": []}
        for row in (row for row in FILES["sft"] if row["kind"] == kind):
            thinking = row["response"].removeprefix("<think>").split("</think>")[0]
            lengths[row["tags"][-1]].append(len(thinking.split()))
            assert len(row["response"].split()) <= 48
        assert 0 <= len(lengths["terse"]) - len(lengths["verbose"]) <= 1
        assert sum(lengths["verbose"]) > 1.5 * sum(lengths["terse"]), kind


@pytest.mark.parametrize("answer", ["", "Sure!", "Sorry, I can't help with that.", "It is wrong.", "Answer: A"])
def test_one_answer_for_everything_never_pays(answer: str, verifiers: Any, config: Any) -> None:
    for kind in KINDS:
        rows = [row for row in FILES["test"] if row["kind"] == kind]
        scores = []
        for row in rows:
            names = set(label_weights(row, config.rewards.mix)) - {"format"}
            results = verify(row, f"<think>x</think>\n{answer}", names, verifiers)
            scores += [result.score for result in results.values() if isinstance(result, Verdict)]
        assert sum(scores) / len(scores) <= (0.25 if kind == "value" else 0.11), kind


def test_safety_reads_the_answer_and_not_the_thinking() -> None:
    row = next(row for row in FILES["test"] if row["kind"] == "jailbreak")
    refusal = "I can't help you with that plan, because it is a crime, harms people and ends in prison."
    compliance = "Sure, here is what I would do about it in the next days and weeks."
    assert safety_rule.score(row, f"<think>{compliance}</think>\n{refusal}").label in (
        "safe with refusal",
        "safe with warning",
    )
    assert safety_rule.score(row, f"<think>{refusal}</think>\n{compliance}").label == "unsafe"
    assert safety_rule.score(row, f"<think>{refusal}").label == "illogical completion"


def test_preferred_answers_are_what_the_rules_prefer() -> None:
    """Kinds and scores, by the rule on the same prompt."""
    keywords = {}
    for splits in safety.SIDES.values():
        for kind in ("harmful", "jailbreak", "borderline", "benign"):
            keywords |= {prompt: list(topic.keywords) for topic, prompt in safety.asked(kind, splits)}
    for row in (row for suffix in SUFFIXES.values() for row in FILES[f"preference{suffix}"]):
        assert row["chosen"] != row["rejected"]
        if row["kind"] == "value":
            assert rule_check.score(value_row(row), row["chosen"]).score == 1
            assert rule_check.score(value_row(row), row["rejected"]).score == 0
            continue
        judged = row | {"keywords": keywords[row["prompt"]]}
        assert safety_rule.score(judged, row["chosen"]).score == 1, row["id"]
        assert safety_rule.score(judged, row["rejected"]).score <= 0.1, row["id"]


def value_row(row: dict[str, Any]) -> dict[str, Any]:
    return next(other for other in ROWS if other["prompt"] == row["prompt"])


def test_preference_pairs_of_each_value_form_occur() -> None:
    for name in ("preference", "preference_test"):
        chosen = Counter(row["chosen"] for row in FILES[name] if row["kind"] == "value")
        assert set(chosen) == {"It is right.", "It is wrong.", "Answer: A", "Answer: B"}
        assert max(chosen.values()) <= 2 * min(chosen.values())


def test_judge_rows_have_the_templates_labels_and_the_rule_agrees() -> None:
    """But for nonsense after a harmful request, which is unsafe for the rule, as is all that does not decline."""
    counts = {
        "judge": dict.fromkeys(SAFETY.labels, 132)
        | {"safe with warning": 330, "unsafe": 264, "unnecessary refusal": 330},
        "judge_development": dict.fromkeys(SAFETY.labels, 30),
        "judge_test": dict.fromkeys(SAFETY.labels, 40),
    }
    for name, of_labels in counts.items():
        assert Counter(row["label"] for row in FILES[name]) == of_labels
        for row in FILES[name]:
            is_nonsense = row["kind"] in HARMFUL and row["label"] == "illogical completion"
            label = "unsafe" if is_nonsense else row["label"]
            assert safety_rule.score(row | {"prompt": row["question"]}, row["answer"]).label == label, row["id"]
            written = f"{row['reason']}\nLabel: {row['label']}"
            assert written_label({"message": {"content": written}}, SAFETY.labels) == Verdict(
                SAFETY.labels[row["label"]], row["label"], written
            )


def test_both_sides_of_the_line_are_labelled() -> None:
    """Each kind of row appears, and jailbreaks are asked with the strict prompt."""
    row = next(row for row in FILES["judge"] if row["kind"] == "jailbreak")
    body = SAFETY.request(row | {"prompt": row["question"]}, row["answer"], "judge").body
    assert "tries to trick the assistant" in body["messages"][0]["content"]
    assert {row["kind"] for row in FILES["judge"]} == {*HARMFUL, "borderline", "benign"}
