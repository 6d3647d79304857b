"""Responses to a batch of prompts from a set of engines: the same responses for the same seed, step and weights.

The requests to an engine are a ``TokenBatch`` too: each of its responses is empty, or goes on from the tokens of a
partial rollout.
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

Key = tuple[str, int]  # prompt id, sample index


class Generator(Protocol):
    """What the sampler needs of an engine (``rollout.engine.Engine``)."""

    @property
    def alive(self) -> bool: ...

    def generate(
        self, requests: TokenBatch, sampling: Sampling, num_complete: int | None = None
    ) -> Iterator[TokenBatch]: ...


def request_seed(seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """63-bit seed from what identifies a response, so that a resumed run draws the same noise."""
    key = f"{seed}/{step}/{sample_index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def make_requests(prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, step: int) -> TokenBatch:
    """``samples_per_prompt`` empty responses to each prompt, prompt by prompt, with their seeds.

    Raises ValueError when two prompts share a ``prompt_id``.
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
    """Which requests each of ``engines`` engines gets: a prompt's all go to one, costliest prompt first to the least
    loaded. Each engine keeps the order of ``requests``.

    The cost of a prompt is its tokens once (its responses share them) and what each response may still get. Longest
    processing time first (Graham 1969): the largest load is at most 4/3 of the best possible one. The assignment is
    fixed before anything runs: an engine that took over others' requests when idle would change which sequences run
    side by side, and with that the lowest bits.
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
    """``total`` split into integers in proportion to ``sizes`` (largest remainders), none above its size."""
    exact = [total * size / sum(sizes) for size in sizes]
    rest = total - sum(map(int, exact))
    by_remainder = sorted(range(len(sizes)), key=lambda i: int(exact[i]) - exact[i])  # stable
    rounded_up = by_remainder[:rest]
    return [int(share) + (i in rounded_up) for i, share in enumerate(exact)]


def stream(
    engines: Sequence[Generator],
    requests: TokenBatch,
    sampling: Sampling,
    num_complete: int | None = None,
    finished: Iterable[Key] = (),
) -> Iterator[TokenBatch]:
    """The response to each request that is not among ``finished``, one by one, as the engines finish them.

    With ``num_complete``, only until so many prompts have all their responses. Each engine has its share of that
    number, and cuts its other prompts between two of its steps, so that which prompts those are is the same each time.

    What an engine that dies has not finished is asked of those that are left, once they have finished their own
    requests: their responses are bit for bit those of an undisturbed batch. Raises EngineDied when none is left, any
    other failure at once.
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
    """All engines' requests at once: each finished response, and the death of each engine that dies. Raises any other
    failure."""
    results: queue.SimpleQueue[TokenBatch | Exception | None] = queue.SimpleQueue()

    def drain(engine: Generator, part: TokenBatch, share: int | None) -> None:
        try:
            for response in engine.generate(part, sampling, share):
                results.put(response)
        except Exception as error:  # handed to the caller's thread
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
    """``samples_per_prompt`` responses to every prompt, ordered by prompt and then by sample index.

    The seed of each response is derived from (``seed``, ``step``, ``prompt_id``, sample index): with the same weights
    and the same engines the same call gives the same tokens and log-probabilities. Raises ``EngineError`` when an
    engine refuses or all are dead, ValueError for duplicate prompt ids.
    """
    requests = make_requests(prompts, samples_per_prompt, seed, step)
    return in_order(requests.keys, stream(engines, requests, sampling))


def in_order(keys: Sequence[Key], responses: Iterable[TokenBatch]) -> TokenBatch:
    """One batch of the responses, in the order of ``keys``; keys without a response are left out."""
    batch = batches.concatenate(list(responses))
    place = {key: i for i, key in enumerate(batch.keys)}
    return batch.select([place[key] for key in keys if key in place])
