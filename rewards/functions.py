"""Verifier functions that the user wrote, given by a dotted path that is not a registered rule.

A function's signature is checked when the verifier is opened. The function is called in separate processes
(``rewards.function_process``), which can be killed.
"""

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from rewards.processes import Pool, Stuck, TooSlow
from rewards.settings import FunctionsConfig
from rewards.verdict import Row, VerifierResult, excerpt, from_json
from rollout.environment import Segment

# After this many timeouts in a row the function is taken to hang, and the next verdicts fail without a call. So the
# step ends, and ``max_failed`` raises its error, before ``cluster.watchdog`` stops the run.
LATE_IN_A_ROW = 32
FORM = (
    "write `def score(row, response)` that returns a number from 0 to 1, a rewards.verdict.Verdict or, for no reward, "
    "a rewards.verdict.Failure (docs/rewards.md)"
)


class FunctionFailed(Exception):
    """The function raised, returned something that is not a result, took too long, or its process died.

    ``traceback`` is the traceback of the function's exception as text. It is empty if there is none.
    """

    def __init__(self, reason: str, traceback: str = "") -> None:
        super().__init__(reason)
        self.traceback = traceback


class Function:
    """The function at a dotted path as a verifier.

    ``arguments`` are further keyword arguments for the function, as plain JSON values.
    """

    def __init__(self, path: str, arguments: Mapping[str, Any], settings: FunctionsConfig) -> None:
        self.path = path
        self.seconds = settings.timeout
        self.late_in_a_row = 0
        self.pool = Pool(settings.processes, "rewards.function_process", [path, json.dumps(arguments)])

    def __call__(self, row: Row, response: str) -> VerifierResult:
        """Call the function in one of its processes and return its result. Thread-safe. Raises FunctionFailed."""
        if self.late_in_a_row >= LATE_IN_A_ROW:
            raise FunctionFailed(
                f"it was not called: {LATE_IN_A_ROW} verdicts in a row took more than {self.seconds:g} s"
            )
        plain = dict(row)
        segments = plain.pop("segments", None)
        if segments and isinstance(segments[0], Segment):
            segments = [[segment.text, segment.by_environment] for segment in segments]
        elif segments is not None:  # not the rollout's segments but a field of the data with this name
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
    """Check that ``function`` can be called as ``function(row, response, **arguments)``.

    Raises ValueError, naming the verifier, if it can't.
    """
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
    except ValueError:  # some functions that are not written in Python have no signature
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
