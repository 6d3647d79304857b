"""Elements that show the text of people and models as text, never as HTML."""

from nicegui.elements.mixins.text_element import TextElement

from recipes.report import markup


def plain(text: str, tag: str = "div", classes: str = "") -> TextElement:
    """An element with a text, whatever characters it has."""
    return TextElement(tag=tag, text=visible(text)).classes(classes)


def visible(text: str) -> str:
    """The text with a replacement for characters that HTML does not have and those that change the direction."""
    return markup.HIDDEN.sub("\ufffd", text)
