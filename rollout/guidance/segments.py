"""Segments: the sentences and lines of a response, in the thinking and in the answer.

A value model is trained on the prefixes that end with a segment. Guided decoding requests the values of such prefixes.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

# Characters. A shorter sentence does not end a segment, so that "1.", "Dr." and "e.g." end none. Our choice.
SHORTEST_SENTENCE = 12
CLOSING = r"[\"'”’»)\]]*"
CLOSING_WIDE = r"[”’」』）]*"


@lru_cache
def _possible_ends(end_of_thinking: str) -> re.Pattern[str]:
    """Return a pattern whose matches end where a segment may end.

    The pattern also checks what follows, so that an end in a prefix of a text is also one in the whole text.
    """
    sentence = rf"[.!?…]+{CLOSING}(?=\s)"
    wide_sentence = rf"[。！？]+{CLOSING_WIDE}(?=[^。！？”’」』）])"
    return re.compile(rf"(?P<sentence>{sentence}|{wide_sentence})|(?=\n)|{re.escape(end_of_thinking)}")


def segment_ends(text: str, thinking_marks: Sequence[str], complete: bool) -> list[int]:
    """Return where the segments of a response end, as numbers of characters from its start, ascending.

    A segment ends with a sentence, with a line that is not empty, and with the mark that ends the thinking. Whitespace
    after a sentence or line belongs to the next segment. The last segment ends with the text if the text is
    ``complete``. Otherwise the last segment may continue and is left out. So the ends do not change when the text
    grows, and they can be computed while the model generates.

    Args:
        text: the response, or its beginning.
        thinking_marks: the texts that begin and end the thinking.
        complete: whether the text is the whole response.
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
