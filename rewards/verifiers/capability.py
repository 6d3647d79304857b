"""Is the final answer of a verifiable task right? SafeWork-R1's rule check (label `general_rule`), by exact match."""

import re

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import without_quotes

# So many of the request's words in a row are copied and no answer: the end of a list may be the answer.
COPIED = 3
_ATOM = re.compile(r"-?\d+|[a-z]+")


def atoms(text: str) -> list[str]:
    """The numbers and words of ``text`` in lower case, in order."""
    return _ATOM.findall(text.lower())


def score(row: Row, response: str) -> Verdict:
    """1 "correct" or 0 "wrong", by the row's ``answer``.

    A single number or word must be the last one that the response does not copy from the prompt in a row of COPIED or
    more (neither listing candidates nor repeating the prompt helps); an answer of several must be the complete
    response, in order. Raises ValueError for a row without ``answer``.
    """
    if "answer" not in row:
        raise ValueError(f"row {row['id']!r} has no `answer`; drop `capability` from the mix of label {row['label']!r}")
    reference = atoms(row["answer"])
    is_single = len(reference) == 1
    answer = atoms(without_quotes(response, row["prompt"], COPIED))[-1:] if is_single else atoms(response)
    if not answer:
        return Verdict(0.0, "no answer")
    return Verdict(1.0, "correct") if answer == reference else Verdict(0.0, "wrong")
