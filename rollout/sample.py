"""What goes to a generation engine and what comes back: token ids and names of image files, JSON only.

Tokens are never decoded and encoded again on the way: the ids a sample carries are the ids vLLM sampled.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Media:
    """Image files and clips (lists of frame files) of a prompt, each in prompt order.

    ``marked_token_ids`` are the prompt's with one mark for each image or clip, from which vLLM's own processor has to
    make exactly the prompt's ``token_ids``.
    """

    images: tuple[str, ...]
    videos: tuple[tuple[str, ...], ...]
    marked_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt of the data set: its stable name and its token ids (chat template applied, a placeholder token for each
    row of the vision tower's output)."""

    prompt_id: str
    token_ids: tuple[int, ...]
    media: Media | None = None


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature`` 0 is greedy; ``stop_token_ids`` end a response and are kept as its last token.

    Raises ValueError for impossible values.
    """

    max_tokens: int
    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"sampling.max_tokens={self.max_tokens}: must be at least 1")
        if not self.stop_token_ids:
            raise ValueError("sampling.stop_token_ids is empty: give the end-of-turn token id(s) of the tokenizer")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"sampling.temperature={self.temperature}: must be 0 (greedy) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p={self.top_p}: must be in (0, 1]")


@dataclass(frozen=True)
class Request:
    """One wanted sample: the prompt, which of its samples this is, and the seed that alone decides its noise."""

    prompt_id: str
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    media: Media | None = None


@dataclass(frozen=True)
class Sample:
    """One finished response.

    ``logprobs[i]`` is the natural-log probability of ``response_token_ids[i]`` under the distribution it was sampled
    from (after temperature and top-p; for greedy decoding the plain softmax). ``finish_reason`` is ``"stop"`` (the
    last token is a stop token) or ``"length"``. ``weight_version`` names the sync whose weights made it.
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: int

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON types; floats survive the round trip exactly."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Sample":
        """Inverse of :meth:`to_json`, also after JSON turned tuples into lists."""
        return Sample(
            data["prompt_id"],
            data["sample_index"],
            tuple(data["prompt_token_ids"]),
            tuple(data["response_token_ids"]),
            tuple(data["logprobs"]),
            data["finish_reason"],
            data["weight_version"],
        )
