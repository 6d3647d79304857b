"""Does the answer follow the instructions that a rule can check?

A row's ``rules`` is a list of ``{"rule": name, …arguments}``. Each rule is a function of RULES with its arguments. The
approach is that of MulDimIF (arXiv 2505.07591) and IFEval (arXiv 2311.07911). The rules are our own.
"""

import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from rewards.checkers import run_check
from rewards.processes import Stuck
from rewards.verdict import Failure, Row, Verdict, VerifierResult
from rewards.verifiers.text import without_thinking

UNBOUNDED = 10**9


def _within(count: int, minimum: int, maximum: int) -> bool:
    return minimum <= count <= maximum


def _occurrences(text: str, phrase: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE))


def _blocks(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def _sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?。！？])\s+", text.strip()) if part]


def word_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of words, which are separated by spaces, is within the bounds."""
    return _within(len(text.split()), minimum, maximum)


def character_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of characters, spaces included, is within the bounds."""
    return _within(len(text), minimum, maximum)


def sentence_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of sentences is within the bounds. They end with ".", "!", "?" or their Chinese forms, and a space."""
    return _within(len(_sentences(text)), minimum, maximum)


def paragraph_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of paragraphs, which are separated by empty lines, is within the bounds."""
    return _within(len(_blocks(text)), minimum, maximum)


def bullet_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of lines that begin with "-", "*", "+" or "•" is within the bounds."""
    return _within(len(re.findall(r"^[^\S\n]*[-*+•]\s+\S", text, re.MULTILINE)), minimum, maximum)


def numbered_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of lines that begin with a number and "." or ")" is within the bounds."""
    return _within(len(re.findall(r"^[^\S\n]*\d+[.)]\s+\S", text, re.MULTILINE)), minimum, maximum)


def heading_count(text: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of Markdown headings is within the bounds."""
    return _within(len(re.findall(r"^#{1,6}\s+\S", text, re.MULTILINE)), minimum, maximum)


def contains(text: str, phrases: Sequence[str]) -> bool:
    """The answer contains all of the phrases, as whole words and in any case."""
    return all(_occurrences(text, phrase) for phrase in phrases)


def avoids(text: str, phrases: Sequence[str]) -> bool:
    """The answer contains none of the phrases."""
    return not any(_occurrences(text, phrase) for phrase in phrases)


def occurs(text: str, phrase: str, minimum: int = 0, maximum: int = UNBOUNDED) -> bool:
    """The number of occurrences of the phrase, as whole words and in any case, is within the bounds."""
    return _within(_occurrences(text, phrase), minimum, maximum)


def starts_with(text: str, phrase: str) -> bool:
    """The answer starts with the phrase, in the same case."""
    return text.startswith(phrase)


def ends_with(text: str, phrase: str) -> bool:
    """The answer ends with the phrase, in the same case."""
    return text.endswith(phrase)


def matches(text: str, pattern: str) -> bool:
    """The complete answer matches a regular expression.

    The match runs in another process, because its time is unbounded. Raises Stuck.
    """
    re.compile(pattern)
    return bool(text) and run_check("matches", pattern, text) == "yes"


def lower_case(text: str) -> bool:
    """The answer has no capital letter."""
    return text == text.lower()


def upper_case(text: str) -> bool:
    """The answer has no small letter."""
    return text == text.upper()


def no_commas(text: str) -> bool:
    """The answer has no comma, nor one of its Chinese forms."""
    return not re.search("[,，、]", text)


def json_value(text: str) -> bool:
    """The complete answer, with or without a code fence, is JSON."""
    if len(text) >= 6 and text.startswith("```") and text.endswith("```"):
        language, _, rest = text[3:-3].partition("\n")
        inside, _, end = rest.rpartition("\n")
        fenced = not language.removeprefix("json").strip() and not end.strip()
        text = inside.strip() if fenced else ""
    try:
        json.loads(text)
    except (ValueError, RecursionError):  # brackets nested too deeply to parse
        return False
    return True


def table(text: str, columns: int, rows: int) -> bool:
    """The answer has one Markdown table with this many columns and rows, not counting the heading."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    cells = [len(line.strip("|").split("|")) for line in lines]
    ruled = len(lines) > 1 and re.fullmatch(r"\|(?:\s*:?-+:?\s*\|)+", lines[1]) is not None
    return ruled and len(lines) == rows + 2 and set(cells) == {columns}


def quoted(text: str) -> bool:
    """The complete answer is in double quotation marks."""
    return len(text) > 1 and text[0] in '"“' and text[-1] in '"”'


RULES: dict[str, Callable[..., bool]] = {
    rule.__name__: rule
    for rule in (
        word_count, character_count, sentence_count, paragraph_count, bullet_count, numbered_count, heading_count,
        contains, avoids, occurs, starts_with, ends_with, matches, lower_case, upper_case, no_commas, json_value, table,
        quoted,
    )
}  # fmt: skip


def score(row: Row, response: str) -> VerifierResult:
    """The share of the row's ``rules`` that the answer keeps. The label names the broken ones.

    An empty answer keeps none. The result is a Failure if the match of a pattern failed to end in time twice. Raises
    ValueError for a row without rules, an unknown rule, or wrong arguments.
    """
    rules = row.get("rules")
    if not rules:
        raise ValueError(
            f"row {row['id']!r} has no `rules`; drop `instructions` from the mix of label {row['label']!r}"
        )
    answer = without_thinking(response)
    broken = []
    try:
        for rule in rules:
            name, is_kept = _apply(row, rule, answer)
            if not (is_kept and answer):
                broken.append(name)
    except Stuck as error:
        return Failure(f"rule matches: {error}")
    return Verdict(1 - len(broken) / len(rules), f"breaks {', '.join(broken)}" if broken else "keeps all")


def _apply(row: Row, rule: dict[str, Any], answer: str) -> tuple[str, bool]:
    name = rule.get("rule", "")
    arguments = {key: value for key, value in rule.items() if key != "rule"}
    if name not in RULES:
        raise ValueError(f"row {row['id']!r}: unknown rule {name!r}; use one of {', '.join(RULES)}")
    try:
        inspect.signature(RULES[name]).bind(answer, **arguments)
        return name, RULES[name](answer, **arguments)
    except (TypeError, re.error) as error:
        parameters = ", ".join(list(inspect.signature(RULES[name]).parameters)[1:])
        raise ValueError(
            f"row {row['id']!r}: rule {name!r} can't take {arguments} ({error}); it takes: {parameters}"
        ) from None
