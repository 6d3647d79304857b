"""Verifiers: one module per verifier, each with `score(row, response) -> Verdict`."""
