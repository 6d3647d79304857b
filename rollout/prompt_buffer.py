"""Prompts in flight: more than a step takes, so that no step waits for the longest responses and no prompt is lost.

With ``rollout.oversample`` above 1, a step takes the prompts whose responses are all finished first. Short responses
finish first, so the batch of a step is biased towards them. The bias evens out over steps, because the prompts that are
left over come first in the next step, and every prompt is taken once.

A prompt that is left over is by default generated again from its beginning. Where ``Sampling.round_tokens`` is set, its
responses instead continue as partial rollouts with the next weights. Their tokens then come from several weight
versions, so the loss must compute its importance ratios from the log-probs that were recorded with the tokens.

Which prompts a step takes depends on token counts alone, never on a clock.
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
    """A prompt as the caller has it.

    ``prompt`` is for the engines. ``vision`` is the input of the trainer's vision tower, None for a text prompt.
    """

    @property
    def prompt(self) -> Prompt: ...

    @property
    def vision(self) -> Any: ...


@dataclass(eq=False)
class RolloutGroup:
    """A prompt and the responses to it that have been generated so far."""

    processed: ProcessedPrompt
    # The prompt's place in the data: the number of the draw, and the index of the prompt in that draw.
    drawn: tuple[int, int]
    # Sample index → a batch of one response, finished or partial.
    responses: dict[int, TokenBatch] = field(default_factory=dict)

    def is_complete(self, samples_per_prompt: int) -> bool:
        finished = [r for r in self.responses.values() if r.finish_reasons != [UNFINISHED]]
        return len(finished) == samples_per_prompt


class PromptBuffer:
    """The groups that wait or are in flight, oldest first. The buffer is the same on every rank.

    ``draw(i)`` returns the i-th ``prompts_per_step`` prompts of the data. A step takes ``prompts_per_step`` groups,
    each with ``samples_per_prompt`` responses.
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
        """Return the state of the buffer for a checkpoint: plain JSON, and the responses in the buffer.

        The responses include partial rollouts. Call it between two steps, also while a generation is running.
        """
        held = [response for group in self.groups for response in group.responses.values()]
        places = [[*group.drawn, len(group.responses)] for group in self.groups]
        return {"draws": self.draws, "groups": places}, batches.concatenate(held)

    def load(self, progress: dict[str, Any], responses: TokenBatch) -> None:
        """Restore the buffer from what :meth:`state` returned."""
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
        """Return the oldest ``num_in_flight`` groups with different prompts, and draw new groups if there are too few.

        When a prompt occurs twice in the buffer, the later group waits until the earlier one has been taken.

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
        """Return a request for each unfinished response of the groups. A partial rollout continues from its tokens."""
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
        """Remove the oldest ``prompts_per_step`` complete groups from the buffer and return them.

        Returns None when there are too few complete groups. The other groups keep their responses if partial rollouts
        may continue (``Sampling.round_tokens``). Otherwise their responses are dropped, and their prompts are generated
        again.
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
    """The groups of one step, which are generated in the background from :meth:`start` on."""

    def __init__(
        self, buffer: PromptBuffer, fleet: Fleet, group: dist.ProcessGroup, on_response: OnResponse | None = None
    ) -> None:
        self.buffer = buffer
        self.fleet = fleet
        self.process_group = group
        self.on_response = on_response

    def start(self, step: int) -> None:
        """Start the generation of a step. Every rank must call this."""
        self.step = step
        self.groups = self.buffer.in_flight()
        self._next_round()

    def collect(self, resync: Callable[[], object]) -> TokenBatch:
        """Collective: return the responses of the step's groups and the vision inputs of their prompts.

        :meth:`Generation.collect` explains ``resync``, and which rank holds the tokens of which responses.
        """
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
        """Collective: give every rank the tokens of the responses that stay in the buffer.

        They are needed because the engines of another node may continue them, and because a checkpoint holds them.
        Within a step, only the partial rollouts are shared, because only they continue.
        """
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
        # Without partial rollouts, the round ends when the last group that the step takes is complete.
        cuts = sampling.round_tokens is None and len(self.groups) > self.buffer.prompts_per_step
        num_complete = self.buffer.prompts_per_step if cuts else None
        self.generation = Generation(self.fleet, requests, sampling, self.on_response, num_complete)


def complete_batch(groups: Sequence[RolloutGroup], samples_per_prompt: int) -> TokenBatch:
    """Return the responses of the groups with the vision inputs of their prompts, ordered by group and sample index."""
    rows = [group.responses[index] for group in groups for index in range(samples_per_prompt)]
    return replace(
        batches.concatenate(rows),
        group_index=np.repeat(np.arange(len(groups), dtype=np.int32), samples_per_prompt),
        vision=[group.processed.vision for group in groups],
    )
