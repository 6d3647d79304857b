"""Is the response a thinking part and then an answer?

This is SafeWork-R1's format reward (arXiv 2507.18576 and its authors' code).
"""

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import THINK_BEGIN, THINK_END


def score(row: Row, response: str) -> Verdict:
    """1 "well-formed" for `<think>…</think>` with a word inside and an answer after it, else 0 "malformed".

    Theirs is the regular expression `.*<think>.+?</think>\\s*\\S+`, which accepts a single space or a full stop as
    thinking. This rule does not.
    """
    _, begin_mark, rest = response.partition(THINK_BEGIN)
    thinking, end_mark, answer = rest.partition(THINK_END)
    has_word = any(map(str.isalnum, thinking.replace(THINK_BEGIN, "")))
    if begin_mark and end_mark and has_word and answer.strip():
        return Verdict(1.0, "well-formed")
    return Verdict(0.0, "malformed")
