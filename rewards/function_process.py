"""A process that runs a user's verifier function: ``python -m rewards.function_process OWNER_PID PATH ARGUMENTS``.

``PATH`` is the function's dotted path, and ``ARGUMENTS`` a JSON object of keyword arguments. A request is [row,
segments or null, response]. The reply is a result (``rewards.verdict.to_json``) or {"error": …, "traceback": …}.
"""

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from megatron_ext import dotted_path
from rewards.processes import serve
from rewards.verdict import Row, as_result, describe, to_json

TRACEBACK_CHARACTERS = 4000


def prepare() -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Import the function before the first request, so that the import does not count towards a verdict's timeout."""
    path, arguments = sys.argv[2:]
    return partial(answer, partial(dotted_path.load(path), **json.loads(arguments)))


def answer(function: Callable[[Row, str], Any], request: Sequence[Any]) -> dict[str, Any]:
    """The reply to a request."""
    row, segments, response = request
    if segments is not None:
        from rollout.environment import Segment  # takes half a second, and only runs with an environment need it

        row["segments"] = [Segment(*segment) for segment in segments]
    try:
        returned = function(row, response)
    except (Exception, SystemExit) as error:
        text = "".join(traceback.format_exception(error.with_traceback(_own_part(error))))
        return {"error": describe(error), "traceback": text[-TRACEBACK_CHARACTERS:]}
    try:
        return to_json(as_result(returned))
    except TypeError as error:
        return {"error": str(error), "traceback": ""}


def _own_part(error: BaseException) -> Any:
    """The traceback without this module's frame."""
    return error.__traceback__ and error.__traceback__.tb_next


if __name__ == "__main__":
    serve(prepare)
