"""Is the final answer of a verifiable task right? SafeWork-R1's rule check (label `general_rule`), by exact match."""

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import numbers_and_words, without_quotes

# So many of the request's words in a row are copied and no answer: the end of a list may be the answer.
COPIED = 3


def score(row: Row, response: str) -> Verdict:
    """1 "correct" or 0 "wrong", by the row's ``answer``.

    A single number or word must be the last one that the response does not copy from the prompt in a row of COPIED or
    more (neither listing candidates nor repeating the prompt helps); an answer of several must be the complete
    response, in order. Numbers are compared by value: "1,000" and "1000.0" are one. Raises ValueError for a row
    without ``answer``.
    """
    if "answer" not in row:
        raise ValueError(f"row {row['id']!r} has no `answer`; drop `capability` from the mix of label {row['label']!r}")
    reference = numbers_and_words(row["answer"])
    if len(reference) == 1:
        own = without_quotes(response, row["prompt"], COPIED)
        answer = numbers_and_words(own)[-1:]
    else:
        answer = numbers_and_words(response)
    if not answer:
        return Verdict(0.0, "no answer")
    return Verdict(1.0, "correct") if answer == reference else Verdict(0.0, "wrong")
