"""Verifier functions as a user writes them, right and wrong. What takes long to import is imported where it is used."""

import math
import os
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

from rewards.verdict import Failure, Row, Verdict, VerifierResult


def number(row: Row, response: str) -> float:
    return 0.25 if response else 0.0


def integer(row: Row, response: str) -> int:
    return 1


def single_precision(row: Row, response: str) -> Any:
    import numpy as np

    return np.float32(0.5)


def verdict(row: Row, response: str, *, limit: int = 3) -> VerifierResult:
    """Prints, reads from the terminal, and knows the row."""
    print("a line that is no reply")
    assert sys.stdin.read() == ""
    if not response:
        return Failure("there is no response")
    return Verdict(float(len(response.split()) <= limit), f"{row['id']}: {limit} words")


def nothing(row: Row, response: str) -> None:
    pass


def truth(row: Row, response: str) -> bool:
    return True


def text(row: Row, response: str) -> str:
    return "1.0"


def many(row: Row, response: str) -> list[float]:
    return [1.0]


def not_a_number(row: Row, response: str) -> float:
    """For some answers only."""
    return math.nan if response else 0.0


def two(row: Row, response: str) -> float:
    return 2.0


def verdict_of_two(row: Row, response: str) -> Verdict:
    return Verdict(2.0, "too good")


def verdict_of_text(row: Row, response: str) -> Verdict:
    return Verdict("1.0", "well")  # type: ignore[arg-type]


def verdict_without_label(row: Row, response: str) -> Verdict:
    return Verdict(1.0, None)  # type: ignore[arg-type]


def raises(row: Row, response: str) -> float:
    return float(row["no such field"])


def raises_in_a_rank(row: Row, response: str) -> float:
    """For the tasks; not when it is tried before the ranks start."""
    if "RANK" in os.environ and row["kind"] == "task":
        raise KeyError("gone")
    return 0.5


def exits(row: Row, response: str) -> float:
    sys.exit(3)


def dies(row: Row, response: str) -> float:
    os._exit(1)


def sleeps(row: Row, response: str) -> float:
    time.sleep(600 if row.get("hangs") else 0)
    return 1.0


def holds_the_interpreter(row: Row, response: str) -> float:
    """A match that takes longer than the universe is old, with children of its own."""
    import re
    import subprocess

    child = subprocess.Popen(["sleep", "600"])
    with open(row["pids"], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    return float(bool(re.fullmatch("(a*)*b", "a" * 99)))


def model_words(row: Row, response: str) -> float:
    """Of an environment's run: the share of the pieces that the model wrote."""
    segments = row["segments"]
    return sum(not segment.by_environment for segment in segments) / len(segments)


def at_line_end(completions: list[str], **fields: Any) -> list[float]:
    """As another library takes it."""
    return [float(text.endswith("\n")) for text in completions]


def one_parameter(response: str) -> float:
    return 1.0


def three_parameters(row: Row, response: str, limit: int) -> float:
    return 1.0


async def awaits(row: Row, response: str) -> float:
    return 1.0


async def yields(row: Row, response: str) -> AsyncIterator[float]:
    yield 1.0


class Scorer:
    def __init__(self, row: Row, response: str) -> None:
        self.score = 1.0


class Quarters:
    def __call__(self, row: Row, response: str) -> float:
        return 0.75


instance = Quarters()
constant = 3
