"""Is the final answer of a verifiable task right? SafeWork-R1's rule check (label `general_rule`), by exact match."""

import re

from rewards.verdict import Row, Verdict

_ATOM = re.compile(r"-?\d+|[a-z]+")


def final_answer(response: str) -> str | None:
    """The last number or word of the response in lower case, None if there is none."""
    atoms = _ATOM.findall(response.lower())
    return atoms[-1] if atoms else None


def score(row: Row, response: str) -> Verdict:
    """1 "correct" when the response's last number or word equals the row's `answer`, else 0.

    Only the last one counts, so listing candidates does not help. Raises ValueError for a row without `answer`.
    """
    if "answer" not in row:
        raise ValueError(f"row {row['id']!r} has no `answer`; drop `capability` from the mix of label {row['label']!r}")
    found = final_answer(response)
    if found is None:
        return Verdict(0.0, "no answer")
    return Verdict(1.0, "correct") if found == row["answer"].lower() else Verdict(0.0, "wrong")
