"""HTML text, elements and pages."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
IMAGE_SIDE = 128  # pixels of the longer side
# Characters that HTML does not allow, and those that change the reading direction.
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def text(value: Any) -> str:
    """The value escaped for HTML.

    Characters that HTML does not allow, and those that change the reading direction, are replaced by U+FFFD.
    """
    return escape(HIDDEN.sub("\ufffd", str(value)))


def span(score: Mapping[str, Any], form: str) -> str:
    """A score's interval, such as ``0.13 to 0.38``. ``form`` is the format of its ends."""
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
    """Content that is collapsed until the reader opens it."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def image(path: Path) -> str:
    """A small copy of an image, embedded in the page. The file's name if the file can't be opened any more."""
    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
    except OSError:
        return f'<span class="soft">{text(path.name)} is no longer there</span>'
    small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    data = io.BytesIO()
    small.save(data, "PNG")
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img src="data:image/png;base64,{encoded}" alt="{text(path.name)}">'


def prompt_card(prompt: str, answers: str, kind: str = "", images: Sequence[str] = ()) -> str:
    """A box with a prompt, and boxes of answers below it.

    ``prompt`` is escaped here. ``kind`` is HTML after the heading. ``images`` are the files of the prompt's images.
    """
    shown = "".join(image(Path(file)) for file in images)
    return (
        f'<div class="card talk"><div class="head"><b>Prompt</b>{kind}</div>{shown}'
        f'<div class="text">{text(prompt)}</div><div class="answers">{answers}</div></div>'
    )
