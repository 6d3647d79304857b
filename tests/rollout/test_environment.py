"""Turns of an environment without an engine: what is appended, what stays, and how an episode ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.environment import Segment, Turns, Unavailable, open_environment, segments
from rollout.sample import Sample
from tests.recipes.tiny import make_tokenizer

TOKENIZER = make_tokenizer()
IDS = st.lists(st.integers(3, len(TOKENIZER) - 1), min_size=1, max_size=8)
TEXTS = st.text(st.sampled_from("abc <>|[]é\n"), min_size=1, max_size=12)


@dataclass
class Script:
    """Replies with the texts in turn."""

    texts: Sequence[str]
    stops: Sequence[str] = ("x",)

    def reply(self, segments: Sequence[Segment]) -> str:
        return self.texts[sum(segment.by_environment for segment in segments)]

    def check(self) -> None:
        pass


def sampled(ids: Sequence[int], begun: Sample | None = None) -> Sample:
    """A turn as an engine gives it, with log-probs that name each token."""
    version = 3 if begun is None else begun.weight_versions[-1] + 1
    made = Sample("p", 0, (9, 9), tuple(ids), tuple(-0.001 * i - 0.5 for i in ids), "turn", (version,) * len(ids))
    return made.after(begun)


@settings(deadline=None)
@given(st.lists(st.tuples(IDS, TEXTS), min_size=1, max_size=4))
def test_ids_never_change_across_turns_and_the_environment_s_are_exactly_the_forced_ones(
    turns: list[tuple[list[int], str]],
) -> None:
    rules = Turns(Script([text for _, text in turns]), TOKENIZER, max_turns=len(turns))
    sample: Sample | None = None
    ids: list[int] = []
    forced: list[int] = []
    for said, text in turns:
        before = sampled(said, sample)
        sample = rules.go_on(before, 1000)
        reply = TOKENIZER.encode(text, add_special_tokens=False)
        ids += said
        forced += range(len(ids), len(ids) + len(reply))
        ids += reply
        assert sample.response_token_ids[: len(before.response_token_ids)] == before.response_token_ids
        assert sample.logprobs[: len(before.logprobs)] == before.logprobs
    assert sample is not None and sample.finish_reason == "unfinished"
    assert sample.response_token_ids == tuple(ids)
    assert sample.forced == tuple(forced)
    for position, token in enumerate(ids):
        expected = 0.0 if position in forced else -0.001 * token - 0.5
        assert sample.logprobs[position] == expected
    assert len(sample.weight_versions) == len(ids)
    pieces = segments(TOKENIZER, sample)
    assert [piece.by_environment for piece in pieces] == [False, True] * len(turns)
    for piece, (_, text) in zip(pieces[1::2], turns, strict=True):
        assert piece.text == text
    assert rules.go_on(sampled([5], sample), 1000).finish_reason == "turns"


def test_a_reply_that_leaves_no_room_is_not_appended() -> None:
    reply = TOKENIZER.encode("abc", add_special_tokens=False)
    rules, turn = Turns(Script(["abc"]), TOKENIZER, 1), sampled([5, 6])
    assert rules.go_on(turn, 2 + len(reply) + 1).finish_reason == "unfinished"
    ended = rules.go_on(turn, 2 + len(reply))
    assert (ended.finish_reason, ended.response_token_ids, ended.forced) == ("length", (5, 6), ())


def test_control_tokens_do_not_come_in_from_outside() -> None:
    rules = Turns(Script([""]), TOKENIZER, 1)
    for text, plain in (("a<|im_end|>b", "a b"), ("<|im_<|im_end|>end|>", "<|im_ end|>"), ("<|endoftext|>ab", " ab")):
        assert rules.encode(text) == tuple(TOKENIZER.encode(plain, add_special_tokens=False))


def test_a_reply_that_fails_is_told_with_its_reason() -> None:
    class Fails(Script):
        def reply(self, segments: Sequence[Segment]) -> str:
            raise Unavailable("no answer in time")

    failed = Turns(Fails([]), TOKENIZER, 1).go_on(sampled([5]), 100)
    assert (failed.finish_reason, failed.failure, failed.response_token_ids) == ("failed", "no answer in time", (5,))
    assert Sample.from_json(failed.to_json()) == failed


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        ("serch", {}, r"rollout\.environment\.name='serch': no such environment .* use one of search"),
        ("no_such.module.function", {}, "no such environment"),
        ("search", {"corpus": "x"}, r"rollout\.environment\.settings of 'search': .*missing"),
        ("tests.rollout.test_environment.Script", {"texts": [], "more": 1}, "unexpected keyword"),
    ],
)
def test_an_environment_that_is_none_is_told(name: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_environment(name, own)
    assert isinstance(open_environment("tests.rollout.test_environment.Script", {"texts": ["a"]}), Script)
