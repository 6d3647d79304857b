"""Does the response repeat itself? For a mix: {rule: repetition, arguments: {words: 4}}."""

from rewards.verdict import Row, Verdict


def score(row: Row, response: str, *, words: int) -> Verdict:
    """Share of distinct runs of ``words`` words among all of them, thinking included: 1 when none occurs twice.

    (Yeo et al. 2025, arXiv 2502.03373, penalise the rest.) "varied" is 1, "repetitive" below.
    """
    if words < 1:
        raise ValueError(f"words={words}: use 1 or more")
    response_words = response.lower().split()
    runs = [tuple(response_words[i : i + words]) for i in range(len(response_words) - words + 1)]
    share = len(set(runs)) / len(runs) if runs else 1.0
    return Verdict(share, "varied" if share == 1 else "repetitive")
