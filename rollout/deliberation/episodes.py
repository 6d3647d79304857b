"""One episode of deliberate search by a served model. Turns and replies of the environment are as in training.

:class:`rollout.environment.Turns` determines what the environment adds, how it is encoded, and when an episode ends.
:func:`rollout.search.steps` determines the steps and their faults.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_ext import batch as batches
from megatron_ext.batch import UNFINISHED, Prompt, TokenBatch
from rollout import environment, search
from rollout.deliberation.voting import Reply
from rollout.environment import Segment, Turns
from rollout.guidance.clients import Generator
from rollout.guidance.decoding import Question
from rollout.retrieval import Document
from rollout.sampler import request_seed
from rollout.search import Step
from rollout.thinking import whole_text

# Steps that are incomplete at the end of the text so far: they may still become another action, or wait for a reply.
OPEN = ("text", "end", "search", "read")
ENDS = [f"</{action}>" for action in search.ACTIONS]
LONGEST_END = max(map(len, ENDS))


@dataclass(frozen=True)
class ShownStep:
    """A complete step of one of the samples, with its verification."""

    sample: int
    # Its ``fault`` is empty for a legal step.
    step: Step
    # The environment's reply; None for a step that it does not answer.
    reply: str | None
    # The documents that the reply shows.
    documents: tuple[Document, ...]


class Episode:
    """One response in progress.

    After the last step, ``answer``, ``confidence`` and ``finish_reason`` are set. ``said`` then has the whole response,
    with the environment's segments separate from the model's.

    ``finish_reason`` is "stop", "length", "turns" (the searches and reads are used up) or "failed" (``failure`` has the
    reason). It is None before the end.
    """

    def __init__(self, generator: Generator, turns: Turns, question: Question, sample: int) -> None:
        self.generator = generator
        self.turns = turns
        self.question = question
        self.sample = sample
        self.shown: list[ShownStep] = []
        self.said: list[Segment] = []
        self.answer: str | None = None
        self.confidence: int | None = None
        self.finish_reason: str | None = None
        self.failure = ""
        self.tokens = 0

    @property
    def reply(self) -> Reply:
        """The answer and the confidence, as they count in a vote."""
        return Reply(self.answer, self.confidence)

    async def steps(self) -> AsyncGenerator[ShownStep, None]:
        """Yield the steps in order. Raises GeneratorFailed."""
        prompt = Prompt("", np.array(self.question.prompt_ids, np.int32))
        response = batches.build([prompt], [[]], finish_reasons=[UNFINISHED])
        while response.finish_reasons == [UNFINISHED]:
            said = self._segments(response)
            tokens: list[int] = []
            reason: str | None = None
            tail = ""
            async with aclosing(self._stream(response)) as pieces:
                async for piece in pieces:
                    tokens += piece.token_ids
                    reason = "turn" if piece.stopped_at in self.turns.environment.stops else piece.finish_reason
                    tail = tail[-LONGEST_END:] + piece.text
                    if reason is None and any(end in tail for end in ENDS):
                        text = self.turns.tokenizer.decode(tokens, skip_special_tokens=True)
                        if not said:
                            text = whole_text(self.turns.tokenizer, prompt.token_ids, text, self.turns.think_begin)
                        for shown in self._complete([*said, Segment(text, by_environment=False)]):
                            yield shown
            turn = batches.build([prompt], [tokens], version=0, finish_reasons=[str(reason)])
            response = batches.extend(response, turn)
            if reason == "turn":
                # The call runs in a thread, because a search engine may take seconds, and other episodes continue
                # meanwhile.
                response = await asyncio.to_thread(self.turns.reply, response, self.question.max_tokens)
            for shown in self._after_turn(response):
                yield shown
        self.finish_reason = response.finish_reasons[0]
        self.failure = response.failures[0]

    def _segments(self, response: TokenBatch) -> list[Segment]:
        return environment.segments(self.turns.tokenizer, response, self.turns.think_begin)

    def _stream(self, response: TokenBatch) -> AsyncGenerator[Any, None]:
        """Return the stream of the next turn's tokens."""
        token_ids = response.response_tokens.tolist()
        options = {
            **self.question.sampling,
            "max_tokens": self.question.max_tokens - len(token_ids),
            "stop": list(self.turns.environment.stops),
            "include_stop_str_in_output": True,
        }
        if self.question.seed is not None:
            options["seed"] = request_seed(self.question.seed, len(token_ids), "", self.sample)
        return self.generator.stream(self.question.model, [*self.question.prompt_ids, *token_ids], options)

    def _complete(self, said: Sequence[Segment]) -> list[ShownStep]:
        """Return the new complete steps of a turn that has not ended.

        Text at the end is left out, because it may still become an action.
        """
        steps = search.steps(said)
        while steps and steps[-1].action in OPEN:
            steps.pop()
        return self._show(steps)

    def _after_turn(self, response: TokenBatch) -> list[ShownStep]:
        """Return the new steps after a turn has ended and, if it was a search or a read, was answered."""
        self.said = said = self._segments(response)
        self.answer, self.confidence = search.stated(said)
        self.tokens = len(response.response_tokens)
        steps = search.steps(said)
        if response.finish_reasons != [UNFINISHED]:
            is_cut = response.finish_reasons != ["stop"]
            if is_cut and not any(step.action == "answer" for step in steps):
                # A complete text without any action counts as the answer. A text that was cut off does not.
                self.answer = None
            return self._show(steps)
        if steps[-1].action == "end":
            steps.pop()
        new = self._show(steps)
        last = new[-1]
        reply = said[-1].text
        documents = tuple(search.documents_in(last.step.action, last.step.content, reply))
        new[-1] = self.shown[-1] = ShownStep(self.sample, last.step, reply, documents)
        return new

    def _show(self, steps: Sequence[Step]) -> list[ShownStep]:
        new = [ShownStep(self.sample, step, None, ()) for step in steps[len(self.shown) :]]
        self.shown += new
        return new
