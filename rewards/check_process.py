"""A process that checks answers: ``python -m rewards.check_process OWNER_PID``.

A line in is JSON, the name of a check and two texts; a line out is one word in JSON. The kernel bounds its memory and
ends it with its owner; the owner bounds its time.
"""

import json
import logging
import re
import resource
import sys

from megatron_ext.processes import die_with

MEMORY_BYTES = 2 << 30  # address space; sympy and its parser take a quarter of it


def math(reference: str, answer: str) -> str:
    """ "correct", "wrong" or "no reference". The reference may stand in $…$, \\boxed{…} or bare."""
    from math_verify import parse, verify

    wanted = parse(f"\\boxed{{{reference}}}", parsing_timeout=None)
    if all(isinstance(value, str) for value in wanted):  # nothing, or only the text itself
        return "no reference"
    found = parse(answer, parsing_timeout=None)
    return "correct" if verify(wanted, found, timeout_seconds=None) else "wrong"


def matches(pattern: str, text: str) -> str:
    """Whether the regular expression matches the whole text: "yes" or "no"."""
    return "yes" if re.fullmatch(pattern, text, re.DOTALL) else "no"


CHECKS = {"math": math, "matches": matches}


def main() -> None:
    die_with(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable()
    import math_verify  # noqa: F401  # the slow part, before the first question

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, *texts = json.loads(line)
        print(json.dumps(CHECKS[name](*texts)), flush=True)


if __name__ == "__main__":
    main()
