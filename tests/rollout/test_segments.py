"""Where segments end, and that a text which grows keeps its ends."""

import random

import pytest

from rollout.guidance.segments import segment_ends

MARKS = ("<think>", "</think>")


def segments(text: str, complete: bool = True) -> list[str]:
    ends = segment_ends(text, MARKS, complete)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n", []),
        ("Sure, here it is", ["Sure, here it is"]),
        ("This is one. This is two!  ", ["This is one.", " This is two!"]),
        ('He said "Go away now!" Then he left.', ['He said "Go away now!"', " Then he left."]),
        ("It is 3.14159265 metres. Yes, really...", ["It is 3.14159265 metres.", " Yes, really..."]),
        ("1. Mix the flour. 2. Bake it well.", ["1. Mix the flour.", " 2. Bake it well."]),  # a number is no sentence
        ("First line\n\n- a\n- b", ["First line", "\n\n- a", "\n- b"]),
        ("3 + 4 = 7\nSo 7.", ["3 + 4 = 7", "\nSo 7."]),
        (
            "<think>\nIs it safe?\nNo.</think>\n\nSorry, no.",
            ["<think>\nIs it safe?", "\nNo.</think>", "\n\nSorry, no."],
        ),
        ("<think>It is. </think>Yes", ["<think>It is. </think>", "Yes"]),
        (
            "这是一个安全的问题，可以回答。好的，答案如下：四十二。",
            ["这是一个安全的问题，可以回答。", "好的，答案如下：四十二。"],
        ),
    ],
)
def test_a_segment_is_a_sentence_or_a_line(text: str, expected: list[str]) -> None:
    assert segments(text) == expected


def test_a_text_that_grows_keeps_its_ends() -> None:
    """So what a client finds in a stream is what the value model was trained on."""
    chance = random.Random(4)
    pieces = [
        "word",
        " ",
        "Long enough it is",
        ".",
        "!",
        "\n",
        '"',
        ")",
        "</think>",
        "<think>",
        "好",
        "。",
        "」",
        "3",
        "…",
    ]
    for _ in range(200):
        text = "".join(chance.choices(pieces, k=30))
        ends = segment_ends(text, MARKS, complete=False)
        assert set(ends) <= set(segment_ends(text, MARKS, complete=True))
        for length in range(len(text) + 1):
            ends_so_far = segment_ends(text[:length], MARKS, complete=False)
            assert ends_so_far == ends[: len(ends_so_far)]
            assert [end for end in ends if end < length] == [end for end in ends_so_far if end < length]
