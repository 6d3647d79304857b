"""What goes to a generation engine and what comes back: token ids and names of image files, JSON only.

Tokens are never decoded and encoded again on the way: the ids a sample carries are the ids vLLM sampled.
"""

import math
from dataclasses import asdict, dataclass, replace
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

    ``max_tokens`` bounds a whole response, ``round_tokens`` what one batch adds to it: a response that reaches that
    comes back with finish reason ``"unfinished"``. ``thinking_budget`` bounds the tokens between the engine's
    ``thinking`` marks; then the end mark is forced and the answer goes on. ``stops`` are texts behind which a turn ends
    and an environment replies (finish reason ``"turn"``). Raises ValueError for impossible values.
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


@dataclass(frozen=True)
class Request:
    """One wanted sample: the prompt, which of its samples this is, and the seed that alone decides its noise.

    ``begun`` is an unfinished sample of it, made in an earlier batch, that the engine goes on from.
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    seed: int
    media: Media | None = None
    begun: "Sample | None" = None

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample_index

    @property
    def begun_token_ids(self) -> tuple[int, ...]:
        return self.begun.response_token_ids if self.begun else ()

    def to_json(self) -> dict[str, Any]:
        """What the engine needs: of ``begun`` only the tokens."""
        return asdict(replace(self, begun=None)) | {"begun_token_ids": self.begun_token_ids}


@dataclass(frozen=True)
class Sample:
    """One response.

    ``logprobs[i]`` is the natural-log probability of ``response_token_ids[i]`` under the distribution it was sampled
    from (after temperature and top-p; for greedy decoding the plain softmax), and ``weight_versions[i]`` names the sync
    whose weights made it. ``finish_reason`` is ``"stop"`` (the last token is a stop token), ``"length"``, or
    ``"unfinished"`` (``Sampling.round_tokens``, an environment's turn to come); those of an environment are in
    ``rollout.environment``, and ``failure`` says why it failed. ``forced`` are positions in the response that were not
    sampled but put there (end of thinking, an environment's replies): their log-prob is 0, and no loss may count them.
    """

    prompt_id: str
    sample_index: int
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_versions: tuple[int, ...]
    forced: tuple[int, ...] = ()
    failure: str = ""

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt_id, self.sample_index

    @property
    def weight_version(self) -> int:
        """Of the last token: the newest that had a part in it."""
        return self.weight_versions[-1]

    def after(self, begun: "Sample | None") -> "Sample":
        """The whole response, where this one goes on from ``begun``."""
        if begun is None:
            return self
        shift = len(begun.response_token_ids)
        return replace(
            self,
            response_token_ids=begun.response_token_ids + self.response_token_ids,
            logprobs=begun.logprobs + self.logprobs,
            weight_versions=begun.weight_versions + self.weight_versions,
            forced=begun.forced + tuple(shift + position for position in self.forced),
        )

    def to_json(self) -> dict[str, Any]:
        """A dict of plain JSON types; floats survive the round trip exactly."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Sample":
        """Inverse of :meth:`to_json`, also after JSON turned tuples into lists."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in data.items()}
        return Sample(**fields)
