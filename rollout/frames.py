"""Frames: binary messages between an engine and its client. A frame has a kind, a length and the bytes.

A request is a JSON frame with the sampling settings and a batch frame. The answer is a stream of batch frames and a
done frame. A failure is an error frame with the text.
"""

from collections.abc import Callable, Iterator

JSON, BATCH, DONE, ERROR = b"j", b"b", b"d", b"e"
# One byte for the kind and eight for the length.
HEAD_BYTES = 9


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + len(payload).to_bytes(8, "little") + payload


def read_frames(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, payload) of each frame. ``read(n)`` must return n bytes, and fewer only at the end of the stream.

    Raises EOFError when the stream ends within a frame.
    """
    while True:
        head = read(HEAD_BYTES)
        if not head:
            return
        if len(head) < HEAD_BYTES:
            raise EOFError(f"the stream ended after {len(head)} of a frame's first {HEAD_BYTES} bytes")
        size = int.from_bytes(head[1:], "little")
        payload = read(size)
        if len(payload) < size:
            raise EOFError(f"the stream ended after {len(payload)} of a frame's {size} bytes")
        yield head[:1], payload
