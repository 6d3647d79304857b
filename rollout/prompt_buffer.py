"""Prompts in flight: more than a step takes, so that no step waits for its longest responses, and none is lost.

With ``rollout.oversample`` above 1 a step takes the prompts whose responses are all finished first. Short responses
are finished first, so each step's batch leans towards them; it evens out because what was left over is the next step's
first, and every prompt is taken once. What is left over is either tried again from its beginning, or, where
``Sampling.round_tokens`` is set, goes on as a partial rollout under the next weights: its tokens then have several
versions, and the importance weights of the loss must be made of the log-probs that were recorded with them.

Which prompts a step takes depends on counts of tokens alone, never on a clock.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist

from megatron_ext import batch as batches
from megatron_ext.batch import UNFINISHED, Prompt, TokenBatch
from megatron_ext.routing import everywhere
from rollout.generation import Fleet, Generation, OnResponse
from rollout.sampler import make_requests, request_seed
from rollout.sampling import Sampling


class ProcessedPrompt(Protocol):
    """A prompt as the caller has it: for the engines, and what the trainer's vision tower needs (None for text)."""

    @property
    def prompt(self) -> Prompt: ...

    @property
    def vision(self) -> Any: ...


@dataclass(eq=False)
class RolloutGroup:
    """A prompt and what there is of its responses: sample index → a batch of one response.

    ``drawn`` is the prompt's place in the data: which draw, and which of that draw's prompts.
    """

    processed: ProcessedPrompt
    drawn: tuple[int, int]
    responses: dict[int, TokenBatch] = field(default_factory=dict)

    def is_complete(self, samples_per_prompt: int) -> bool:
        finished = [r for r in self.responses.values() if r.finish_reasons != [UNFINISHED]]
        return len(finished) == samples_per_prompt


class PromptBuffer:
    """Groups that wait or are in flight, oldest first, the same on every rank.

    ``draw(i)`` gives the data's i-th ``prompts_per_step`` prompts; a step takes that many groups of
    ``samples_per_prompt`` responses.
    """

    def __init__(
        self,
        draw: Callable[[int], Sequence[ProcessedPrompt]],
        sampling: Sampling,
        *,
        prompts_per_step: int,
        oversample: float,
        samples_per_prompt: int,
        seed: int,
    ) -> None:
        if oversample < 1:
            raise ValueError(f"rollout.oversample={oversample}: must be at least 1")
        self.draw = draw
        self.sampling = sampling
        self.seed = seed
        self.prompts_per_step = prompts_per_step
        self.num_in_flight = math.ceil(prompts_per_step * oversample)
        self.samples_per_prompt = samples_per_prompt
        self.groups: list[RolloutGroup] = []
        self.draws = 0

    def state(self) -> tuple[dict[str, Any], TokenBatch]:
        """What a checkpoint has to hold between two steps, also while a generation is running: plain JSON, and the
        responses that there are, partial rollouts among them."""
        held = [response for group in self.groups for response in group.responses.values()]
        places = [[*group.drawn, len(group.responses)] for group in self.groups]
        return {"draws": self.draws, "groups": places}, batches.concatenate(held)

    def load(self, progress: dict[str, Any], responses: TokenBatch) -> None:
        """Go on from :meth:`state`."""
        self.draws = progress["draws"]
        drawn = {draw: self.draw(draw) for draw, _, _ in progress["groups"]}
        self.groups = []
        first = 0
        for draw, index, count in progress["groups"]:
            held = [responses.select([i]) for i in range(first, first + count)]
            by_sample = {int(response.sample_index[0]): response for response in held}
            self.groups.append(RolloutGroup(drawn[draw][index], (draw, index), by_sample))
            first += count

    def in_flight(self) -> list[RolloutGroup]:
        """The oldest ``num_in_flight`` groups, drawn if need be. A prompt that is in flight waits for its next turn.

        Raises ValueError when the data has too few different prompts.
        """
        for _ in range(self.num_in_flight + 1):
            oldest: dict[str, RolloutGroup] = {}
            for group in self.groups:
                oldest.setdefault(group.processed.prompt.prompt_id, group)
            if len(oldest) >= self.num_in_flight:
                return list(oldest.values())[: self.num_in_flight]
            drawn = self.draw(self.draws)
            self.groups += [RolloutGroup(processed, (self.draws, i)) for i, processed in enumerate(drawn)]
            self.draws += 1
        raise ValueError(
            f"rollout.oversample: {self.num_in_flight} prompts in flight need as many different ones in the data; use "
            "less"
        )

    def requests(self, groups: Sequence[RolloutGroup], step: int) -> TokenBatch:
        """One for each response of the groups that is not finished, going on from what there is of it."""
        rows = []
        for group in groups:
            prompt = group.processed.prompt
            fresh = make_requests([prompt], self.samples_per_prompt, self.seed, step)
            if not group.responses:
                rows.append(fresh)
                continue
            for index in range(self.samples_per_prompt):
                if index not in group.responses:
                    rows.append(fresh.select([index]))
                    continue
                response = group.responses[index]
                if response.finish_reasons == [UNFINISHED]:
                    name = f"{prompt.prompt_id}/{len(response.response_tokens)}"
                    seed = request_seed(self.seed, step, name, index)
                    rows.append(replace(response, seeds=np.array([seed], np.int64)))
        return batches.concatenate(rows)

    def take(self, groups: Sequence[RolloutGroup]) -> list[RolloutGroup] | None:
        """The oldest ``prompts_per_step`` complete groups, which leave the buffer; None when there are too few yet.

        The responses of the others are kept where they may go on, and dropped where the prompt is tried again.
        """
        complete = [group for group in groups if group.is_complete(self.samples_per_prompt)]
        taken = complete[: self.prompts_per_step]
        if len(taken) < self.prompts_per_step:
            return None
        left = [group for group in groups if group not in taken]
        if self.sampling.round_tokens is None:
            for group in left:
                group.responses = {}
        self.groups = left + [group for group in self.groups if group not in groups]
        return taken


