"""A judge or reward model on its server, as a verifier. Requests can also be sent without waiting for the reply."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from rewards.client import Client
from rewards.verdict import Row, Verdict, VerifierResult
from rewards.verifiers.judges import Judge, Scalar
from rewards.verifiers.text import without_thinking


@dataclass(frozen=True)
class ServedVerifier:
    """A verifier whose verdicts come from a model on a server."""

    template: Judge | Scalar
    server: str  # its name in ``rewards.servers``
    model: str  # the model that the server serves
    # Fields that are added to the body of every request, e.g. {max_tokens: 64}.
    request_fields: Mapping[str, Any]
    client: Client

    def submit(self, row: Row, response: str) -> Future[VerifierResult]:
        """Send a request about the response, without its thinking. Returns at once.

        A response without an answer gets the score 0 and the label "no answer", and no request is sent.
        """
        answer = without_thinking(response)
        if not answer:
            no_answer: Future[VerifierResult] = Future()
            no_answer.set_result(Verdict(0.0, "no answer"))
            return no_answer
        request = self.template.request(row, answer, self.model)
        return self.client.submit(self.server, replace(request, body={**request.body, **self.request_fields}))

    def __call__(self, row: Row, response: str) -> VerifierResult:
        """As :meth:`submit`, but wait for the result and return it."""
        return self.submit(row, response).result()
