"""The responses of a ``TokenBatch`` as plain Python values, and what an engine of the tests answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext import batch as batches
from megatron_ext.batch import Prompt, TokenBatch


@dataclass(frozen=True)
class PlainResponse:
    """``forced``: the places in the response that the loss mask leaves out. ``versions``: that of each token."""

    prompt_id: str
    sample_index: int
    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    forced: list[int]
    versions: list[int]
    finish_reason: str
    failure: str
    verdicts: dict[str, Any]

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample_index


def make_prompt(prompt_id: str, token_ids: Sequence[int]) -> Prompt:
    """A prompt of text alone."""
    return Prompt(prompt_id, np.array(token_ids, np.int32))


def plain(batch: TokenBatch) -> list[PlainResponse]:
    """Every response of the batch, in order."""
    responses = []
    for i, (prompt_id, sample_index) in enumerate(batch.keys):
        tokens = batch.tokens_of(i)
        runs = batch.runs_of(i)
        responses.append(
            PlainResponse(
                prompt_id=prompt_id,
                sample_index=sample_index,
                prompt=batch.prompt(i).token_ids.tolist(),
                tokens=batch.response_tokens[tokens].tolist(),
                logprobs=batch.logprobs[tokens].tolist(),
                forced=np.flatnonzero(~batch.loss_mask[tokens]).tolist(),
                versions=np.repeat(batch.versions[runs], batch.version_lengths[runs]).tolist(),
                finish_reason=batch.finish_reasons[i],
                failure=batch.failures[i],
                verdicts=batch.verdicts[i],
            )
        )
    return responses


def answer(
    requests: TokenBatch, i: int, tokens: Sequence[int], *, logprob: float, finish_reason: str, version: int
) -> TokenBatch:
    """Request i with these tokens appended, as ``Engine.generate`` yields it."""
    request = requests.select([i])
    continuation = batches.build(
        request.prompts,
        [tokens],
        logprobs=[[logprob] * len(tokens)],
        version=version,
        finish_reasons=[finish_reason],
    )
    return batches.extend(request, continuation)
