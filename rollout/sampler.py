"""Samples for a batch of prompts from a set of engines: the same samples for the same seed, step and weights."""

import hashlib
import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

from rollout.sample import Prompt, Request, Sample, Sampling


class Generator(Protocol):
    """What the sampler needs of an engine (``rollout.engine.Engine``)."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sample]: ...


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


def split_evenly(requests: Sequence[Request], parts: int) -> list[Sequence[Request]]:
    """``parts`` contiguous slices, at most one longer than another; a prompt's samples mostly stay together."""
    bounds = [len(requests) * i // parts for i in range(parts + 1)]
    return [requests[a:b] for a, b in itertools.pairwise(bounds)]


def stream(
    engines: Sequence[Generator],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    samples_per_prompt: int,
    seed: int,
    step: int,
) -> Iterator[Sample]:
    """Samples as the engines finish them. The first failure of an engine is raised here."""
    requests = make_requests(prompts, samples_per_prompt, seed, step)
    results: queue.SimpleQueue[Sample | Exception | None] = queue.SimpleQueue()

    def drain(engine: Generator, part: Sequence[Request]) -> None:
        try:
            for sample in engine.generate(part, sampling):
                results.put(sample)
            results.put(None)
        except Exception as error:  # handed to the caller's thread, which raises it
            results.put(error)

    parts = [(engine, part) for engine, part in zip(engines, split_evenly(requests, len(engines)), strict=True) if part]
    for engine, part in parts:
        threading.Thread(target=drain, args=(engine, part), daemon=True).start()
    running = len(parts)
    while running:
        match results.get():
            case None:
                running -= 1
            case Exception() as error:
                raise error
            case sample:
                yield sample


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
    engine refuses or dies, ValueError for duplicate prompt ids.
    """
    samples = stream(engines, prompts, sampling, samples_per_prompt=samples_per_prompt, seed=seed, step=step)
    order = {prompt.prompt_id: i for i, prompt in enumerate(prompts)}
    return sorted(samples, key=lambda sample: (order[sample.prompt_id], sample.sample_index))
