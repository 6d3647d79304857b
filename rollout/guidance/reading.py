"""The segments of a stream of tokens."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rollout.guidance.clients import Piece
from rollout.guidance.segments import segment_ends

type Decode = Callable[[Sequence[int]], Awaitable[str]]

REPLACEMENT = "\ufffd"  # what the beginning of a character decodes to


@dataclass(frozen=True)
class Segment:
    """A segment as it was generated.

    ``scored``: tokens up to the end of its text, after which it is scored; the token that ends an answer, and
    whitespace before that, come after. 0 where there is no text.
    """

    text: str
    token_ids: tuple[int, ...]
    scored: int
    finish_reason: str | None


class Buffer:
    """Tokens and text that have come and belong to no segment yet. Tokens are counted from the buffer's start."""

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.text = ""
        self.token_ids: list[int] = []
        # After each piece: the characters and the tokens so far.
        self.marks: list[tuple[int, int]] = []

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.marks.append((len(self.text), len(self.token_ids)))

    def take(self, characters: int, tokens: int, scored: int, finish_reason: str | None) -> Segment:
        """Remove a segment from the start."""
        segment = Segment(self.text[:characters], tuple(self.token_ids[:tokens]), scored, finish_reason)
        self.text = self.text[characters:]
        del self.token_ids[:tokens]
        self.marks = [(end - characters, count - tokens) for end, count in self.marks if count > tokens]
        return segment

    async def reach(self, characters: int) -> tuple[int, int]:
        """The least characters that are so many or more and end with a token, and the tokens that they take.

        A piece of several tokens is taken apart by decoding: a server under load, or with speculative decoding, sends
        such. Where the tokens' texts can't be told apart, the piece is taken as a whole.
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
        """Remove all as a segment, but not a last character that has only begun: from a prompt that ends inside a
        character vLLM does not go on with the rest of it."""
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
    """The segments of a stream, each as soon as its end is sure; the last one has the stream's ``finish_reason``.

    A segment ends with a token: with the first one that reaches the end which ``segment_ends`` finds, or after
    ``longest`` tokens. ``decode`` gives the text of the stream's tokens. ``goes_on``: a stream that ends for its length
    is cut there, and the answer may go on.
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
    """Segments that are generated while earlier ones are scored. A context manager; its end stops the stream."""

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
        """All segments that have arrived, in their order; waits for one. Raises what the stream raised."""
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
