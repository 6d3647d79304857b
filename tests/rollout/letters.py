"""An environment for tiny random models: it replies after letters, which they often write."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rollout.environment import Segment, Unavailable


@dataclass
class Letters:
    """Replies with the number of characters of the response so far.

    ``on_reply`` gets the number of replies so far. With ``fails`` there is no reply from the second turn on if the
    number of characters is a multiple of 7.
    """

    stops: Sequence[str] = tuple("etaoinshr")
    on_reply: Callable[[int], object] | None = None
    fails: bool = False
    replied: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, segments: Sequence[Segment]) -> str:
        with self.lock:
            self.replied += 1
            if self.on_reply is not None:
                self.on_reply(self.replied)
        if self.fails and len(segments) > 1 and sum(len(segment.text) for segment in segments) % 7 == 0:
            raise Unavailable("gone")
        return answer(segments)

    def check(self) -> None:
        pass


def answer(segments: Sequence[Segment]) -> str:
    return f"<{len(segments)}/{sum(len(segment.text) for segment in segments)}>"
