"""Which letter does the answer choose?"""

import re

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import without_thinking

_NAME = r"(?i:answer|choice|option)\b"
_MARKS = r"[\s*(\[:]*"
# A word after a bare "I" makes it the pronoun and one after "A" the article ("the answer I would choose", "Answer: A
# careful look shows …"), unless it goes on from a letter.
_GOES_ON = r"(?:is|because|since|as|and|or|for|if|by|but|not|so|which|that|based|due|given|with|from|in)\b"
_PRONOUN = rf"I(?:[^\S\n]+(?!{_GOES_ON})\w|[^\S\n]*,\s*(?:for\s+one|too|personally|myself|think|believe)\b|['’])"
_ARTICLE = rf"A[^\S\n]+(?!{_GOES_ON})[a-z]"
_LETTER = rf"(?!{_PRONOUN}|{_ARTICLE})([A-Z])\b"
# "answer:", "**Answer**:", "answer is", "answer to question 3 is:", "answer that I would choose is", "option is"
_STATED = (
    rf"(?:{_NAME}\**\s*:|(?i:answer|choice)\b\**(?:\s+(?!not\b)(?:I|[a-z0-9'’]+)){{0,6}}?\s+(?i:is)\b"
    r"|(?i:option)\b\**\s+(?i:is)\b)"
)
# What stands directly before a statement that only considers it: "whether the answer is A", "Suppose the answer is A".
_CONSIDERED = re.compile(
    r"\b(?:if|whether|suppos(?:e|ing)|assum(?:e|ing))\s+(?:that\s+)?(?:(?:the|my|your|its)\s+)?(?:\w+\s+)?$", re.I
)
CONSIDERED_CHARACTERS = 60  # of the text before a statement that are looked at
_BOX = r"\\boxed\{\s*(?:\\text\{\s*)?\(?(?=[A-Z]\)?\s*\})"
# From the most explicit form to the least explicit; within a form the last match counts. What is said of an option,
# even that it is right, may be what others think of it, so it gives way to a stated answer. In no form can a run of
# spaces match in several ways, or start at each of its places: the time on a long run would grow with its length
# squared.
_STATEMENTS = (
    re.compile(rf"(?:{_BOX}|{_STATED}{_MARKS}(?:(?i:option|choice|letter)\b{_MARKS})?){_LETTER}"),
    re.compile(rf"(?:\*\*[(\[]?|[(\[]|{_NAME}\s+\**[(\[]?){_LETTER}[)\]*]*\s+is\s+(?:the\s+)?(?:right|correct|best)\b"),
    re.compile(rf"{_NAME}\s*\**[(\[]?{_LETTER}"),
    re.compile(r"^[^\S\n]*\**\(?([A-Z])(?:[).:]|\**\s*$)", re.MULTILINE),
)


def chosen(answer: str) -> str | None:
    """The letter of a multiple-choice answer; None where it names none."""
    for statement in _STATEMENTS:
        letters = [match[1] for match in statement.finditer(answer) if not _is_considered(answer, match.start())]
        if letters:
            return letters[-1]
    return None


def _is_considered(answer: str, start: int) -> bool:
    """Whether the statement that begins at ``start`` is only considered."""
    return _CONSIDERED.search(answer[max(0, start - CONSIDERED_CHARACTERS) : start]) is not None


def score(row: Row, response: str) -> Verdict:
    """1 "correct", 0 "wrong", 0 "no choice", by the letter in the row's ``answer``.

    Raises ValueError for a row whose ``answer`` isn't one capital letter.
    """
    if not re.fullmatch("[A-Z]", row.get("answer") or ""):
        raise ValueError(
            f"row {row['id']!r} has answer={row.get('answer')!r}; `choice` needs one capital letter: write it, or drop "
            f"`choice` from the mix of label {row['label']!r}"
        )
    letter = chosen(without_thinking(response))
    if letter is None:
        return Verdict(0.0, "no choice")
    return Verdict(1.0, "correct") if letter == row["answer"] else Verdict(0.0, "wrong")
