"""Prompts in flight: more than a step takes, so that no step waits for its longest responses, and none is lost.

With ``rollout.oversample`` above 1 a step takes the prompts whose samples are all finished first. Short responses are
finished first, so each step's batch leans towards them; it evens out because what was left over is the next step's
first, and every prompt is taken once. What is left over is either tried again from its beginning, or, where
``Sampling.round_tokens`` is set, goes on under the next weights: its tokens then have several versions, and the
importance weights of the loss must be made of the log-probs that were recorded with them.

Which prompts a step takes depends on counts of tokens alone, never on a clock.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from rollout.generation import Fleet, Generation
from rollout.sample import Prompt, Request, Sample, Sampling
from rollout.sampler import request_seed


@dataclass(eq=False)
class RolloutGroup:
    """A prompt and what there is of its samples, by sample index; ``results`` are what ``on_sample`` said of them.

    ``asked`` is the prompt as the caller has it, with a ``prompt`` for the engines; ``drawn`` its place in the data:
    which draw, and which of that draw's prompts.
    """

    asked: Any
    drawn: tuple[int, int]
    samples: dict[int, Sample] = field(default_factory=dict)
    results: dict[int, Any] = field(default_factory=dict)

    def whole(self, count: int) -> bool:
        finished = [sample for sample in self.samples.values() if sample.finish_reason != "unfinished"]
        return len(finished) == count


class PromptBuffer:
    """Groups that wait or are in flight, oldest first, the same on every rank.

    ``draw(i)`` gives the data's i-th ``wanted`` prompts; a step takes ``wanted`` groups of ``samples_per_prompt``.
    """

    def __init__(
        self,
        draw: Callable[[int], Sequence[Any]],
        sampling: Sampling,
        *,
        wanted: int,
        oversample: float,
        samples_per_prompt: int,
        seed: int,
    ) -> None:
        if oversample < 1:
            raise ValueError(f"rollout.oversample={oversample}: must be at least 1")
        self.draw, self.sampling, self.seed = draw, sampling, seed
        self.wanted, self.size, self.samples_per_prompt = wanted, math.ceil(wanted * oversample), samples_per_prompt
        self.groups: list[RolloutGroup] = []
        self.draws = 0

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint has to hold between two steps, also while a generation is running."""
        return {
            "draws": self.draws,
            "groups": [
                [*group.drawn, [s.to_json() for s in group.samples.values()], list(group.results.items())]
                for group in self.groups
            ],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`to_json`."""
        self.draws = state["draws"]
        batches = {draw: self.draw(draw) for draw, *_ in state["groups"]}
        self.groups = [
            RolloutGroup(
                batches[draw][index],
                (draw, index),
                {s["sample_index"]: Sample.from_json(s) for s in samples},
                dict(results),
            )
            for draw, index, samples, results in state["groups"]
        ]

    def in_flight(self) -> list[RolloutGroup]:
        """The oldest ``size`` groups, drawn if need be. A prompt that is in flight already waits for its next turn.

        Raises ValueError when the data has too few different prompts.
        """
        for _ in range(self.size + 1):
            first: dict[str, RolloutGroup] = {}
            for group in self.groups:
                first.setdefault(group.asked.prompt.prompt_id, group)
            if len(first) >= self.size:
                return list(first.values())[: self.size]
            drawn = self.draw(self.draws)
            self.groups += [RolloutGroup(asked, (self.draws, i)) for i, asked in enumerate(drawn)]
            self.draws += 1
        raise ValueError(
            f"rollout.oversample: {self.size} prompts in flight need as many different ones in the data; use less"
        )

    def requests(self, groups: Sequence[RolloutGroup], step: int) -> list[Request]:
        """One for each sample of the groups that is not finished, going on from what there is of it."""
        made = []
        for group in groups:
            prompt: Prompt = group.asked.prompt
            for index in range(self.samples_per_prompt):
                begun = group.samples.get(index)
                if begun is None or begun.finish_reason == "unfinished":
                    name = f"{prompt.prompt_id}/{len(begun.response_token_ids)}" if begun else prompt.prompt_id
                    seed = request_seed(self.seed, step, name, index)
                    made.append(Request(prompt.prompt_id, index, prompt.token_ids, seed, prompt.media, begun))
        return made

    def take(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup] | None:
        """The oldest ``wanted`` whole groups, which leave the pool; None when there are too few yet.

        The samples of the others are kept where they may go on, and dropped where the prompt is tried again.
        """
        whole = [group for group in groups if group.whole(self.samples_per_prompt)][: self.wanted]
        if len(whole) < self.wanted:
            return None
        left = [group for group in groups if group not in whole]
        if self.sampling.round_tokens is None:
            for group in left:
                group.samples, group.results = {}, {}
        self.groups = left + [group for group in self.groups if group not in groups]
        return whole


class Rollout:
    """A step's groups, made in the background from :meth:`start` on."""

    def __init__(
        self,
        pool: PromptBuffer,
        fleet: Fleet,
        group: dist.ProcessGroup,
        on_sample: Callable[[Sample], Any] | None = None,
    ) -> None:
        self.pool, self.fleet, self.group, self.on_sample = pool, fleet, group, on_sample

    def start(self, step: int) -> None:
        """Have the engines begin; every rank calls it."""
        self.step, self.groups = step, self.pool.in_flight()
        self._next_round()

    def collect(self, resync: Callable[[], object]) -> list[RolloutGroup]:
        """Collective: the step's groups. ``resync`` as in :meth:`Generation.collect`."""
        while True:
            by_id = {group.asked.prompt.prompt_id: group for group in self.groups}
            for sample, result in zip(*self.generation.collect(self.group, resync), strict=True):
                by_id[sample.prompt_id].samples[sample.sample_index] = sample
                by_id[sample.prompt_id].results[sample.sample_index] = result
            if (whole := self.pool.take(self.groups)) is not None:
                return whole
            self._next_round()

    def _next_round(self) -> None:
        requests, sampling = self.pool.requests(self.groups, self.step), self.pool.sampling
        cut = sampling.round_tokens is None and len(self.groups) > self.pool.wanted
        self.generation = Generation(self.fleet, requests, sampling, self.on_sample, self.pool.wanted if cut else None)
