"""One episode of deliberate search by a served model: the turns, and the environment's replies, are those of training.

What the environment adds, how it is encoded, and when an episode ends is :class:`rollout.environment.Turns`; what a
step is and what is wrong with it, :func:`rollout.search.steps`.
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

# Steps at the end of what has come that are not complete: they may become something else, or wait for a reply.
OPEN = ("text", "end", "search", "read")
ENDS = [f"</{action}>" for action in search.ACTIONS]
LONGEST_END = max(map(len, ENDS))


@dataclass(frozen=True)
class ShownStep:
    """A step of one of the samples as soon as it is complete, with its verification (``step.fault``, empty for a legal
    one). ``reply``: of the environment, None for a step that it does not answer; ``documents``: what that shows."""

    sample: int
    step: Step
    reply: str | None
    documents: tuple[Document, ...]


class Episode:
    """One response under way. After the last step its ``answer``, ``confidence`` and ``finish_reason`` are known, and
    ``said`` is all of it, the environment's part apart.

    ``finish_reason``: "stop", "length", "turns" (its searches and reads are used up) or "failed" (``failure`` says
    why); None before the end.
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
        """What it says in a vote."""
        return Reply(self.answer, self.confidence)

    async def steps(self) -> AsyncGenerator[ShownStep, None]:
        """The steps in their order. Raises GeneratorFailed."""
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
                # A search engine may take seconds, and other episodes go on meanwhile.
                response = await asyncio.to_thread(self.turns.reply, response, self.question.max_tokens)
            for shown in self._after_turn(response):
                yield shown
        self.finish_reason = response.finish_reasons[0]
        self.failure = response.failures[0]

    def _segments(self, response: TokenBatch) -> list[Segment]:
        return environment.segments(self.turns.tokenizer, response, self.turns.think_begin)

    def _stream(self, response: TokenBatch) -> AsyncGenerator[Any, None]:
        """The next turn's tokens."""
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
        """The new steps of a turn that has not ended: its text may become an action yet."""
        steps = search.steps(said)
        while steps and steps[-1].action in OPEN:
            steps.pop()
        return self._show(steps)

    def _after_turn(self, response: TokenBatch) -> list[ShownStep]:
        """The new steps once a turn has ended and was answered."""
        self.said = said = self._segments(response)
        self.answer, self.confidence = search.stated(said)
        self.tokens = len(response.response_tokens)
        steps = search.steps(said)
        if response.finish_reasons != [UNFINISHED]:
            is_cut = response.finish_reasons != ["stop"]
            if is_cut and not any(step.action == "answer" for step in steps):
                # A text without any action counts as the answer, but not the beginning of one.
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
