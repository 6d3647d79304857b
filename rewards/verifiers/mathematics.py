"""Is the answer mathematically the reference? By math-verify, in processes that can be killed.

Its parser and sympy can take any time and memory on some inputs, and its own time limit (a signal) works in a main
thread only.
"""

from rewards.checkers import run_check
from rewards.processes import Stuck
from rewards.verdict import Failure, Row, Verdict, VerifierResult
from rewards.verifiers.text import without_thinking


def score(row: Row, response: str) -> VerifierResult:
    """1 "correct", 0 "wrong", by the row's ``answer`` in LaTeX or plain notation; no boxed answer is asked for.

    Where the answer gives several numbers math-verify takes the last, of boxed ones all. A Failure when the check did
    not end in time twice. Raises ValueError for a row whose ``answer`` is missing or can't be read.
    """
    reference = row.get("answer")
    if not isinstance(reference, str) or not reference:
        raise ValueError(f"row {row['id']!r} has no `answer`; drop `math` from the mix of label {row['label']!r}")
    try:
        label = run_check("math", reference, without_thinking(response))
    except Stuck as error:
        return Failure(f"math-verify: {error}")
    if label == "no reference":
        raise ValueError(f"row {row['id']!r}: math-verify finds no mathematics in answer={reference!r}")
    return Verdict(1.0 if label == "correct" else 0.0, label)
