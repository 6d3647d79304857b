"""Apply the rule that the row names in ``check``.

This is SafeWork-R1's rule check, for labels whose rows need different rules.
"""

from rewards.verdict import Row, Verifier, VerifierResult
from rewards.verifiers import capability, choice, exact, mathematics
from rewards.verifiers.text import without_thinking

CHECKS: dict[str, Verifier] = {
    "math": mathematics.score,
    "exact": exact.score,
    "choice": choice.score,
    "last_word": capability.score,
}


def score(row: Row, response: str) -> VerifierResult:
    """The verdict of the row's check. Raises ValueError for a row whose ``check`` is missing or unknown."""
    if row.get("check") not in CHECKS:
        raise ValueError(
            f"row {row['id']!r} has check={row.get('check')!r}; label {row['label']!r} needs one of {', '.join(CHECKS)}"
        )
    return CHECKS[row["check"]](row, without_thinking(response))
