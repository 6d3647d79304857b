"""A user's verifier function (a dotted path that is no registered rule): checked when it is opened, and called in
processes that can be killed (``rewards.function_process``)."""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from rewards.processes import Pool, Stuck, TooSlow
from rewards.settings import FunctionsConfig
from rewards.verdict import Row, VerifierResult, excerpt, from_json
from rollout.environment import Segment

# After so many verdicts in a row that took too long, a function hangs: the next ones fail without a call, so that the
# step comes to its end, and ``max_failed`` to its error, before ``cluster.watchdog``.
LATE_IN_A_ROW = 32
FORM = (
    "write `def score(row, response)` that returns a number from 0 to 1, a rewards.verdict.Verdict or, for no reward, "
    "a rewards.verdict.Failure (docs/rewards.md)"
)


class FunctionFailed(Exception):
    """The function raised, returned what is no result, took too long, or its process died.

    ``traceback``: the function's own as text, empty where there is none.
    """

    def __init__(self, reason: str, traceback: str = "") -> None:
        super().__init__(reason)
        self.traceback = traceback


class Function:
    """The function at a dotted path as a verifier. ``arguments``: its further keyword arguments, plain JSON."""

    def __init__(self, path: str, arguments: Mapping[str, Any], settings: FunctionsConfig) -> None:
        self.path = path
        self.seconds = settings.timeout
        self.late_in_a_row = 0
        self.pool = Pool(settings.processes, "rewards.function_process", [path, json.dumps(arguments)])

    def __call__(self, row: Row, response: str) -> VerifierResult:
        """What the function returned. Thread-safe. Raises FunctionFailed."""
        if self.late_in_a_row >= LATE_IN_A_ROW:
            raise FunctionFailed(
                f"it was not called: {LATE_IN_A_ROW} verdicts in a row took more than {self.seconds:g} s"
            )
        plain = dict(row)
        segments = plain.pop("segments", None)
        if segments and isinstance(segments[0], Segment):
            segments = [[segment.text, segment.by_environment] for segment in segments]
        elif segments is not None:  # a field of the data
            plain["segments"] = segments
            segments = None
        try:
            reply = self.pool.call([plain, segments, response], self.seconds)
        except TooSlow as error:
            self.late_in_a_row += 1
            raise FunctionFailed(f"{error}: make it faster or raise rewards.functions.timeout") from error
        except Stuck as error:
            raise FunctionFailed(f"{error}: what it wrote last is in the log") from error
        except TypeError as error:
            raise FunctionFailed(f"the row can't be passed on as JSON: {error}") from error
        self.late_in_a_row = 0
        if "error" in reply:
            raise FunctionFailed(reply["error"], reply["traceback"])
        return from_json(reply)


def check_function(name: str, function: Any, arguments: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the verifier, for what can't be called as ``function(row, response, **arguments)``."""
    problem = None
    if isinstance(function, type):
        problem = "is a class, not a function"
    elif not callable(function):
        problem = f"is {excerpt(function)}, not a function"
    elif _is_async(function):
        problem = "is async; a call has a process of its own, so it may simply wait"
    else:
        problem = _signature_problem(name, function, arguments)
    if problem is not None:
        raise ValueError(f"verifier {name!r} {problem}: {FORM}")


def _is_async(function: Callable[..., Any]) -> bool:
    called = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called)


def _signature_problem(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> str | None:
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions that are not written in Python have none
        return None
    try:
        signature.bind({}, "", **arguments)
    except TypeError as error:
        given = "".join(f", {key}=…" for key in arguments)
        return (
            f"has the parameters {signature} and is called with (row, response{given}): {error} "
            f"(rewards.verifiers.{name}.arguments are the further ones)"
        )
    return None
