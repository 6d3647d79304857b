"""Splits a stream of tokens into segments."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rollout.guidance.clients import Piece
from rollout.guidance.segments import segment_ends

type Decode = Callable[[Sequence[int]], Awaitable[str]]

# An incomplete character decodes to this.
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Segment:
    """A segment as it was generated."""

    text: str
    token_ids: tuple[int, ...]
    # The number of tokens up to the end of its text, 0 if there is no text. The prefix that is scored ends there. The
    # token that ends an answer, and whitespace before it, come after.
    scored: int
    finish_reason: str | None


class Buffer:
    """Tokens and text that have arrived and belong to no segment yet. Tokens are counted from the buffer's start."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.text = ""
        self.token_ids: list[int] = []
        # For each piece: the numbers of characters and tokens up to its end.
        self.marks: list[tuple[int, int]] = []

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.marks.append((len(self.text), len(self.token_ids)))

    def take(self, characters: int, tokens: int, scored: int, finish_reason: str | None) -> Segment:
        """Remove a segment from the start of the buffer and return it."""
        segment = Segment(self.text[:characters], tuple(self.token_ids[:tokens]), scored, finish_reason)
        self.text = self.text[characters:]
        del self.token_ids[:tokens]
        self.marks = [(end - characters, count - tokens) for end, count in self.marks if count > tokens]
        return segment

    async def reach(self, characters: int) -> tuple[int, int]:
        """Find the first end of a token at or after ``characters``. Returns its numbers of characters and of tokens.

        A piece of several tokens is split by decoding. A server under load, or with speculative decoding, sends such
        pieces. Where the texts of its tokens can't be separated, the piece is taken as a whole.
        """
        before = (0, 0)
        for mark in self.marks:
            if mark[0] >= characters:
                break
            before = mark
        for tokens in range(before[1] + 1, mark[1]):
            text = await self.decode(self.token_ids[:tokens])
            if len(text) >= characters:
                return (len(text), tokens) if text == self.text[: len(text)] else mark
        return mark

    async def cut(self) -> Segment:
        """Remove the whole buffer as a segment, except for an incomplete character at its end.

        The incomplete character stays, because vLLM does not continue a prompt that ends inside a character with the
        rest of that character.
        """
        for characters, tokens in reversed(self.marks):
            text = await self.decode(self.token_ids[:tokens])
            if not text.endswith(REPLACEMENT):
                return self.take(characters, tokens, tokens, None)
        return self.take(len(self.text), len(self.token_ids), len(self.token_ids), None)


async def read_segments(
    pieces: AsyncGenerator[Piece, None],
    thinking_marks: Sequence[str],
    longest: int,
    decode: Decode,
    goes_on: bool = False,
) -> AsyncGenerator[Segment, None]:
    """Yield the segments of a stream, each as soon as its end is certain.

    A segment ends at the end of a token. This is the first token that reaches an end found by ``segment_ends``, or the
    token after which the segment has ``longest`` tokens. The last segment has the stream's ``finish_reason``.

    ``decode`` returns the text of the stream's tokens. With ``goes_on``, a stream that ends because of its length ends
    in a segment without a finish reason, so that the answer may continue.
    """
    buffer = Buffer(decode)
    async with aclosing(pieces) as stream:
        async for piece in stream:
            buffer.add(piece)
            while ends := segment_ends(buffer.text, thinking_marks, complete=False):
                characters, tokens = await buffer.reach(ends[0])
                yield buffer.take(characters, tokens, tokens, None)
            if piece.finish_reason == "length" and goes_on:
                yield await buffer.cut()
                return
            if piece.finish_reason is not None:
                visible = len(buffer.text.rstrip())
                scored = (await buffer.reach(visible))[1] if visible else 0
                yield buffer.take(len(buffer.text), len(buffer.token_ids), scored, piece.finish_reason)
                return
            if len(buffer.token_ids) >= longest:
                yield await buffer.cut()


class Draft:
    """Segments that are generated while earlier ones are scored.

    This is a context manager. Leaving the context stops the stream.
    """

    def __init__(self, segments: AsyncGenerator[Segment, None]) -> None:
        self.segments = segments
        self.arrived: asyncio.Queue[Segment | Exception] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _read(self) -> None:
        try:
            async with aclosing(self.segments) as segments:
                async for segment in segments:
                    self.arrived.put_nowait(segment)
        except Exception as error:
            self.arrived.put_nowait(error)

    async def take(self) -> list[Segment]:
        """Return all segments that have arrived, in order, and wait if there is none. Raises what the stream raised."""
        taken = [await self.arrived.get()]
        while not self.arrived.empty():
            taken.append(self.arrived.get_nowait())
        segments: list[Segment] = []
        for segment in taken:
            if isinstance(segment, Exception):
                if not segments:
                    raise segment
                self.arrived.put_nowait(segment)
                break
            segments.append(segment)
        return segments
