"""A pytest plugin of ``make mutation``, for the run in which mutmut 3.8 notes which test calls which function.

With ``max_stack_depth`` mutmut looks for the source file of each frame, and fails at code that has none (a dataclass's
``<string>``, ``<frozen importlib._bootstrap>``). In a process that a test starts it would fail as well, and what it
notes there is lost.

A property's counterexample is not made smaller: that takes minutes, and here only its being there counts.
"""

import os
from functools import cache
from pathlib import Path

from hypothesis import Phase, settings
from mutmut import stats
from mutmut.mutation import trampoline

settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation")


class SourceFile:
    def __init__(self, name: str) -> None:
        self.path = Path(name).resolve()

    def resolve(self, strict: bool) -> Path:
        return self.path


if os.environ.get("MUTANT_UNDER_TEST") == "stats":
    stats.Path = cache(SourceFile)
    trampoline.set_mutant_under_test("stats")
    del os.environ["MUTANT_UNDER_TEST"]
