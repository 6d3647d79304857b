"""Verifiers of the tests, in a module that is quick to import: each of a run's function processes imports it."""

from rewards.verdict import Row, Verdict


def letters(row: Row, response: str) -> Verdict:
    """The share of ASCII letters, which even a random model does not always fail."""
    good = sum(character.isascii() and character.isalpha() for character in response)
    return Verdict(good / max(len(response), 1), "some letters" if good else "no letters")


def always_right(row: Row, response: str) -> Verdict:
    """A verifier whose groups teach nothing."""
    return Verdict(1.0, "right")


def fails_of_odd_length(row: Row, response: str) -> Verdict:
    if len(response) % 2:
        raise ValueError("an odd number of characters")
    return Verdict(1 / (1 + len(response)), "even")
