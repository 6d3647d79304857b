"""A process that checks answers: ``python -m rewards.check_process OWNER_PID``.

It reads lines of JSON, [name of a check, text, text], and writes one word in JSON for each. The kernel bounds its
memory and ends it with its owner. The owner bounds the time of a check (``rewards.checkers``).
"""

import json
import logging
import re
import resource
import sys

from megatron_ext.processes import die_with

MEMORY_BYTES = 2 << 30  # address space; sympy and its parser take a quarter of it


def math(reference: str, answer: str) -> str:
    """Whether the answer equals the reference: "correct", "wrong", or "no reference" for a reference that can't be
    parsed. The reference may stand in $…$, \\boxed{…} or bare."""
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


def main() -> None:
    die_with(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    # Slow, so it is done before the first check.
    import math_verify  # noqa: F401

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *texts = json.loads(line)
        print(json.dumps(CHECKS[name](*texts)), flush=True)


if __name__ == "__main__":
    main()
