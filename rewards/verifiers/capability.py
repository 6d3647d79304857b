"""Is the final answer of a verifiable task right? SafeWork-R1's rule check (label `general_rule`), by exact match."""

from rewards.verdict import Row, Verdict
from rewards.verifiers.text import numbers_and_words, without_quotes

# This many words in a row that also occur in the request are a copy of it, not an answer. Fewer may be the answer, e.g.
# the end of a list.
COPIED = 3


def score(row: Row, response: str) -> Verdict:
    """1 "correct" if the response gives the row's ``answer``, else 0 "wrong", or 0 "no answer".

    If ``answer`` is a single number or word, it must be the last one of the response. Sequences of COPIED or more words
    that the response copies from the prompt are left out. So neither listing candidates nor repeating the prompt helps.
    If ``answer`` has several numbers or words, they must be the complete response, in order.

    Numbers are compared by value, so "1,000" and "1000.0" are equal. Raises ValueError for a row without ``answer``.
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
