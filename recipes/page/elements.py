"""Elements that show the text of people and models as text, never as HTML."""

from collections.abc import Callable
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.text_element import TextElement

from recipes.report import markup


def plain(text: str, tag: str = "div", classes: str = "") -> TextElement:
    """An element with a text, which may have any characters."""
    return TextElement(tag=tag, text=visible(text)).classes(classes)


def button(text: str, on_click: Callable[[], Any]) -> ui.button:
    return ui.button(text, on_click=on_click, color=None).props("no-caps outline dense")


def visible(text: str) -> str:
    """The text, with a replacement for characters that HTML does not have or that change the text direction."""
    return markup.HIDDEN.sub("\ufffd", text)
