"""A judge joined to its server: a verifier like any other, which can also be asked without waiting."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from rewards.client import Client
from rewards.verdict import Judgement, Row, Verdict
from rewards.verifiers.judges import Judge, Scalar
from rewards.verifiers.text import without_thinking


@dataclass(frozen=True)
class ServedVerifier:
    """``request`` are further fields of each request, e.g. {max_tokens: 64}."""

    judge: Judge | Scalar
    server: str
    model: str
    request: Mapping[str, Any]
    client: Client

    def submit(self, row: Row, response: str) -> Future[Judgement]:
        """Start judging the answer without its thinking. An answer that isn't there is worth 0, "no answer"."""
        if not (answer := without_thinking(response)):
            done: Future[Judgement] = Future()
            done.set_result(Verdict(0.0, "no answer"))
            return done
        ask = self.judge.ask(row, answer, self.model)
        return self.client.submit(self.server, replace(ask, body={**ask.body, **self.request}))

    def __call__(self, row: Row, response: str) -> Judgement:
        return self.submit(row, response).result()
