"""Plain text measures that the rule-based verifiers share."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
_SENTENCE_END = re.compile(r"[.!?](?:\s|$)")
_REFUSAL = re.compile(
    r"\b(?:i|we) (?:(?:really |simply |just )?(?:can't|cannot|can not|won't|will not|couldn't|must not|refuse)"
    r"|(?:am|are) (?:unable|not able|not going|not allowed)|do not|don't (?:want|think|support|help))\b"
    r"|\bi'm (?:unable|not able|not going|not allowed)\b"
    r"|^(?:i'm |i am )?(?:very |so )?sorry\b"
)

_FUNCTION_WORDS = frozenset(
    "a an and are as at be before but by can do for from if in into is it its not of on one or so some that the then "
    "this to until up when with you your".split()
)


THINK_BEGIN = "<think>"
THINK_END = "</think>"
WINDOW = 30  # words


def without_thinking(response: str) -> str:
    """The answer after the last end of thinking; empty when the thinking never ends."""
    if THINK_END in response:
        return response.rpartition(THINK_END)[2].strip()
    return "" if THINK_BEGIN in response else response.strip()


def normalize(text: str) -> str:
    """Lower case, straight apostrophes, single spaces."""
    return " ".join(text.lower().replace("’", "'").split())


def words(text: str) -> list[str]:
    """The alphabetic words of `text` in lower case; digits and punctuation are dropped."""
    return _WORD.findall(normalize(text))


def hits(text: str, stems: Iterable[str]) -> list[str]:
    """The stems that begin at least one word of `text` ("steal" is found in "stealing", not in "unsteal")."""
    text_words = set(words(text))
    return [stem for stem in stems if any(word.startswith(stem) for word in text_words)]


def opens_with_refusal(text: str) -> bool:
    """Whether the text begins by declining in the first person ("I can't help ...", "Sorry, ...").

    Only the first sentence is read, and the second too if the first has at most two words ("No! I won't ...").
    """
    first, _, rest = _SENTENCE_END.sub("\n", normalize(text), count=1).partition("\n")
    opening = f"{first} {_SENTENCE_END.split(rest, maxsplit=1)[0]}" if len(words(first)) <= 2 else first
    return bool(_REFUSAL.search(opening))


def is_degenerate(text: str, min_words: int) -> bool:
    """Whether the text has too few words, or repeats itself: some window of thirty words has fewer than 60 % distinct
    words, or one word pair three times.

    In a window, because the share of distinct words falls with a text's length (Covington and McFall 2010, Cutting the
    Gordian Knot: the moving-average type-token ratio).
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
    """Keywords strung together instead of sentences: less than one word in six is a function word ("the", "with")."""
    text_words = words(text)
    function_words = sum(word in _FUNCTION_WORDS for word in text_words)
    return 6 * function_words < len(text_words)
