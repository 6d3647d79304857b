"""Is the response thinking, then an answer? SafeWork-R1's format reward (arXiv 2507.18576 and its authors' code)."""

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import THINK_BEGIN, THINK_END


def score(row: Row, response: str) -> Verdict:
    """1 "well-formed" for `<think>…</think>` with something inside and an answer after it, else 0 "malformed".

    Theirs is a regular expression, `.*<think>.+?</think>\\s*\\S+`; this is equivalent, in one pass over the text.
    """
    begin = response.find(THINK_BEGIN)
    end = response.find(THINK_END, begin + len(THINK_BEGIN) + 1)
    if begin >= 0 and end >= 0 and response[end + len(THINK_END) :].strip():
        return Verdict(1.0, "well-formed")
    return Verdict(0.0, "malformed")
