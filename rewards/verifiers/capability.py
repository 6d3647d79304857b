"""Is the final answer of a verifiable task right? SafeWork-R1's rule check (label `general_rule`), by exact match."""

import re

from rewards.verdict import Row, Verdict

_ATOM = re.compile(r"-?\d+|[a-z]+")


def atoms(text: str) -> list[str]:
    """The numbers and words of ``text`` in lower case, in order."""
    return _ATOM.findall(text.lower())


def score(row: Row, response: str) -> Verdict:
    """1 "correct" or 0 "wrong", by the row's ``answer``.

    A single number or word must be the response's last one (listing candidates does not help); an answer of several
    must be the complete response, in order. Raises ValueError for a row without ``answer``.
    """
    if "answer" not in row:
        raise ValueError(f"row {row['id']!r} has no `answer`; drop `capability` from the mix of label {row['label']!r}")
    reference = atoms(row["answer"])
    answer = atoms(response)
    if not answer:
        return Verdict(0.0, "no answer")
    if len(reference) == 1:
        answer = answer[-1:]
    return Verdict(1.0, "correct") if answer == reference else Verdict(0.0, "wrong")
