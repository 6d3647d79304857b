"""report.html in a real browser: hostile text is shown and does nothing, nothing is asked for, a phone fits it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.report.page import write_report
from tests.recipes import browser, test_report
from tests.recipes.test_report import HOSTILE, make_run

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.running(tmp_path_factory.mktemp("browser")) as process:
        yield process


def test_hostile_text_is_text_and_the_page_asks_for_nothing_and_fits_its_window(
    chromium: browser.Browser, tmp_path: Path
) -> None:
    run = make_run(tmp_path)
    page = write_report(run)
    for width in WIDTHS:
        seen = chromium.visit(page, width)
        assert seen.requests == [page.as_uri()]
        assert (seen.dialogs, seen.messages) == ([], [])
        assert seen.look["title"] == f"{run.name}: report"
        known = test_report.PAGE_TAGS | test_report.TABLE_TAGS | test_report.PLOT_TAGS
        assert set(seen.look["elements"]) <= known and seen.look["handlers"] == 0
        # The places of test_hostile_text_is_shown_as_written, but for the bars' title, which is no text of the body.
        assert re.sub(r"\s+", " ", seen.look["text"]).count(HOSTILE) == 8 * 6 + 2 * (3 * 2 + 2) + 2 * 3 * 3 + 1 + 1 + 2
        assert seen.look["width"] <= width
        assert seen.look["cut"] == []  # figures on the left of a plot


def test_the_same_look_finds_what_text_does_that_is_not_escaped(chromium: browser.Browser, tmp_path: Path) -> None:
    page = tmp_path / "open.html"
    text = f"{'long' * 50}{HOSTILE}<script>document.title = 'b'; gone()</script>"
    page.write_text(f"<!doctype html><title>a</title><body>{text}")
    seen = chromium.visit(page, 390)
    assert seen.requests == [page.as_uri(), "https://evil.example/x"]
    assert sorted(seen.dialogs) == ["1", "2", "3", "4"]
    assert any("gone is not defined" in str(message) for message in seen.messages)
    assert seen.look["title"] == "b"
    assert {"script", "img", "a"} <= set(seen.look["elements"]) and seen.look["handlers"] == 2
    assert HOSTILE not in seen.look["text"]
    assert seen.look["width"] > 390
