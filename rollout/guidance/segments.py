"""Segments: the sentences and lines of a response, thinking and answer alike. A value model is trained on the prefixes
that end with one, and guided decoding asks it for their values."""

import re
from collections.abc import Sequence
from functools import lru_cache

# A sentence that is shorter goes on: "1.", "Dr.", "e.g." end none. Our choice.
SHORTEST_SENTENCE = 12  # characters
CLOSING = r"[\"'”’»)\]]*"
CLOSING_WIDE = r"[”’」』）]*"


@lru_cache
def _possible_ends(end_of_thinking: str) -> re.Pattern[str]:
    """Matches that end where a segment may. What follows belongs to the pattern, so that an end in the beginning of a
    text is one in all of it."""
    sentence = rf"[.!?…]+{CLOSING}(?=\s)"
    wide_sentence = rf"[。！？]+{CLOSING_WIDE}(?=[^。！？”’」』）])"
    return re.compile(rf"(?P<sentence>{sentence}|{wide_sentence})|(?=\n)|{re.escape(end_of_thinking)}")


def segment_ends(text: str, thinking_marks: Sequence[str], complete: bool) -> list[int]:
    """Where the segments of a response end, as numbers of characters from its start, ascending.

    A segment ends with a sentence, with a line that is not empty, and with the mark that ends the thinking. Whitespace
    after a sentence or line belongs to the next segment. The last one ends with the text if that is ``complete``;
    otherwise it may go on and is left out. So a text that grows keeps its ends: they can be found while a model writes.

    Args:
        text: the response, or its beginning.
        thinking_marks: what begins and what ends the thinking.
        complete: whether the text is all of the response.
    """
    begin_of_thinking, end_of_thinking = thinking_marks
    ends: list[int] = []
    start = 0
    for match in _possible_ends(end_of_thinking).finditer(text):
        segment = text[start : match.end()].replace(begin_of_thinking, "").strip()
        shortest = SHORTEST_SENTENCE if match["sentence"] else 1
        if len(segment) >= shortest:
            start = match.end()
            ends.append(start)
    if complete and text[start:].strip():
        ends.append(len(text.rstrip()))
    return ends
