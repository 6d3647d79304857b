"""Batches whose tokens some ranks hold, for the job of ``worker.py`` and its test."""

import numpy as np

from megatron_ext import batch as batches
from megatron_ext.batch import Array, Prompt, TokenBatch

RANKS = 4
RESPONSES = 12
# Who holds each response at first. The fourth is held twice; the sixth is empty.
HOLDERS = [{0}, {2}, {0}, {0, 2}, {2}, set(), {3}, {3}, {0}, {2}, {2}, {0}]
LENGTHS = [5, 1, 40, 3, 7, 0, 2, 11, 4, 1, 6, 9]


def whole() -> TokenBatch:
    """The batch with all tokens."""
    numbers = np.random.default_rng(0)
    prompts = [Prompt(f"p{n}", np.arange(n + 1, dtype=np.int32)) for n in range(3)]
    batch = batches.build(
        prompts,
        [numbers.integers(0, 1 << 30, length) for length in LENGTHS],
        prompt_index=np.repeat(np.arange(3), 4),
        logprobs=[numbers.random(length) for length in LENGTHS],
        loss_mask=[numbers.random(length) < 0.5 for length in LENGTHS],
        version=4,
    )
    columns = {name: numbers.random(sum(LENGTHS)) for name in ("returns", "advantages")}
    return batch.with_columns(**columns).with_response_columns(weights=numbers.random(RESPONSES))


def holding(batch: TokenBatch, wanted: Array | list[bool]) -> TokenBatch:
    """The tokens of the wanted responses alone, response by response."""
    rows = [batch.select([i]) if of_i else batch.select([i]).without_tokens() for i, of_i in enumerate(wanted)]
    return batches.concatenate(rows)


def wishes() -> list[Array]:
    """bool [ranks, responses] each: random ones; what replicas of two ranks want; all want all; none wants any; one
    rank wants what it holds, another all."""
    numbers = np.random.default_rng(1)
    random = [numbers.random((RANKS, RESPONSES)) < share for share in (0.2, 0.5, 0.9)]
    replicas = np.repeat(numbers.random((2, RESPONSES)) < 0.5, 2, axis=0)
    nobody = np.zeros((RANKS, RESPONSES), np.bool_)
    one = nobody.copy()
    one[0] = [0 in of_response for of_response in HOLDERS]
    one[1] = True
    return [*random, replicas, ~nobody, nobody, one]
