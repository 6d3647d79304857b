"""An environment that takes part in a response: the model acts, the environment's tokens follow, the model goes on.

The engine stops after the texts in ``stops``; the environment's reply is encoded once and appended, and the model goes
on from the ids as they are. No token is decoded and encoded again. The environment's tokens have a log-prob of 0 and
are left out by the loss mask.
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
    """The environment could not reply. This is not the model's fault, so the sample gets no reward."""


@dataclass(frozen=True)
class Segment:
    """A piece of a response, by the model or by the environment."""

    text: str
    by_environment: bool


class Environment(Protocol):
    """What takes part in a response between the model's turns."""

    @property
    def stops(self) -> Sequence[str]:
        """Texts that end a turn of the model."""
        ...

    def reply(self, segments: Sequence[Segment]) -> str:
        """The text that follows the response so far, and depends on nothing else. Called from several threads at
        once; raises Unavailable."""
        ...

    def check(self) -> None:
        """Raises Unavailable when the environment can't be reached."""
        ...


def open_environment(name: str, settings: Mapping[str, Any]) -> Environment:
    """The environment of that name or dotted path: of a function that takes ``settings`` as keywords.

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
    """The text of a batch of one response in pieces, the environment's apart from the model's. The first begins with
    ``think_begin`` where the prompt ends with it."""
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
    """An environment and the tokenizer for its replies; it replies at most ``max_turns`` times to one response.

    ``think_begin`` begins the thinking, in the prompt or in the response.
    """

    environment: Environment
    tokenizer: Any
    max_turns: int
    think_begin: str

    def reply(self, response: TokenBatch, max_tokens: int) -> TokenBatch:
        """A response (a batch of one) whose turn has ended, with the environment's reply appended: "unfinished".

        It is finished where the environment has replied ``max_turns`` times already ("turns"), where the reply leaves
        no room in ``max_tokens`` ("length"), and where there is none ("failed", with the reason in ``failures``).
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
        """A reply's token ids. A space replaces each text of a control token (end of turn, image), because a document
        from elsewhere must not end or begin a turn."""
        control_texts = self.tokenizer.get_added_vocab()
        while True:
            # Again after each replacement: the text on both sides of it may form another control text.
            control_text = next((control_text for control_text in control_texts if control_text in text), None)
            if control_text is None:
                return tuple(self.tokenizer.encode(text, add_special_tokens=False))
            text = text.replace(control_text, " ")
