"""Does the response repeat itself? For a mix: {rule: repetition, arguments: {words: 4}}."""

from rewards.verdict import Row, Verdict


def score(row: Row, response: str, *, words: int) -> Verdict:
    """The share of distinct n-grams among all n-grams of the response, thinking included, with n = ``words``.

    It is 1 "varied" if no n-gram occurs twice, and below 1 "repetitive". (Yeo et al. 2025, arXiv 2502.03373, penalise
    the repeated ones.)
    """
    if words < 1:
        raise ValueError(f"words={words}: use 1 or more")
    response_words = response.lower().split()
    runs = [tuple(response_words[i : i + words]) for i in range(len(response_words) - words + 1)]
    share = len(set(runs)) / len(runs) if runs else 1.0
    return Verdict(share, "varied" if share == 1 else "repetitive")
