"""Messages between an engine and its client that carry binary data: a kind, a length, then the bytes.

A request is a JSON frame with the sampling settings and a batch frame; the answer is a stream of batch frames, then a
done frame, or an error frame with the text.
"""

from collections.abc import Callable, Iterator

JSON, BATCH, DONE, ERROR = b"j", b"b", b"d", b"e"
HEAD_BYTES = 9  # one for the kind, eight for the length


def frame(kind: bytes, payload: bytes = b"") -> bytes:
    return kind + len(payload).to_bytes(8, "little") + payload


def read_frames(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(kind, payload) of each frame. ``read(n)`` gives up to n bytes, fewer only at the end of the stream.

    Raises EOFError where the stream ends within a frame.
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
