"""Is the response short enough? For a mix: {rule: length, arguments: {limit: 400}} in `rewards.verifiers`."""

from rewards.verdict import Row, Verdict


def score(row: Row, response: str, *, limit: int) -> Verdict:
    """1 "short" up to ``limit`` words, thinking included, then falling in a line to 0 at twice as many (our choice)."""
    if limit < 1:
        raise ValueError(f"limit={limit}: use 1 word or more")
    count = len(response.split())
    if count <= limit:
        return Verdict(1.0, "short")
    return Verdict(max(0.0, 2 - count / limit), "long")
