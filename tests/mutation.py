"""A pytest plugin of ``make mutation``, for the run in which mutmut 3.8 notes which test calls which function.

With ``max_stack_depth`` mutmut looks for the source file of each frame, and fails at code that has none (a dataclass's
``<string>``, ``<frozen importlib._bootstrap>``). In a process that a test starts it would fail as well, and what it
notes there is lost, and of what a module's fixture calls all but the first test. So of the modules of ``SEEN_BY`` every
test of a file counts as one that calls each function. The mutant is at work in those processes too; of a module that is
run as a program, by the name that it has there.

A property's counterexample is not made smaller: that takes minutes, and here only its being there counts.
"""

import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from mutmut import stats
from mutmut.mutation import trampoline
from mutmut.state import state

MUTANT = "MUTANT_UNDER_TEST"
# Module → files of tests.
SEEN_BY = {
    "recipes.training.rl": ("tests/recipes/test_loop.py", "tests/recipes/test_ppo_step.py"),
    "rewards.check_process": ("tests/rewards/test_rules.py",),
    "rewards.function_process": ("tests/rewards/test_functions.py",),
    "rewards.processes": ("tests/rewards/test_functions.py",),
    "rewards.serve": ("tests/rewards/test_serve.py",),
    "rewards.token_guard": ("tests/rewards/test_serve.py",),
    "rewards.verdict": ("tests/rewards/test_functions.py",),
}

settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutation")


class SourceFile:
    """A frame's file, of which mutmut asks only for the folders that it is in."""

    def __init__(self, name: str) -> None:
        self.parents = frozenset(Path(name).resolve().parents)

    def resolve(self, strict: bool) -> "SourceFile":
        return self


note_call = trampoline.record_trampoline_hit


def note_first_call(name: str, caller: str | None = None) -> None:
    """mutmut walks the stack at every call; a test of a verifier makes millions."""
    if name not in state()._stats:
        note_call(name, caller)


if os.environ.get(MUTANT) == "stats":
    stats.Path = cache(SourceFile)
    trampoline.record_trampoline_hit = note_first_call
    trampoline.set_mutant_under_test("stats")
    del os.environ[MUTANT]


start_process = subprocess.Popen.__init__


def start_with_mutant(process: Any, arguments: Any, *others: Any, env: Any = None, **keywords: Any) -> None:
    environment = dict(os.environ if env is None else env)
    module, _, mutant = environment.get(MUTANT, "").rpartition(".")
    if module and list(arguments)[1:3] == ["-m", module]:
        environment[MUTANT] = f"__main__.{mutant}"
    start_process(process, arguments, *others, env=environment, **keywords)


subprocess.Popen.__init__ = start_with_mutant  # type: ignore[method-assign]


@cache
def functions(module: str) -> set[str]:
    """mutmut's names of the functions of a module that have mutants. The working folder is mutmut's."""
    mutants = json.loads(Path(f"{module.replace('.', '/')}.py.meta").read_text())["exit_code_by_key"]
    return {name.partition("__mutmut_")[0] for name in mutants}


def pytest_runtest_call(item: pytest.Item) -> None:
    """While mutmut notes what a test calls, add what ``SEEN_BY`` has of its file."""
    if trampoline.get_mutant_under_test() != "stats":
        return
    for module, files in SEEN_BY.items():
        if any(item.path.match(f"*/{file}") for file in files):
            state()._stats.update(functions(module))
