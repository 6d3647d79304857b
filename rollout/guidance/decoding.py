"""Value-guided decoding of one answer: an async driver around a generator and a value server.

Both modes use the same search.

* *monitor* follows a draft, which is generated ahead while its segments are scored. A segment below the threshold is
  dropped together with what follows it. N candidates are sampled in its place, and the answer continues from the best
  of them and the dropped segment. If the best one is still below the threshold, a correction may replace it.
* *search* always samples N candidates for each beam and keeps the best prefixes (integrated value guidance,
  arXiv 2409.17819; SafeWork-R1's PVM, arXiv 2507.18576).

The report of SafeWork-R1 leaves some points open. Our choices are: a score is the weighted sum of the values of the
whole prefix, a candidate is one segment, and beams that have ended stay among the beams.
"""

import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rollout.guidance import decisions
from rollout.guidance.clients import Generator, Piece, Values, ValuesUnavailable
from rollout.guidance.edits import EditRefused, replace_tail
from rollout.guidance.reading import Draft, Segment, read_segments
from rollout.guidance.router import Router
from rollout.guidance.settings import MONITOR, STOP, GuidanceConfig

DRAFT, SAMPLED, CORRECTION = "draft", "sampled", "correction"


@dataclass(frozen=True)
class Question:
    """A prompt to answer, and how to sample the answer."""

    model: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    # Further fields of vLLM's request, such as ``temperature``.
    sampling: Mapping[str, Any] = field(default_factory=dict)
    # Stop strings. The answer ends before the first of them.
    stops: tuple[str, ...] = ()
    # With a seed, the answer depends only on the question and the servers.
    seed: int | None = None


@dataclass(frozen=True)
class Candidate:
    """A segment with its values and its score."""

    segment: Segment
    # One value for each principle; None for a segment that was not scored.
    values: tuple[float, ...] | None
    # The weighted sum of the values.
    score: float | None
    # DRAFT, SAMPLED or CORRECTION.
    origin: str


@dataclass(frozen=True)
class Beam:
    """A prefix of an answer."""

    path: tuple[Candidate, ...] = ()
    token_ids: tuple[int, ...] = ()
    text: str = ""
    # The score of the last candidate that has one.
    score: float = 0.0
    finish_reason: str | None = None

    def extended(self, candidate: Candidate) -> "Beam":
        segment = candidate.segment
        return Beam(
            (*self.path, candidate),
            self.token_ids + segment.token_ids,
            self.text + segment.text,
            self.score if candidate.score is None else candidate.score,
            segment.finish_reason,
        )


@dataclass(frozen=True)
class Step:
    """A segment that became part of the answer."""

    # The text that may be shown now. Text that may be the beginning of a stop string is held back for the next step.
    text: str
    token_ids: tuple[int, ...]
    # By principle; None, like ``score``, for a segment that was not scored.
    values: Mapping[str, float] | None
    score: float | None
    origin: str


class DecisionLog:
    """A file of JSON lines that only its user can read, to which decisions are appended. Nothing is ever removed."""

    def __init__(self, path: str | None) -> None:
        self.file = None
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, entry: Mapping[str, Any]) -> None:
        if self.file is not None:
            # Each line is written in one call, so that several processes can append to the file.
            os.write(self.file, json.dumps(entry, ensure_ascii=False).encode(errors="replace") + b"\n")

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)


@dataclass(frozen=True)
class Guide:
    """What all answers share. ``threshold`` is used in the mode monitor."""

    config: GuidanceConfig
    generator: Generator
    values: Values
    router: Router
    threshold: float
    log: DecisionLog

    def answer(self, question: Question) -> "Answer":
        """Return an answer, to be read with ``async for step in answer.steps()``."""
        return Answer(self, question)


