"""A fake model that thinks before it answers, and goes on from an edited thought; behind the fake servers."""

from tests.rollout.fake_guidance import FakeModel

QUESTION = "How do I clean a drain?"
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
THOUGHT = f"The user asks about a drain. Cleaners can be dangerous to mix. Mind this: {HOSTILE}."
ANSWER = "Use warm water first. <b>Never</b> mix bleach with acid."
WRITTEN = f"<think>{THOUGHT}</think>{ANSWER}"
CORRECTED = "The corrected answer says what to do."
AFTER_THOUGHT = f" So I say this.</think>{CORRECTED}"
AFTER_ANSWER = " It ends here."


class FakeThinker(FakeModel):
    """Writes ``WRITTEN`` to every question, ``AFTER_THOUGHT`` after an edited thought and ``AFTER_ANSWER`` after an
    edited answer."""

    def __init__(self) -> None:
        super().__init__({}, prompt="?")

    def continuation(self, answer: str, seed: int) -> list[str]:
        if WRITTEN.startswith(answer):
            return [WRITTEN[len(answer) :]]
        return [AFTER_ANSWER if "</think>" in answer else AFTER_THOUGHT]


def values(text: str) -> tuple[float, float]:
    """Of a prefix, for safety and value."""
    return (0.25 if text.endswith("mix.") else 0.75), 0.5
