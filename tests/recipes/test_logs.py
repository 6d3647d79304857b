"""The format of log lines, and that only what matters is in them."""

import io
import logging
import re
import warnings
from collections.abc import Iterator

import pytest

from recipes.run import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What rank 3 writes; the root logger is as before afterwards."""
    root, written = logging.getLogger(), io.StringIO()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []  # basicConfig closes what it replaces
    logs.configure(3, written)
    yield written
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_has_time_level_rank_module_message(stream: io.StringIO) -> None:
    logging.getLogger("megatron.core.some_part").warning("a bucket of %d bytes", 7)
    line = stream.getvalue()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d WARNING rank 3 megatron\.core\.some_part a bucket of 7 bytes\n", line
    )


def test_quiet_by_default_and_warnings_are_lines_too(stream: io.StringIO) -> None:
    logging.getLogger("some.library").info("loading")
    logging.getLogger("some.library").debug("more")
    assert stream.getvalue() == ""
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("an old call", DeprecationWarning, stacklevel=1)
    (line,) = [line for line in stream.getvalue().splitlines() if not line.startswith("    ")]
    assert " WARNING rank 3 py.warnings " in line and "an old call" in line


def test_a_traceback_is_set_in_below_its_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("here").exception("it failed")
    first, *further = stream.getvalue().splitlines()
    assert first.endswith("ERROR rank 3 here it failed")
    assert further and all(line.startswith("    ") for line in further)
