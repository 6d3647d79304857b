"""Is the response short enough? For a mix: {rule: length, arguments: {limit: 400}} in `rewards.verifiers`."""

from rewards.verdict import Row, Verdict


def score(row: Row, response: str, *, limit: int) -> Verdict:
    """1 "short" for up to ``limit`` words, thinking included.

    Above the limit the label is "long", and the score falls linearly to 0 at twice the limit (our choice).
    """
    if limit < 1:
        raise ValueError(f"limit={limit}: use 1 word or more")
    count = len(response.split())
    if count <= limit:
        return Verdict(1.0, "short")
    return Verdict(max(0.0, 2 - count / limit), "long")
