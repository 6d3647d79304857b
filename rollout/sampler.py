"""Samples the responses to a batch of prompts from a set of engines.

The responses are the same for the same seed, step and weights. The requests to an engine are also a ``TokenBatch``,
whose responses are empty or are the tokens of a partial rollout to continue.
"""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np

from megatron_ext import batch as batches
from megatron_ext.batch import UNFINISHED, Array, Prompt, TokenBatch
from rollout.engine import EngineDied
from rollout.sampling import Sampling

# (prompt id, sample index).
Key = tuple[str, int]


class Generator(Protocol):
    """The interface that the sampler needs of an engine (``rollout.engine.Engine``)."""

    @property
    def alive(self) -> bool: ...

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]: ...


def request_seed(seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """Return a 63-bit seed derived from what identifies a response, so that a resumed run draws the same noise."""
    key = f"{seed}/{step}/{sample_index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def make_requests(prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, step: int) -> TokenBatch:
    """Return ``samples_per_prompt`` empty responses to each prompt, with their seeds, ordered by prompt.

    Raises ValueError when two prompts have the same ``prompt_id``, and for ``samples_per_prompt`` below 1.
    """
    counts = Counter(prompt.prompt_id for prompt in prompts)
    repeated = sorted(prompt_id for prompt_id, count in counts.items() if count > 1)
    if repeated:
        raise ValueError(f"prompt_id {repeated[0]!r} occurs more than once in one batch: make the ids unique")
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt}: must be at least 1")
    indices = range(samples_per_prompt)
    return batches.build(
        prompts,
        [[]] * (len(prompts) * samples_per_prompt),
        prompt_index=np.repeat(np.arange(len(prompts), dtype=np.int32), samples_per_prompt),
        sample_index=np.tile(np.arange(samples_per_prompt, dtype=np.int32), len(prompts)),
        seeds=[request_seed(seed, step, prompt.prompt_id, index) for prompt in prompts for index in indices],
        finish_reasons=[UNFINISHED] * (len(prompts) * samples_per_prompt),
    )


def assign(requests: TokenBatch, engines: int, sampling: Sampling) -> list[Array]:
    """Assign the requests to ``engines`` engines. Returns the indices of each engine's requests, in ascending order.

    All requests of a prompt go to one engine. The prompts are assigned in descending order of cost, each to the engine
    with the least load (longest processing time first, Graham 1969). So the largest load is at most 4/3 of the best
    possible one. The cost of a prompt is its number of tokens, counted once because its responses share them, plus the
    tokens that each response may still get.

    The assignment is fixed before anything runs. An idle engine that took over requests of another one would change
    which sequences run concurrently, and with that the lowest bits of the results.
    """
    prompt_lengths = [len(prompt.token_ids) for prompt in requests.prompts]
    remaining = sampling.max_tokens - requests.response_lengths
    costs = np.array(prompt_lengths, np.int64)
    np.add.at(costs, requests.prompt_index, remaining)
    loads = [0] * engines
    engine_of = np.zeros(len(requests.prompts), np.int64)
    # The stable sort keeps prompts of equal cost in the order of the batch.
    for prompt in np.argsort(-costs, kind="stable"):
        engine_of[prompt] = loads.index(min(loads))
        loads[engine_of[prompt]] += int(costs[prompt])
    return [np.flatnonzero(engine_of[requests.prompt_index] == engine) for engine in range(engines)]


def shares(total: int, sizes: Sequence[int]) -> list[int]:
    """Split ``total`` into integers in proportion to ``sizes``, by largest remainders. No share is above its size."""
    exact = [total * size / sum(sizes) for size in sizes]
    rest = total - sum(map(int, exact))
    # The sort is stable.
    by_remainder = sorted(range(len(sizes)), key=lambda i: int(exact[i]) - exact[i])
    rounded_up = by_remainder[:rest]
    return [int(share) + (i in rounded_up) for i, share in enumerate(exact)]


