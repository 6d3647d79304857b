"""Samples for a batch of prompts from a set of engines: the same samples for the same seed, step and weights."""

import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from rollout.engine import EngineDied
from rollout.sample import Prompt, Request, Sample, Sampling


class Generator(Protocol):
    """What the sampler needs of an engine (``rollout.engine.Engine``)."""

    @property
    def alive(self) -> bool: ...

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, enough: int | None = None
    ) -> Iterator[Sample]: ...


def request_seed(seed: int, step: int, prompt_id: str, sample_index: int) -> int:
    """63-bit seed from what identifies a sample, so that a resumed run draws the same noise."""
    key = f"{seed}/{step}/{sample_index}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def make_requests(prompts: Sequence[Prompt], samples_per_prompt: int, seed: int, step: int) -> list[Request]:
    """One request per wanted sample, prompt by prompt. Raises ValueError when two prompts share a ``prompt_id``."""
    ids = [prompt.prompt_id for prompt in prompts]
    doubled = {prompt_id for prompt_id in ids if ids.count(prompt_id) > 1}
    if doubled:
        raise ValueError(f"prompt_id {sorted(doubled)[0]!r} occurs more than once in one batch: make the ids unique")
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt={samples_per_prompt}: must be at least 1")
    return [
        Request(
            prompt.prompt_id,
            index,
            prompt.token_ids,
            request_seed(seed, step, prompt.prompt_id, index),
            prompt.media,
        )
        for prompt in prompts
        for index in range(samples_per_prompt)
    ]


def assign(requests: Sequence[Request], parts: int, sampling: Sampling) -> list[list[Request]]:
    """The requests of each of ``parts`` engines: a prompt's on one, dearest prompt first to the least loaded.

    The cost of a prompt is its tokens once (its samples share them) and what each sample may still get. Longest
    processing time first (Graham 1969): the largest load is at most 4/3 of the best possible one. It is fixed before
    anything runs: an engine that took over others' requests when idle would change which sequences run side by side,
    and with that the last bits. Each part keeps the order of ``requests``.
    """
    costs: dict[str, int] = {}
    for request in requests:
        left = sampling.max_tokens - len(request.begun_token_ids)
        costs[request.prompt_id] = costs.get(request.prompt_id, len(request.prompt_token_ids)) + left
    loads, place = [0] * parts, {}
    for prompt_id in sorted(costs, key=lambda prompt_id: -costs[prompt_id]):  # stable: ties in the order of the batch
        place[prompt_id] = loads.index(min(loads))
        loads[place[prompt_id]] += costs[prompt_id]
    return [[request for request in requests if place[request.prompt_id] == part] for part in range(parts)]


def shares(enough: int, sizes: Sequence[int]) -> list[int]:
    """``enough`` whole numbers split in proportion to ``sizes`` (largest remainders), none above its size."""
    exact = [enough * size / sum(sizes) for size in sizes]
    rest = enough - sum(map(int, exact))
    favoured = sorted(range(len(sizes)), key=lambda i: int(exact[i]) - exact[i])[:rest]  # stable
    return [int(share) + (i in favoured) for i, share in enumerate(exact)]


def stream(
    engines: Sequence[Generator],
    requests: Sequence[Request],
    sampling: Sampling,
    enough: int | None = None,
    finished: Iterable[tuple[str, int]] = (),
) -> Iterator[Sample]:
    """A sample of each request that is not among ``finished``, as the engines finish them.

    With ``enough``, only until so many prompts have all their samples. Each engine has its share of that number, and
    cuts its other prompts between two of its steps, so that which prompts those are is the same each time.

    What an engine that dies has not finished is asked of those that are left, once they have finished their own: these
    are bit for bit those of an undisturbed batch. Raises EngineDied when none is left, any other failure at once.
    """
    missing = {request.key: request for request in requests}
    left = Counter(request.prompt_id for request in requests)
    for key in finished:
        del missing[key]
        left[key[0]] -= 1
    died: EngineDied | None = None
    while missing and (still := None if enough is None else enough - list(left.values()).count(0)) != 0:
        alive = [engine for engine in engines if engine.alive]
        if not alive:
            raise died or EngineDied(f"none of the {len(engines)} engines is alive: restart and sync them")
        for outcome in _round(alive, list(missing.values()), sampling, still):
            if isinstance(outcome, EngineDied):
                died = outcome
            else:
                del missing[outcome.key]
                left[outcome.prompt_id] -= 1
                yield outcome


def _round(
    engines: Sequence[Generator], requests: Sequence[Request], sampling: Sampling, enough: int | None
) -> Iterator[Sample | EngineDied]:
    """Each engine's part at once: its samples, and the death of each that dies. Raises any other failure."""
    results: queue.SimpleQueue[Sample | Exception | None] = queue.SimpleQueue()

    def drain(engine: Generator, part: Sequence[Request], share: int | None) -> None:
        try:
            for sample in engine.generate(part, sampling, share):
                results.put(sample)
        except Exception as error:  # handed to the caller's thread
            results.put(error)
        results.put(None)

    parts = assign(requests, len(engines), sampling)
    sizes = [len({request.prompt_id for request in part}) for part in parts]
    split: Sequence[int | None] = [None] * len(parts) if enough is None else shares(enough, sizes)
    busy = [work for work in zip(engines, parts, split, strict=True) if work[1] and work[2] != 0]
    for work in busy:
        threading.Thread(target=drain, args=work, daemon=True).start()
    running = len(busy)
    while running:
        match results.get():
            case None:
                running -= 1
            case Sample() | EngineDied() as outcome:
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
) -> list[Sample]:
    """``samples_per_prompt`` samples of every prompt, ordered by prompt and then by sample index.

    The seed of each sample is derived from (``seed``, ``step``, ``prompt_id``, sample index): with the same weights
    and the same engines the same call gives the same tokens and log-probabilities. Raises ``EngineError`` when an
    engine refuses or all are dead, ValueError for duplicate prompt ids.
    """
    requests = make_requests(prompts, samples_per_prompt, seed, step)
    return in_order(requests, stream(engines, requests, sampling))


def in_order(requests: Sequence[Request], samples: Iterable[Sample]) -> list[Sample]:
    """The samples in the order of their requests."""
    found = {sample.key: sample for sample in samples}
    return [found[request.key] for request in requests]
