"""Is the response thinking, then an answer? SafeWork-R1's format reward (arXiv 2507.18576 and its authors' code)."""

import re

from rewards.verdict import Row, Verdict

# As theirs it is matched from the beginning and may go on behind it: an answer has more than one word.
_FORMAT = re.compile(r".*<think>.+?</think>\s*\S+", re.DOTALL)


def score(row: Row, response: str) -> Verdict:
    """1 "well-formed" for `<think>…</think>` with something inside and an answer behind it, else 0 "malformed"."""
    return Verdict(1.0, "well-formed") if _FORMAT.match(response) else Verdict(0.0, "malformed")
