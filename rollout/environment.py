"""An environment that takes part in a response: the model acts, the environment replies, and the model continues.

The engine stops after the strings in ``stops``. The environment's reply is encoded once and appended, and the model
continues from these token ids. No token is decoded and encoded again. The environment's tokens have a log-prob of 0,
and their loss mask is False.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from megatron_ext import batch as batches
from megatron_ext import dotted_path
from megatron_ext.batch import UNFINISHED, TokenBatch
from rollout.thinking import whole_text

ENVIRONMENTS = {"search": "rollout.search.open_search"}


class Unavailable(RuntimeError):
    """The environment could not reply. The sample gets no reward, because this is not the model's fault."""


@dataclass(frozen=True)
class Segment:
    """A part of a response, written by the model or by the environment."""

    text: str
    by_environment: bool


class Environment(Protocol):
    """What replies to the model between its turns."""

    @property
    def stops(self) -> Sequence[str]:
        """Stop strings that end a turn of the model."""
        ...

    def reply(self, segments: Sequence[Segment]) -> str:
        """Return the text that follows the response so far. It must depend on nothing else. Raises Unavailable.

        Several threads call it concurrently.
        """
        ...

    def check(self) -> None:
        """Raise Unavailable when the environment can't be reached."""
        ...


def open_environment(name: str, settings: Mapping[str, Any]) -> Environment:
    """Open the environment of that name, or of the dotted path of a function that takes ``settings`` as keywords.

    Raises ValueError for an unknown name and for settings that the function refuses.
    """
    path = ENVIRONMENTS.get(name, name)
    try:
        function = dotted_path.load(path)
    except ValueError as error:
        raise ValueError(
            f"rollout.environment.name={name!r}: no such environment ({error}); use one of "
            f"{', '.join(sorted(ENVIRONMENTS))}, or the dotted path of a function that returns one"
        ) from error
    try:
        return function(**settings)
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"rollout.environment.settings of {name!r}: {error}") from error


def segments(tokenizer: Any, response: TokenBatch, think_begin: str) -> list[Segment]:
    """Split the text of a batch of one response into the segments of the model and of the environment.

    The first segment begins with ``think_begin`` if the prompt ends with it.
    """
    pieces: list[Segment] = []
    by_environment = ~response.loss_mask
    changes = np.flatnonzero(np.diff(by_environment)) + 1
    for tokens, mask in zip(
        np.split(response.response_tokens, changes), np.split(by_environment, changes), strict=True
    ):
        if len(tokens):
            text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
            if not pieces:
                text = whole_text(tokenizer, response.prompt(0).token_ids, text, think_begin)
            pieces.append(Segment(text, bool(mask[0])))
    return pieces


@dataclass(frozen=True)
class Turns:
    """An environment, and how its replies become part of a response."""

    environment: Environment
    # Encodes the replies.
    tokenizer: Any
    # The maximum number of replies in one response.
    max_turns: int
    # The mark that begins the thinking, in the prompt or in the response.
    think_begin: str

    def reply(self, response: TokenBatch, max_tokens: int) -> TokenBatch:
        """Append the environment's reply to a response (a batch of one) whose turn has ended.

        The finish reason of the returned response is "unfinished". It is instead "turns" if the environment has already
        replied ``max_turns`` times, "length" if the reply leaves no room in ``max_tokens``, and "failed" if the
        environment could not reply; ``failures`` then has the reason. In these cases no reply is appended.
        """
        said = segments(self.tokenizer, response, self.think_begin)
        if sum(segment.by_environment for segment in said) >= self.max_turns:
            return replace(response, finish_reasons=["turns"])
        try:
            text = self.environment.reply(said)
        except Unavailable as error:
            return replace(response, finish_reasons=["failed"], failures=[str(error)])
        tokens = self.encode(text)
        if len(response.response_tokens) + len(tokens) >= max_tokens:
            return replace(response, finish_reasons=["length"])
        forced = batches.build(
            response.prompts,
            [tokens],
            loss_mask=[[False] * len(tokens)],
            version=int(response.versions[-1]),
            finish_reasons=[UNFINISHED],
        )
        return batches.extend(response, forced)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the token ids of a reply.

        The text of each control token (end of turn, image) is replaced by a space, because a document from an external
        source must not end or begin a turn.
        """
        control_texts = self.tokenizer.get_added_vocab()
        while True:
            # The search is repeated after each replacement, because the text on both sides of it may form another
            # control text.
            control_text = next((control_text for control_text in control_texts if control_text in text), None)
            if control_text is None:
                return tuple(self.tokenizer.encode(text, add_special_tokens=False))
            text = text.replace(control_text, " ")