class Rollout:
    """A step's groups, generated in the background from :meth:`start` on."""

    def __init__(
        self, buffer: PromptBuffer, fleet: Fleet, group: dist.ProcessGroup, on_response: OnResponse | None = None
    ) -> None:
        self.buffer = buffer
        self.fleet = fleet
        self.process_group = group
        self.on_response = on_response

    def start(self, step: int) -> None:
        """Have the engines begin; every rank calls it."""
        self.step = step
        self.groups = self.buffer.in_flight()
        self._next_round()

    def collect(self, resync: Callable[[], object]) -> TokenBatch:
        """Collective: the step's groups and the prompts' vision inputs. ``resync``, and which rank holds the tokens of
        which responses: see :meth:`Generation.collect`."""
        while True:
            by_prompt = {group.processed.prompt.prompt_id: group for group in self.groups}
            batch = self.generation.collect(self.process_group, resync)
            for i, (prompt_id, sample_index) in enumerate(batch.keys):
                by_prompt[prompt_id].responses[sample_index] = batch.select([i])
            taken = self.buffer.take(self.groups)
            self._share_out(taken is None)
            if taken is not None:
                return complete_batch(taken, self.buffer.samples_per_prompt)
            self._next_round()

    def _share_out(self, within_step: bool) -> None:
        """Collective: every rank gets the tokens of the responses that stay in the buffer: another node's engines may
        go on with them, and a checkpoint holds them. Within a step those that go on are enough."""
        places = [
            (group.responses, index)
            for group in self.buffer.groups
            for index, response in sorted(group.responses.items())
            if not within_step or response.finish_reasons == [UNFINISHED]
        ]
        if not places:
            return
        shared = everywhere(batches.concatenate([held[index] for held, index in places]), self.process_group)
        for i, (held, index) in enumerate(places):
            held[index] = shared.select([i])

    def _next_round(self) -> None:
        requests = self.buffer.requests(self.groups, self.step)
        sampling = self.buffer.sampling
        # Where nothing is carried over, the round ends with the last group that the step takes.
        cuts = sampling.round_tokens is None and len(self.groups) > self.buffer.prompts_per_step
        num_complete = self.buffer.prompts_per_step if cuts else None
        self.generation = Generation(self.fleet, requests, sampling, self.on_response, num_complete)


def complete_batch(groups: Sequence[RolloutGroup], samples_per_prompt: int) -> TokenBatch:
    """The groups' responses, group by group and by sample index, with the prompts' vision inputs."""
    rows = [group.responses[index] for group in groups for index in range(samples_per_prompt)]
    return replace(
        batches.concatenate(rows),
        group_index=np.repeat(np.arange(len(groups), dtype=np.int32), samples_per_prompt),
        vision=[group.processed.vision for group in groups],
    )
