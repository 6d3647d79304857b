"""The sampling settings of responses."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """The sampling settings of a batch of responses. Raises ValueError for impossible values."""

    # The maximum number of tokens of a complete response.
    max_tokens: int
    # A response ends with the first of these tokens, which is kept as its last token.
    stop_token_ids: tuple[int, ...]
    # 0 is greedy.
    temperature: float = 1.0
    top_p: float = 1.0
    # The maximum number of tokens that one round adds to a response. A response that reaches it is returned as a
    # partial rollout (finish reason "unfinished").
    round_tokens: int | None = None
    # The maximum number of tokens between the engine's thinking marks. When it is reached, the end mark is forced and
    # the answer follows.
    thinking_budget: int | None = None
    # Stop strings that end a turn (finish reason "turn"), after which an environment replies.
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens={self.max_tokens}: must be at least 1")
        for field in ("round_tokens", "thinking_budget"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"sampling.{field}={value}: must be at least 1, or null for no bound")
        if not self.stop_token_ids:
            raise ValueError("sampling.stop_token_ids is empty: give the end-of-turn token id(s) of the tokenizer")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"sampling.temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: must be in (0, 1]")
