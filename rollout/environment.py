"""An environment that takes part in a response: the model acts, the environment's tokens follow, the model goes on.

The engine stops behind the texts in ``stops``; what the environment replies is encoded once and appended, and the model
goes on from the ids as they are. No token is decoded and encoded again. The environment's tokens are the sample's
``forced`` positions: log-prob 0, and no loss counts them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Protocol

from megatron_ext import dotted_path
from rollout.sample import Sample

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


def segments(tokenizer: Any, sample: Sample) -> list[Segment]:
    """The response's text in pieces, the environment's apart from the model's."""
    forced = set(sample.forced)
    return [
        Segment(tokenizer.decode([token for _, token in run], skip_special_tokens=True), by_environment)
        for by_environment, run in groupby(enumerate(sample.response_token_ids), key=lambda place: place[0] in forced)
    ]


@dataclass(frozen=True)
class Turns:
    """An environment and the tokenizer for its replies; it replies ``max_turns`` times to one response."""

    environment: Environment
    tokenizer: Any
    max_turns: int

    def go_on(self, sample: Sample, max_tokens: int) -> Sample:
        """A sample whose turn has ended, with the reply behind it: "unfinished".

        It is finished where the environment has replied ``max_turns`` times already ("turns"), where the reply leaves
        no room in ``max_tokens`` ("length"), and where there is none ("failed", with the reason in ``failure``).
        """
        said = segments(self.tokenizer, sample)
        if sum(segment.by_environment for segment in said) >= self.max_turns:
            return replace(sample, finish_reason="turns")
        try:
            text = self.environment.reply(said)
        except Unavailable as error:
            return replace(sample, finish_reason="failed", failure=str(error))
        reply = self.encode(text)
        start = len(sample.response_token_ids)
        if start + len(reply) >= max_tokens:
            return replace(sample, finish_reason="length")
        return replace(
            sample,
            response_token_ids=sample.response_token_ids + reply,
            logprobs=sample.logprobs + (0.0,) * len(reply),
            weight_versions=sample.weight_versions + (sample.weight_version,) * len(reply),
            forced=sample.forced + tuple(range(start, start + len(reply))),
            finish_reason="unfinished",
        )

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
