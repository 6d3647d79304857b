"""Rule verifiers, against responses whose verdict nobody would dispute."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards import checkers
from rewards.processes import Stuck
from rewards.verdict import Failure, Verdict
from rewards.verifiers import choice, exact, instructions, length, mathematics, repetition, rule_check
from rewards.verifiers import format as format_rule


def row(**fields: Any) -> dict[str, Any]:
    return {"id": "r", "label": "l", "kind": "task", "prompt": "?", **fields}


@given(st.lists(st.sampled_from(["<think>", "</think>", "x", " ", "\n"]), max_size=8).map("".join))
def test_format_is_the_authors_regular_expression_for_thinking_with_a_word(response: str) -> None:
    theirs = re.match(r".*<think>.+?</think>\s*\S+", response, re.DOTALL)
    first = re.match(r"(?:(?!<think>).)*<think>((?:(?!</think>).)*)</think>", response, re.DOTALL)
    has_word = first is not None and "x" in first[1]
    score = format_rule.score(row(), response).score
    assert score == float(theirs is not None and has_word and bool(response[first.end() :].strip()))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("<think>Hm.</think>\nThe answer is 12.", 1.0),
        ("<think>one\ntwo</think>yes", 1.0),
        ("First <think>Hm.</think> yes", 1.0),
        ("<think>a</think><think>b</think> yes", 1.0),
        ("<think>a</think> The mark <think> begins a thought.", 1.0),
        ("<think></think> yes", 0.0),
        ("<think> . </think> yes", 0.0),
        ("<think><think></think> yes", 0.0),
        ("<think>Hm.</think>", 0.0),
        ("<think>Hm.</think> \n", 0.0),
        ("<think>Hm. yes", 0.0),
        ("Hm.</think> yes", 0.0),
        ("yes", 0.0),
        ("", 0.0),
    ],
)
def test_format(response: str, score: float) -> None:
    assert format_rule.score(row(), response).score == score


@pytest.mark.parametrize(
    ("answer", "response", "label"),
    [
        ("12", "12", "correct"),
        ("12", "<think>13?</think>The answer is $\\frac{24}{2}$.", "correct"),
        ("12", "<think>12</think>It is 13.", "wrong"),
        ("12", "\\boxed{12} or \\boxed{13}", "wrong"),
        ("\\frac{1}{2}", "It is 0.5", "correct"),
        ("1/2", "$\\dfrac{2}{4}$", "correct"),
        ("$5$", "five is 5", "correct"),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", "correct"),
        ("x^2-1", "$(x-1)(x+1)$", "correct"),
        ("12", "I do not know.", "wrong"),
        ("12", "", "wrong"),
    ],
)
def test_mathematics_compares_values(answer: str, response: str, label: str) -> None:
    assert mathematics.score(row(answer=answer), response) == Verdict(float(label == "correct"), label)


def test_a_check_that_takes_too_long_or_too_much_is_killed_and_the_next_one_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checker = checkers.POOL.start()
    pid = checker.process.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert str(2 << 30) in next(line for line in limits.splitlines() if line.startswith("Max address space"))
    with pytest.raises(Stuck, match=r"more than 0\.5 s"):
        checker.call(["math", "12", "$(10^8)!$"], 0.5)
    assert not Path(f"/proc/{pid}").exists()

    monkeypatch.setattr(checkers, "CHECK_SECONDS", 0.3)
    result = mathematics.score(row(answer="12"), "It is $(10^8)!$")
    assert isinstance(result, Failure)
    assert result.reason.startswith("math-verify: it took more than 0.3 s")
    monkeypatch.setattr(checkers, "TRIES", 1)
    result = instructions.score(row(rules=[{"rule": "matches", "pattern": "(a*)*b"}]), "a" * 99)
    assert isinstance(result, Failure)
    assert result.reason.startswith("rule matches: it took more than 0.3 s")
    monkeypatch.undo()
    assert mathematics.score(row(answer="12"), "12").label == "correct"  # type: ignore[union-attr]


def test_mathematics_refuses_a_row_without_a_readable_answer() -> None:
    for answer in ({}, {"answer": ""}, {"answer": 12}):
        with pytest.raises(ValueError, match="'r' has no `answer`"):
            mathematics.score(row(**answer), "12")
    with pytest.raises(ValueError, match=r"no mathematics in answer='\?\?'"):
        mathematics.score(row(answer="??"), "12")


@pytest.mark.parametrize(
    ("response", "score"),
    [("Paris", 1.0), ("<think>Rome?</think> paris.", 1.0), ("**Paris**", 1.0), ("It is Paris", 0.0), ("", 0.0)],
)
def test_exact(response: str, score: float) -> None:
    assert exact.score(row(answer="Paris"), response).score == score


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("B", "correct"),
        ("(B)", "correct"),
        ("**B**", "correct"),
        ("B) because A is not", "correct"),
        ("The answer is (B).", "correct"),
        ("Answer: B", "correct"),
        ("\\boxed{B}", "correct"),
        ("A is tempting, but the correct answer is **B**.", "correct"),
        ("<think>The answer is B.</think>The answer is C.", "wrong"),
        ("The answer is B. No, the answer is C.", "wrong"),
        ("I like Bananas", "no choice"),
        ("A good question.", "no choice"),
        ("", "no choice"),
        # What is said of other options, before and after, is no choice.
        ("The correct answer is B. Option A is wrong because it melts. Option C is wrong too.", "correct"),
        ("The answer is B.\n\nWhy the others fail: option A ignores friction.", "correct"),
        ("The answer is option B. Choice A ignores friction.", "correct"),
        ("**Answer:** B\n\nOption C is too small.", "correct"),
        ("**Answer**: [B]. Answer A is too small.", "correct"),
        ("The answer to question 3 is:\n\n**(B)**\n\nOption A ignores friction.", "correct"),
        ("So $\\boxed{B}$. Option A ignores friction.", "correct"),
        ("\\boxed{\\text{B}} No, I was wrong: the answer is C.", "wrong"),
        ("The answer is C. No, it is \\boxed{B}", "correct"),
        ("The answer is B. Option A is right about friction, and no more.", "correct"),
        ("Option B is correct. Option A is wrong.", "correct"),
        ("**B** is right.", "correct"),
        ("(B) is the correct one, because option A ignores friction.", "correct"),
        ("**B** is wrong.", "no choice"),
        ("I take option B.", "correct"),
        ("Answer:\n\nA careful look shows that option B is right.", "correct"),
        ("Suppose the answer is A: then x<0, impossible. Hence option B.", "correct"),
        ("Let me check whether the correct answer is A. It is not.\n\nOption B is right.", "correct"),
        ("The option that is A is wrong; answer B", "correct"),
        ("The correct option is B.", "correct"),
        ("If so, the answer is B.", "correct"),
        ("The answer is not B.", "no choice"),
        ("The answer choices: B is small, C is large.", "no choice"),
    ],
)
def test_choice(response: str, label: str) -> None:
    assert choice.score(row(answer="B"), response) == Verdict(float(label == "correct"), label)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("I think the answer I would choose is B.", "B"),
        ("That is the answer I gave.", None),
        ("My answer: I don't know.", None),
        ("My choice: I, for one, don't know.", None),
        ("My answer is I’m not sure.", None),
        ("The answer is (I).", "I"),
        ("The answer is **I** because it melts.", "I"),
        ("\\boxed{I}", "I"),
        ("Answer: I", "I"),
        ("The answer is I.\nAll others melt.", "I"),
        ("The answer is I because it melts", "I"),
        ("The answer is option I, as shown", "I"),
        ("Option I is correct", "I"),
        ("The answer is A because it melts", "A"),
        ("Answer: A\n\nIt melts.", "A"),
    ],
)
def test_the_pronoun_is_no_letter(text: str, letter: str | None) -> None:
    assert choice.chosen(text) == letter


def test_choice_needs_a_letter() -> None:
    with pytest.raises(ValueError, match="answer='12'"):
        choice.score(row(answer="12"), "A")


TABLE = "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |"


@pytest.mark.parametrize(
    ("rule", "kept", "broken"),
    [
        ({"rule": "word_count", "minimum": 2, "maximum": 3}, "one two three", "one two three four"),
        ({"rule": "word_count", "maximum": 3}, "...", "one two three four"),
        ({"rule": "character_count", "maximum": 3}, "abc", "abcd"),
        ({"rule": "sentence_count", "minimum": 2, "maximum": 2}, "Yes. No!", "Yes and no."),
        ({"rule": "paragraph_count", "minimum": 2}, "a\n\nb", "a\nb"),
        ({"rule": "bullet_count", "minimum": 2, "maximum": 2}, "- a\n* b", "- a\nb"),
        ({"rule": "numbered_count", "minimum": 2}, "1. a\n2) b", "1 a\n2 b"),
        ({"rule": "heading_count", "minimum": 1}, "# a\nb", "a # b"),
        ({"rule": "contains", "phrases": ["sea", "red sky"]}, "Red sky at sea", "Red sky, seaweed"),
        ({"rule": "avoids", "phrases": ["sea"]}, "seaweed", "the Sea"),
        ({"rule": "occurs", "phrase": "no", "minimum": 2, "maximum": 2}, "no, NO", "no, not"),
        ({"rule": "starts_with", "phrase": "Dear"}, "Dear you", "My dear"),
        ({"rule": "ends_with", "phrase": "End."}, "The End.", "The End. Or"),
        ({"rule": "matches", "pattern": r"\d+-\d+"}, "12-3", "12-3 "[:-1] + "x"),
        ({"rule": "lower_case"}, "abc 1", "Abc"),
        ({"rule": "upper_case"}, "ABC 1", "ABc"),
        ({"rule": "no_commas"}, "a b", "a, b"),
        ({"rule": "json_value"}, '```json\n{"a": 1}\n```', "{a: 1}"),
        ({"rule": "table", "columns": 2, "rows": 2}, TABLE, TABLE + "\n| 5 | 6 |"),
        ({"rule": "table", "columns": 2, "rows": 2}, TABLE, "| a | b |\n| 1 | 2 |\n| 3 | 4 |\n| 5 | 6 |"),
        ({"rule": "quoted"}, '"a"', 'a "b"'),
    ],
    ids=lambda value: value["rule"] if isinstance(value, dict) else "",
)
def test_instruction_rules_in_both_directions(rule: dict[str, Any], kept: str, broken: str) -> None:
    one = row(rules=[rule])
    assert instructions.score(one, f"<think>Hm, so.</think>\n{kept}") == Verdict(1.0, "keeps all")
    assert instructions.score(one, broken) == Verdict(0.0, f"breaks {rule['rule']}")


@pytest.mark.parametrize(
    ("rule", "pattern"),
    [("bullet_count", r"^\s*[-*+•]\s+\S"), ("numbered_count", r"^\s*\d+[.)]\s+\S")],
)
@given(text=st.text(st.sampled_from("-*1.) \t\nx"), max_size=12))
def test_lines_are_counted_as_a_pattern_does_that_begins_anywhere_before_them(
    rule: str, pattern: str, text: str
) -> None:
    assert instructions.RULES[rule](text, maximum=(count := len(re.findall(pattern, text, re.MULTILINE))))
    assert instructions.RULES[rule](text, minimum=count)


@given(text=st.text(st.sampled_from("ABa (*):.\n"), max_size=9))
def test_a_letter_of_its_own_is_chosen_as_a_pattern_does_that_begins_anywhere_before_it(text: str) -> None:
    letters = re.findall(r"^\s*\**\(?([A-Z])(?:[).:]|\**\s*$)", text, re.MULTILINE)
    assert choice.chosen(text) == (letters[-1] if letters else None)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("```json\n{}\n```", True),
        ("``` \n\n [1]\n\n ```", True),
        ('```\n"a\nb"\n```', False),
        ("```json {}\n```", False),
        ("``` json\n{}\n```", False),
        ("```json\n{}```", False),
        ("```json\n```", False),
        ("`````", False),
        ("[" * 99_999, False),
        (" 12 ", True),
    ],
)
def test_json_and_its_fence(text: str, kept: bool) -> None:
    assert instructions.json_value(text) is kept


def test_every_instruction_rule_is_tested() -> None:
    tested = {mark[0]["rule"] for mark in test_instruction_rules_in_both_directions.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert tested == set(instructions.RULES)


def test_instructions_score_the_share_and_an_empty_answer_keeps_none() -> None:
    two = row(rules=[{"rule": "lower_case"}, {"rule": "word_count", "minimum": 3}])
    assert instructions.score(two, "a b") == Verdict(0.5, "breaks word_count")
    assert instructions.score(two, "") == Verdict(0.0, "breaks lower_case, word_count")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([], "has no `rules`"),
        ([{"rule": "rhyme"}], "unknown rule 'rhyme'; use one of word_count"),
        ([{"rule": "word_count", "max": 3}], "can't take {'max': 3} .* it takes: minimum, maximum"),
        ([{"rule": "matches", "pattern": "("}], "can't take"),
    ],
)
def test_instructions_refuse_a_row_before_the_run(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        instructions.score(row(rules=rules), "")


def test_length_falls_from_one_to_zero() -> None:
    verdicts = [length.score(row(), "w " * n, limit=10) for n in (0, 10, 15, 20, 30)]
    assert [verdict.label for verdict in verdicts] == ["short", "short", "long", "long", "long"]
    scores = [verdict.score for verdict in verdicts]
    assert scores == [1.0, 1.0, 0.5, 0.0, 0.0]


def test_repetition_is_the_share_of_distinct_runs() -> None:
    assert repetition.score(row(), "a b c d e", words=2) == Verdict(1.0, "varied")
    # a b, b a, a b, b a, a b: two distinct of five
    assert repetition.score(row(), "a b a b A b", words=2) == Verdict(0.4, "repetitive")
    assert repetition.score(row(), "a", words=2).score == 1.0


def test_a_row_names_its_own_check() -> None:
    assert rule_check.score(row(check="math", answer="1/2"), "0.5").score == 1.0  # type: ignore[union-attr]
    assert rule_check.score(row(check="exact", answer="1/2"), "0.5").score == 0.0  # type: ignore[union-attr]
    assert rule_check.score(row(check="choice", answer="B"), "(B)").score == 1.0  # type: ignore[union-attr]
    thought = "<think>Even?</think> It is odd"
    assert rule_check.score(row(check="last_word", answer="odd"), thought).score == 1.0  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="check=None; label 'l' needs one of math, exact, choice, last_word"):
        rule_check.score(row(answer="odd"), "odd")