def stream(
    engines: Sequence[Generator],
    requests: TokenBatch,
    sampling: Sampling,
    num_complete: int | None = None,
    finished: Iterable[Key] = (),
) -> Iterator[TokenBatch]:
    """Yield the response to each request that is not among ``finished``, as the engines finish them.

    With ``num_complete``, stop when that many prompts have all their responses. Each engine has a share of that number,
    and drops its other prompts between two of its steps. So the dropped prompts are the same each time.

    When an engine dies, its unfinished requests go to the remaining engines after these have finished their own
    requests. So the engines' own responses are bitwise those of an undisturbed batch. Raises EngineDied when no engine
    is left, and any other failure at once.
    """
    missing = {key: place for place, key in enumerate(requests.keys)}
    remaining = Counter(prompt_id for prompt_id, _ in missing)
    for key in finished:
        del missing[key]
        remaining[key[0]] -= 1
    death: EngineDied | None = None
    while missing:
        still = None if num_complete is None else num_complete - list(remaining.values()).count(0)
        if still == 0:
            return
        alive = [engine for engine in engines if engine.alive]
        if not alive:
            raise death or EngineDied(f"none of the {len(engines)} engines is alive: restart and sync them")
        for outcome in _round(alive, requests.select(list(missing.values())), sampling, still):
            if isinstance(outcome, EngineDied):
                death = outcome
            else:
                (key,) = outcome.keys
                del missing[key]
                remaining[key[0]] -= 1
                yield outcome


def _round(
    engines: Sequence[Generator], requests: TokenBatch, sampling: Sampling, num_complete: int | None
) -> Iterator[TokenBatch | EngineDied]:
    """Send all engines their requests at once. Yields each finished response, and an EngineDied for each engine that
    dies. Raises any other failure."""
    results: queue.SimpleQueue[TokenBatch | Exception | None] = queue.SimpleQueue()

    def drain(engine: Generator, part: TokenBatch, share: int | None) -> None:
        try:
            for response in engine.generate(part, sampling, share):
                results.put(response)
        except Exception as error:
            # The caller's thread yields or raises it.
            results.put(error)
        results.put(None)

    parts = [requests.select(indices) for indices in assign(requests, len(engines), sampling)]
    sizes = [len(part.prompts) for part in parts]
    split: Sequence[int | None] = [None] * len(parts) if num_complete is None else shares(num_complete, sizes)
    work = [(engine, part, share) for engine, part, share in zip(engines, parts, split, strict=True)]
    busy = [(engine, part, share) for engine, part, share in work if len(part) and share != 0]
    for arguments in busy:
        threading.Thread(target=drain, args=arguments, daemon=True).start()
    running = len(busy)
    while running:
        match results.get():
            case None:
                running -= 1
            case TokenBatch() | EngineDied() as outcome:
                yield outcome
            case Exception() as error:
                raise error


def generate(
    engines: Sequence[Generator],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples_per_prompt: int,
    seed: int,
    step: int,
) -> TokenBatch:
    """Generate ``samples_per_prompt`` responses to every prompt, ordered by prompt and then by sample index.

    The seed of each response is derived from (``seed``, ``step``, ``prompt_id``, sample index). So with the same
    weights and the same engines, the same call gives the same tokens and log-probs. Raises ``EngineError`` when an
    engine refuses a request or all engines are dead. Raises ValueError for duplicate prompt ids.
    """
    requests = make_requests(prompts, samples_per_prompt, seed, step)
    return in_order(requests.keys, stream(engines, requests, sampling))


def in_order(keys: Sequence[Key], responses: Iterable[TokenBatch]) -> TokenBatch:
    """Return the responses as one batch in the order of ``keys``. Keys without a response are left out."""
    batch = batches.concatenate(list(responses))
    place = {key: i for i, key in enumerate(batch.keys)}
    return batch.select([place[key] for key in keys if key in place])
