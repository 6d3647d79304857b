"""Is the answer mathematically equal to the reference? math-verify decides this, in processes that can be killed.

On some inputs, math-verify's parser and sympy use unbounded time and memory. math-verify's own time limit is a signal,
which works in the main thread only.
"""

from rewards.checkers import run_check
from rewards.processes import Stuck
from rewards.verdict import Failure, Row, Verdict, VerifierResult
from rewards.verifiers.text import without_thinking


def score(row: Row, response: str) -> VerifierResult:
    """1 "correct" if the response's answer equals the row's ``answer``, else 0 "wrong".

    The row's ``answer`` is in LaTeX or plain notation. The response needs no boxed answer. If it gives several numbers,
    math-verify takes the last one, and if it gives several boxed ones, all of them. The result is a Failure if the
    check failed to end in time twice. Raises ValueError for a row whose ``answer`` is missing or can't be parsed.
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
