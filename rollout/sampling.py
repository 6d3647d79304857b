"""How responses are sampled."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """Settings of a batch of responses. ``temperature`` 0 is greedy; ``stop_token_ids`` end a response and are kept as
    its last token.

    ``max_tokens`` bounds a complete response. ``round_tokens`` bounds what one round adds to it: a response that
    reaches it comes back as a partial rollout (finish reason "unfinished"). ``thinking_budget`` bounds the tokens
    between the engine's thinking marks; then the end mark is forced and the answer goes on. ``stops`` are texts that
    end a turn, after which an environment replies (finish reason "turn"). Raises ValueError for impossible values.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0
    round_tokens: int | None = None
    thinking_budget: int | None = None
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
