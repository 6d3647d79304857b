"""Does the complete answer equal the reference?"""

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import normalize, without_thinking


def score(row: Row, response: str) -> Verdict:
    """1 "correct" if the answer equals the row's ``answer``, else 0 "wrong".

    Case, repeated spaces, and punctuation around the answer are ignored. Raises ValueError for a row without
    ``answer``.
    """
    if not row.get("answer"):
        raise ValueError(f"row {row['id']!r} has no `answer`; drop `exact` from the mix of label {row['label']!r}")
    same = plain(without_thinking(response)) == plain(row["answer"])
    return Verdict(1.0, "correct") if same else Verdict(0.0, "wrong")


def plain(text: str) -> str:
    """The text in lower case, with single spaces and without punctuation around it."""
    return normalize(text).strip(" .,;:!?\"'`*")
