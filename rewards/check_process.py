"""A process that checks answers: ``python -m rewards.check_process OWNER_PID``.

A request is [name of a check, text, text], and the reply is one word. The kernel limits the process's memory. The owner
limits the time of a check (``rewards.checkers``).
"""

import logging
import re
import resource
from collections.abc import Callable, Sequence

from rewards.processes import serve

MEMORY_BYTES = 2 << 30  # address space; sympy and its parser take a quarter of it


def math(reference: str, answer: str) -> str:
    """Whether the answer equals the reference mathematically.

    Returns "correct", "wrong", or "no reference" for a reference that can't be parsed. The reference may be written in
    $…$, in \\boxed{…} or bare.
    """
    from math_verify import parse, verify

    parsed_reference = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
    # Without mathematics in the text, the parser returns nothing or the text itself.
    if all(isinstance(value, str) for value in parsed_reference):
        return "no reference"
    parsed_answer = parse(answer, parsing_timeout=None)
    return "correct" if verify(parsed_reference, parsed_answer, timeout_seconds=None) else "wrong"


def matches(pattern: str, text: str) -> str:
    """Whether the regular expression matches the complete text: "yes" or "no"."""
    return "yes" if re.fullmatch(pattern, text, re.DOTALL) else "no"


CHECKS = {"math": math, "matches": matches}


def prepare() -> Callable[[Sequence[str]], str]:
    """Limit the memory, and import the slow library before the first check."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    import math_verify  # noqa: F401

    return lambda request: CHECKS[request[0]](*request[1:])


if __name__ == "__main__":
    serve(prepare)
