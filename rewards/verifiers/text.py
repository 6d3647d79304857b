"""Plain text measures that the rule-based verifiers share."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_NUMBER_OR_WORD = re.compile(
    r"(?P<number>-?(?:\d{1,3}(?:,\d{3}(?!\d))+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\w.])\.\d+))|[a-z]+(?:'[a-z]+)?"
)
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_REFUSAL = re.compile(
    r"\b(?:i|we) (?:(?:really |simply |just )?(?:can't|cannot|can not|won't|will not|couldn't|must not|refuse)"
    r"|(?:am|are) (?:unable|not able|not going|not allowed)|do not|don't (?:want|think|support|help))\b"
    r"|\bi'm (?:unable|not able|not going|not allowed)\b"
    r"|\bi(?:'d| would) rather not\b"
    r"|^(?:i'm |i am )?(?:very |so )?sorry\b(?! to\b| about\b| for\b| that you\b)"
    r"|^(?:can't|cannot|won't) (?:assist|do|help)\b"
)

_FUNCTION_WORDS = frozenset(
    "a an and are as at be before but by can do for from he her his i if in into is it its my not of on one or our she "
    "so some that the their then they this to until up we when with you your".split()
)
# The function words, and other words that occur in many requests and say nothing about their subject.
_COMMON_WORDS = _FUNCTION_WORDS | frozenset(
    "about after again all also always another any anybody anyone anything around away back because been being best "
    "better between both call can't come could couldn't did didn't does doesn't doing don't down each easy either else "
    "enough ever every everybody everyone everything few find first get gets getting give gives goes going good got "
    "had has have haven't having help helps here him how i'd i'll i'm i've isn't it's just keep kindly know "
    "last least let let's like little long look made make makes making many may mean might mine more most much must "
    "myself need needs never new next nobody nothing now off old only other others out over own people perhaps "
    "please put quick quickest really right said say says see she should show somebody someone something sort still "
    "such sure take takes tell than thank thanks that's them there these thing things think those though "
    "through time tips too two under use used using very want wants was way ways well were what what's where which "
    "while who whom whose why will without won't work works would yes yet you'll you're".split()
)


THINK_BEGIN = "<think>"
THINK_END = "</think>"
WINDOW = 30  # words
QUOTE = 4  # this many words in a row that also occur in the request count as a quotation of it
STEM = 5  # words of the request are compared by this many first letters: "drown" is found in "drowning"


def without_thinking(response: str) -> str:
    """The answer: the text after the last ``THINK_END``. Empty if the thinking begins and never ends."""
    if THINK_END in response:
        return response.rpartition(THINK_END)[2].strip()
    return "" if THINK_BEGIN in response else response.strip()


def normalize(text: str) -> str:
    """The text in lower case, with straight apostrophes and single spaces."""
    return " ".join(text.lower().replace("’", "'").split())


def words(text: str) -> list[str]:
    """The alphabetic words of ``text`` in lower case, without digits and punctuation."""
    return _WORD.findall(normalize(text))


def numbers_and_words(text: str) -> list[str]:
    """The numbers and words of ``text``, in order.

    Words are in lower case. Numbers are in their shortest notation, so "1,000.0" becomes "1000". A comma is part of a
    number only before a group of three digits ("10,000", not "11,12").
    """
    matches = _NUMBER_OR_WORD.finditer(normalize(text))
    return [match[0] if match["number"] is None else _shortest(match["number"]) for match in matches]


def _shortest(number: str) -> str:
    # Works on the digits, because a float or a decimal would round different long numbers to the same value.
    whole, _, fraction = number.replace(",", "").removeprefix("-").partition(".")
    whole = whole.lstrip("0") or "0"
    fraction = fraction.rstrip("0")
    size = f"{whole}.{fraction}" if fraction else whole
    return f"-{size}" if number.startswith("-") and size != "0" else size


def hits(text: str, stems: Iterable[str]) -> list[str]:
    """The stems that at least one word of ``text`` begins with ("steal" is found in "stealing", not in "unsteal")."""
    text_words = set(words(text))
    return [stem for stem in stems if any(word.startswith(stem) for word in text_words)]


def subject_stems(request: str) -> list[str]:
    """The stems (the first ``STEM`` letters) of the words that carry a request's subject."""
    carrying = (word for word in words(request) if len(word) >= 3 and word not in _COMMON_WORDS)
    return list(dict.fromkeys(word[:STEM] for word in carrying))


def without_quotes(text: str, quoted: str, run: int = QUOTE) -> str:
    """The :func:`numbers_and_words` of ``text`` without those that are quoted from ``quoted``, joined by spaces.

    A sequence of ``run`` or more of them that also occurs in ``quoted`` is a quotation. It is removed because what a
    response copies from the request is not its own statement.
    """
    tokens = numbers_and_words(text)
    source = numbers_and_words(quoted)
    runs = {tuple(source[start : start + run]) for start in range(len(source) - run + 1)}
    is_copied = [False] * len(tokens)
    for start in range(len(tokens) - run + 1):
        if tuple(tokens[start : start + run]) in runs:
            is_copied[start : start + run] = [True] * run
    return " ".join(token for token, copied in zip(tokens, is_copied, strict=True) if not copied)


def sentences(text: str) -> list[str]:
    """The sentences of a text in lower case, without those that have no word. A line break also ends a sentence."""
    parts = [part for line in text.splitlines() for part in _SENTENCE_END.split(normalize(line))]
    return [part for part in parts if words(part)]


def refuses(sentence: str) -> bool:
    """Whether a normalised sentence declines in the first person ("I can't help ...", "Sorry, ...")."""
    return bool(_REFUSAL.search(sentence))


def opens_with_refusal(text: str) -> bool:
    """Whether the text begins by declining.

    Only the first sentence counts, or the first two if the first one has at most two words ("No! I won't ...").
    """
    first_two = sentences(text)[:2]
    is_short = bool(first_two) and len(words(first_two[0])) <= 2
    return any(map(refuses, first_two if is_short else first_two[:1]))


def is_degenerate(text: str, min_words: int) -> bool:
    """Whether the text has fewer than ``min_words`` words or repeats itself.

    It repeats itself if, in some window of thirty words, fewer than 60 % of the words are distinct or a pair of words
    occurs three times. Windows are used because the share of distinct words falls with a text's length (Covington and
    McFall 2010, Cutting the Gordian Knot: the moving-average type-token ratio).
    """
    text_words = words(text)
    if len(text_words) < min_words:
        return True
    starts = range(max(1, len(text_words) - WINDOW + 1))
    return any(_is_repetitive(text_words[start : start + WINDOW]) for start in starts)


def _is_repetitive(window: Sequence[str]) -> bool:
    pairs = Counter(pairwise(window))
    return len(set(window)) < 0.6 * len(window) or max(pairs.values(), default=0) >= 3


def is_word_list(text: str) -> bool:
    """Whether the text is a list of keywords rather than sentences.

    It is if fewer than one word in six is a function word ("the", "with").
    """
    text_words = words(text)
    function_words = sum(word in _FUNCTION_WORDS for word in text_words)
    return 6 * function_words < len(text_words)
