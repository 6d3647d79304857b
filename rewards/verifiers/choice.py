"""Which letter does the answer choose?"""

import re

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import without_thinking

_NAME = r"(?i:answer|choice|option)\b"
_MARKS = r"[\s*(\[:]*"
# A word after a bare "I" makes it the pronoun, and a word after a bare "A" makes it the article ("the answer I would
# choose", "Answer: A careful look shows …"). The words of _GOES_ON are the exception: they may follow a chosen letter.
_GOES_ON = r"(?:is|because|since|as|and|or|for|if|by|but|not|so|which|that|based|due|given|with|from|in)\b"
_PRONOUN = rf"I(?:[^\S\n]+(?!{_GOES_ON})\w|[^\S\n]*,\s*(?:for\s+one|too|personally|myself|think|believe)\b|['’])"
_ARTICLE = rf"A[^\S\n]+(?!{_GOES_ON})[a-z]"
_LETTER = rf"(?!{_PRONOUN}|{_ARTICLE})([A-Z])\b"
# "answer:", "**Answer**:", "answer is", "answer to question 3 is:", "answer that I would choose is", "option is"
_STATED = (
    rf"(?:{_NAME}\**\s*:|(?i:answer|choice)\b\**(?:\s+(?!not\b)(?:I|[a-z0-9'’]+)){{0,6}}?\s+(?i:is)\b"
    r"|(?i:option)\b\**\s+(?i:is)\b)"
)
# Text directly before a statement that makes it a mere supposition: "whether the answer is A", "Suppose the answer is
# A".
_CONSIDERED = re.compile(
    r"\b(?:if|whether|suppos(?:e|ing)|assum(?:e|ing))\s+(?:that\s+)?(?:(?:the|my|your|its)\s+)?(?:\w+\s+)?$", re.I
)
CONSIDERED_CHARACTERS = 60  # how much of the text before a statement is searched for a supposition
_BOX = r"\\boxed\{\s*(?:\\text\{\s*)?\(?(?=[A-Z]\)?\s*\})"
# Ordered from the most explicit form to the least explicit. Within a form the last match counts. A sentence about an
# option, even one that calls it right, may report what others think, so a stated answer takes precedence over it.
# No pattern can match a run of spaces in several ways, or start a match at each of its spaces: the time on a long run
# would then grow with the square of its length.
_STATEMENTS = (
    re.compile(rf"(?:{_BOX}|{_STATED}{_MARKS}(?:(?i:option|choice|letter)\b{_MARKS})?){_LETTER}"),
    re.compile(rf"(?:\*\*[(\[]?|[(\[]|{_NAME}\s+\**[(\[]?){_LETTER}[)\]*]*\s+is\s+(?:the\s+)?(?:right|correct|best)\b"),
    re.compile(rf"{_NAME}\s*\**[(\[]?{_LETTER}"),
    re.compile(r"^[^\S\n]*\**\(?([A-Z])(?:[).:]|\**\s*$)", re.MULTILINE),
)


def chosen(answer: str) -> str | None:
    """The letter that a multiple-choice answer chooses, or None if it names none."""
    for statement in _STATEMENTS:
        letters = [match[1] for match in statement.finditer(answer) if not _is_considered(answer, match.start())]
        if letters:
            return letters[-1]
    return None


def _is_considered(answer: str, start: int) -> bool:
    """Whether the statement that begins at ``start`` is only a supposition."""
    return _CONSIDERED.search(answer[max(0, start - CONSIDERED_CHARACTERS) : start]) is not None


def score(row: Row, response: str) -> Verdict:
    """1 "correct" if the response chooses the letter in the row's ``answer``, else 0 "wrong", or 0 "no choice".

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
