"""Text and pages of HTML."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
# Characters that HTML does not allow, and those that change the reading direction.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: Any) -> str:
    """The value escaped for HTML; characters that are not allowed or change the direction are replaced by U+FFFD."""
    return escape(HIDDEN.sub("\ufffd", str(value)))


def span(score: Mapping[str, Any], form: str) -> str:
    """A score's interval, such as ``0.13 to 0.38``; ``form``: the format of its ends."""
    low, high = score["interval"]
    return f"{low:{form}} to {high:{form}}"


def page(title: str, sections: Sequence[str]) -> str:
    """A page of HTML. ``title`` is escaped here; the sections are HTML, and empty ones are left out."""
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>\n{STYLE}</style></head><body>",
        *(section for section in sections if section),
        "</body></html>",
    ]
    return "\n".join(lines)


def card(title: str, content: str) -> str:
    """A box with a heading. Both are HTML."""
    return f'<div class="card"><h3>{title}</h3>{content}</div>'


def grid(cards: Sequence[str]) -> str:
    """Boxes side by side, as many as fit."""
    return f'<div class="grid">{"".join(cards)}</div>'


def table(header: str, body: Sequence[str]) -> str:
    """A table from the cells of its header and its rows, in HTML."""
    rows = "".join(body)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{rows}</tbody></table></div>'


def details(summary: str, content: str) -> str:
    """Content that is folded away until the reader opens it."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def prompt_card(prompt: str, answers: str, kind: str = "") -> str:
    """A box with a prompt, escaped here, and boxes of answers below it. ``kind``: HTML after the heading."""
    return (
        f'<div class="card talk"><div class="head"><b>Prompt</b>{kind}</div><div class="text">{text(prompt)}</div>'
        f'<div class="answers">{answers}</div></div>'
    )
