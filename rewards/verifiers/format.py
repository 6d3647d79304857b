"""Is the response thinking, then an answer? SafeWork-R1's format reward (arXiv 2507.18576 and its authors' code)."""

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import THINK_BEGIN, THINK_END


def score(row: Row, response: str) -> Verdict:
    """1 "well-formed" for `<think>…</think>` with a word inside and an answer after it, else 0 "malformed".

    Theirs is a regular expression, `.*<think>.+?</think>\\s*\\S+`, which takes a space or a point for thinking; this
    one does not.
    """
    _, begin_mark, rest = response.partition(THINK_BEGIN)
    thinking, end_mark, answer = rest.partition(THINK_END)
    has_word = any(map(str.isalnum, thinking.replace(THINK_BEGIN, "")))
    if begin_mark and end_mark and has_word and answer.strip():
        return Verdict(1.0, "well-formed")
    return Verdict(0.0, "malformed")