class Answer:
    """One answer in progress. After the last step, ``finish_reason`` and the counts are complete.

    ``generated_tokens`` counts all generated tokens, including dropped ones. ``answer_tokens`` counts the tokens of the
    answer. ``unguided`` is the reason why the answer continues without guidance, and None while it is guided.
    """

    def __init__(self, guide: Guide, question: Question) -> None:
        self.guide = guide
        self.config = guide.config
        self.question = question
        self.id = uuid.uuid4().hex
        self.weights: tuple[float, ...] = ()
        self.finish_reason: str | None = None
        self.unguided: str | None = None
        self.generated_tokens = 0
        self.answer_tokens = 0
        self.scored_prefixes = 0
        self.steered = 0
        self.corrections = 0
        self.lowest_score: float | None = None
        self.streams = 0
        self.started = self.decided = time.monotonic()

    async def steps(self) -> AsyncGenerator[Step, None]:
        """Yield the answer segment by segment.

        Raises GeneratorFailed. Raises ValuesUnavailable if ``values.on_failure`` is "stop".
        """
        text = ""
        shown = 0
        stops = self.question.stops
        try:
            async with aclosing(self._candidates()) as candidates:
                async for candidate in candidates:
                    known = len(text)
                    text += candidate.segment.text
                    finish_reason = candidate.segment.finish_reason
                    stop = decisions.first_stop(text, known, stops)
                    if stop is not None:
                        text = text[:stop]
                        finish_reason = "stop"
                    end = len(text)
                    if finish_reason is None:
                        end -= decisions.held_back(text, stops)
                    self.answer_tokens += len(candidate.segment.token_ids)
                    self.finish_reason = finish_reason
                    scores = [score for score in (self.lowest_score, candidate.score) if score is not None]
                    self.lowest_score = min(scores, default=None)
                    yield self._step(candidate, text[shown:end])
                    shown = end
                    if finish_reason is not None:
                        return
        finally:
            self._record("end", finish_reason=self.finish_reason, total_seconds=time.monotonic() - self.started)

    def summary(self) -> dict[str, Any]:
        """Return what a client should know about how the answer was generated."""
        return {
            "id": self.id,
            "mode": self.config.mode,
            "unguided": self.unguided,
            "steered": self.steered,
            "corrections": self.corrections,
            "lowest_score": self.lowest_score,
            "weights": dict(zip(self.config.values.principles, self.weights, strict=False)),
            "answer_tokens": self.answer_tokens,
            "generated_tokens": self.generated_tokens,
            "scored_prefixes": self.scored_prefixes,
            "seconds": time.monotonic() - self.started,
        }

    def _step(self, candidate: Candidate, text: str) -> Step:
        values = None
        if candidate.values is not None:
            values = dict(zip(self.config.values.principles, candidate.values, strict=True))
        return Step(text, candidate.segment.token_ids, values, candidate.score, candidate.origin)

    async def _candidates(self) -> AsyncGenerator[Candidate, None]:
        """Yield the candidates that make up the answer, each as soon as all beams share it."""
        await self._weigh()
        beams = [Beam()]
        given = 0
        while any(beam.finish_reason is None for beam in beams):
            if self._may_search():
                beams = await self._expand(beams, None)
            elif beams[0].finish_reason is not None:
                break
            else:
                # Only the best beam continues.
                beam = beams[0]
                rejected: Candidate | None = None
                for candidate in beam.path[given:]:
                    yield candidate
                async with aclosing(self._follow(beam)) as drafts:
                    async for candidate in drafts:
                        if self._must_steer(candidate):
                            rejected = candidate
                            break
                        self._record("accept", [candidate], [0])
                        beam = beam.extended(candidate)
                        yield candidate
                given = len(beam.path)
                beams = [beam] if rejected is None else await self._steer(beam, rejected)
            for candidate in shared_path(beams)[given:]:
                given += 1
                yield candidate
        for candidate in beams[0].path[given:]:
            yield candidate

    async def _weigh(self) -> None:
        """Compute the weights of the principles for this question."""
        query_values = None
        if self.guide.router.reads_values:
            scored = await self._values([self.question.prompt_ids])
            query_values = None if scored is None else scored[0]
        self.weights = self.guide.router.weights(query_values)

    def _may_search(self) -> bool:
        return self.config.mode != MONITOR and self._is_guided()

    def _must_steer(self, candidate: Candidate) -> bool:
        """Return whether this segment must be replaced. Ends the guidance if ``max_steered`` segments were steered."""
        is_low = candidate.score is not None and candidate.score < self.guide.threshold
        if not is_low or self.config.mode != MONITOR or not self._is_guided():
            return False
        if self.steered >= self.config.max_steered:
            self._end_guidance(f"max_steered={self.config.max_steered} segments were steered")
        return self.unguided is None

    def _is_guided(self) -> bool:
        """Return whether the answer is still guided. Ends the guidance if the token budget is spent."""
        if self.unguided is None and self.generated_tokens >= self.config.budget_tokens:
            self._end_guidance(f"budget_tokens={self.config.budget_tokens} are spent")
        return self.unguided is None

    def _end_guidance(self, reason: str) -> None:
        self.unguided = reason
        self._record("unguided", reason=reason)

    async def _follow(self, beam: Beam) -> AsyncGenerator[Candidate, None]:
        """Continue the beam to the end of the answer.

        Yields each segment as a candidate. Segments are scored while the next ones are generated.
        """
        async with Draft(self._segments(beam, self._tokens_left(beam))) as draft:
            while beam.finish_reason is None:
                for candidate in await self._scored(beam, await draft.take()):
                    beam = beam.extended(candidate)
                    yield candidate

    async def _steer(self, beam: Beam, rejected: Candidate) -> list[Beam]:
        """Replace a segment below the threshold by the best candidate, or by a correction if that is below it too.

        The rejected segment is itself among the candidates. Returns a list of one beam.
        """
        self.steered += 1
        (chosen,) = await self._expand([beam], rejected)
        correction = self.config.correction
        is_better = chosen.score >= self.guide.threshold
        if is_better or self.unguided is not None or self.corrections >= correction.max_corrections:
            return [chosen]
        # If the segment contains the mark that begins the thinking, the mark stays and the correction follows it.
        begin_of_thinking = self.config.thinking_marks[0]
        before, mark, _ = chosen.path[-1].segment.text.rpartition(begin_of_thinking)
        prompt = await self.guide.generator.decode(self.question.model, self.question.prompt_ids)
        thinks = decisions.thinks(prompt + beam.text + mark, self.config.thinking_marks)
        inserted = correction.thinking if thinks else correction.answer
        if inserted is None:
            return [chosen]
        text = before + mark + inserted
        kept = (*self.question.prompt_ids, *beam.token_ids)
        try:
            token_ids = await replace_tail(self.guide.generator, self.question.model, kept, text)
        except EditRefused as error:
            self._record("no correction", reason=str(error))
            return [chosen]
        tokens_left = self._tokens_left(beam) - len(token_ids)
        if tokens_left < 0:
            return [chosen]
        self.corrections += 1
        finish_reason = "length" if tokens_left == 0 else None
        segment = Segment(text, token_ids, len(token_ids), finish_reason)
        (scored,) = await self._scored(beam, [segment], CORRECTION)
        self._record("correct", [chosen.path[-1], scored], [1])
        return [beam.extended(scored)]

    async def _expand(self, beams: Sequence[Beam], rejected: Candidate | None) -> list[Beam]:
        """Sample candidates for the beams, and return the best beams of the extended ones and the ended ones.

        ``rejected``, if given, is one of the candidates.
        """
        pool = [beam for beam in beams if beam.finish_reason is not None]
        ended = len(pool)
        parents = [beam for beam in beams if beam.finish_reason is None]
        if rejected is not None:
            pool.append(self._extended(parents[0], rejected))
        sampled_from = [beam for beam in parents for _ in range(self.config.candidates)]
        segments = await gather([self._sample(beam) for beam in sampled_from])
        prefixes = [self._prefix(beam, [segment]) for beam, segment in zip(sampled_from, segments, strict=True)]
        values = await self._values(prefixes) if prefixes else []
        if values is None:
            # Without values, the best beam so far continues with its first segment.
            if beams[0].finish_reason is not None:
                return [beams[0]]
            first = rejected or Candidate(segments[0], None, None, SAMPLED)
            self._record("accept", [first], [0])
            return [self._extended(beams[0], first)]
        for beam, segment, row in zip(sampled_from, segments, values, strict=True):
            candidate = Candidate(segment, row, decisions.weighted(row, self.weights), SAMPLED)
            pool.append(self._extended(beam, candidate))
        width = self.config.beams if self.config.mode != MONITOR else 1
        chosen = decisions.best([beam.score for beam in pool], width)
        self._record("choose", [beam.path[-1] for beam in pool], chosen, ended_beams=ended)
        return [pool[place] for place in chosen]

    def _extended(self, beam: Beam, candidate: Candidate) -> Beam:
        """Return the beam with the candidate. The answer's last token ends it.

        The stream says so only after the segment, if the segment ends with this token.
        """
        segment = candidate.segment
        if segment.finish_reason is None and len(segment.token_ids) == self._tokens_left(beam):
            candidate = replace(candidate, segment=replace(segment, finish_reason="length"))
        return beam.extended(candidate)

    async def _sample(self, beam: Beam) -> Segment:
        """Sample one segment that continues the beam."""
        left = self._tokens_left(beam)
        longest = min(left, self.config.max_segment_tokens)
        async with aclosing(self._segments(beam, longest, goes_on=longest < left)) as segments:
            segment: Segment = await anext(segments)
        return segment

    def _segments(self, beam: Beam, max_tokens: int, goes_on: bool = False) -> AsyncGenerator[Segment, None]:
        """Return the segments of a new stream that continues the beam."""
        question = self.question
        options = {**question.sampling, "max_tokens": max_tokens}
        if question.seed is not None:
            # Each stream gets its own seed, because the candidates for one place must differ.
            options["seed"] = question.seed + self.streams
        self.streams += 1
        prefix = (*question.prompt_ids, *beam.token_ids)
        pieces = self._counted(self.guide.generator.stream(question.model, prefix, options))

        async def decode(token_ids: Sequence[int]) -> str:
            return await self.guide.generator.decode(question.model, token_ids)

        longest = self.config.max_segment_tokens
        return read_segments(pieces, self.config.thinking_marks, longest, decode, goes_on)

    async def _counted(self, pieces: AsyncGenerator[Piece, None]) -> AsyncGenerator[Piece, None]:
        async with aclosing(pieces) as stream:
            async for piece in stream:
                self.generated_tokens += len(piece.token_ids)
                yield piece

    def _tokens_left(self, beam: Beam) -> int:
        return self.question.max_tokens - len(beam.token_ids)

    async def _scored(self, beam: Beam, segments: Sequence[Segment], origin: str = DRAFT) -> list[Candidate]:
        """Return the segments, which follow the beam one after another, with the values of the prefixes they end.

        A segment without text has no values. It occurs when an answer ends after a complete sentence.
        """
        shown = [place for place, segment in enumerate(segments) if segment.scored]
        prefixes = [self._prefix(beam, segments[: place + 1]) for place in shown]
        values = await self._values(prefixes) if prefixes else []
        rows = dict(zip(shown, values or [], strict=False))
        candidates = []
        for place, segment in enumerate(segments):
            row = rows.get(place)
            score = None if row is None else decisions.weighted(row, self.weights)
            candidates.append(Candidate(segment, row, score, origin))
        return candidates

    def _prefix(self, beam: Beam, segments: Sequence[Segment]) -> list[int]:
        """Return the prefix to score: all tokens up to the end of the last segment's text."""
        prefix = [*self.question.prompt_ids, *beam.token_ids]
        for segment in segments[:-1]:
            prefix += segment.token_ids
        return prefix + list(segments[-1].token_ids[: segments[-1].scored])

    async def _values(self, prefixes: Sequence[Sequence[int]]) -> list[tuple[float, ...]] | None:
        """Return the values of prefixes, or None if the answer continues without guidance.

        Raises ValuesUnavailable if the values fail and ``values.on_failure`` is "stop".
        """
        if self.unguided is not None:
            return None
        try:
            values = await self.guide.values.score(prefixes)
        except ValuesUnavailable as error:
            if self.config.values.on_failure == STOP:
                self._record("stop", reason=str(error))
                raise
            self._end_guidance(str(error))
            return None
        self.scored_prefixes += len(prefixes)
        return values

    def _record(
        self, decision: str, candidates: Sequence[Candidate] = (), chosen: Sequence[int] = (), **more: Any
    ) -> None:
        """Append a decision to the log. Its ``seconds`` are the time since the previous decision."""
        now = time.monotonic()
        entry = {
            "time": round(time.time(), 3),
            "answer": self.id,
            "model": self.question.model,
            "decision": decision,
            "candidates": [
                {
                    "text": candidate.segment.text,
                    "tokens": len(candidate.segment.token_ids),
                    "values": candidate.values,
                    "score": candidate.score,
                    "origin": candidate.origin,
                }
                for candidate in candidates
            ],
            "chosen": list(chosen),
            "weights": self.weights,
            "threshold": self.guide.threshold if self.config.mode == MONITOR else None,
            "answer_tokens": self.answer_tokens,
            "generated_tokens": self.generated_tokens,
            "seconds": round(now - self.decided, 6),
            **more,
        }
        self.decided = now
        self.guide.log.write(entry)


def shared_path(beams: Sequence[Beam]) -> tuple[Candidate, ...]:
    """Return the candidates with which all beams begin."""
    shared = 0
    for candidates in zip(*(beam.path for beam in beams), strict=False):
        if any(candidate is not candidates[0] for candidate in candidates):
            break
        shared += 1
    return beams[0].path[:shared]


async def gather[T](work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines concurrently and return their results.

    When one raises, the others are cancelled and its error is raised.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in work]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
