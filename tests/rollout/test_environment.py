"""Turns of an environment without an engine: what is appended, what stays, and how an episode ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext import batch as batches
from megatron_ext.batch import TokenBatch
from rollout.environment import Segment, Turns, Unavailable, open_environment, segments
from tests.recipes.tiny import make_tokenizer
from tests.responses import PlainResponse, make_prompt, plain

TOKENIZER = make_tokenizer()
IDS = st.lists(st.integers(3, len(TOKENIZER) - 1), min_size=1, max_size=8)
THINK = "<think>"
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


def sampled(ids: Sequence[int], partial: TokenBatch | None = None) -> TokenBatch:
    """A turn as an engine gives it, with log-probs that name each token."""
    turn = batches.build(
        [make_prompt("p", [9, 9])],
        [ids],
        logprobs=[[logprob_of(token) for token in ids]],
        version=3 if partial is None else int(partial.versions[-1]) + 1,
        finish_reasons=["turn"],
    )
    return turn if partial is None else batches.extend(partial, turn)


def logprob_of(token: int) -> float:
    return float(np.float32(-0.001 * token - 0.5))


def reply(rules: Turns, response: TokenBatch, max_tokens: int) -> PlainResponse:
    (one,) = plain(rules.reply(response, max_tokens))
    return one


@settings(deadline=None)
@given(st.lists(st.tuples(IDS, TEXTS), min_size=1, max_size=4))
def test_ids_never_change_across_turns_and_the_environment_s_are_exactly_the_forced_ones(
    turns: list[tuple[list[int], str]],
) -> None:
    rules = Turns(Script([text for _, text in turns]), TOKENIZER, len(turns), THINK)
    response: TokenBatch | None = None
    ids: list[int] = []
    forced: list[int] = []
    for said, text in turns:
        before = sampled(said, response)
        response = rules.reply(before, 1000)
        encoded = TOKENIZER.encode(text, add_special_tokens=False)
        ids += said
        forced += range(len(ids), len(ids) + len(encoded))
        ids += encoded
        (old,) = plain(before)
        (new,) = plain(response)
        assert new.tokens[: len(old.tokens)] == old.tokens
        assert new.logprobs[: len(old.logprobs)] == old.logprobs
        assert new.versions[: len(old.versions)] == old.versions
    assert response is not None and new.finish_reason == "unfinished"
    assert new.prompt == [9, 9]
    assert new.tokens == ids
    assert new.forced == forced
    for position, token in enumerate(ids):
        expected = 0.0 if position in forced else logprob_of(token)
        assert new.logprobs[position] == expected
    assert len(new.versions) == len(ids)
    pieces = segments(TOKENIZER, response, THINK)
    assert [piece.by_environment for piece in pieces] == [False, True] * len(turns)
    for piece, (_, text) in zip(pieces[1::2], turns, strict=True):
        assert piece.text == text
    assert reply(rules, sampled([5], response), 1000).finish_reason == "turns"


@pytest.mark.parametrize(
    ("end_of_prompt", "first", "seen"),
    [
        ("<think>\n", "so</think>ax", "<think>\nso</think>ax"),
        ("<think>\n", "<think>so</think>ax", "<think>so</think>ax"),
        ("", "so</think>ax", "so</think>ax"),
    ],
)
def test_thinking_that_the_prompt_has_begun_begins_the_first_segment_alone(
    end_of_prompt: str, first: str, seen: str
) -> None:
    """For the environment too. The ids stay."""

    class Listens(Script):
        def reply(self, segments: Sequence[Segment]) -> str:
            heard.append(list(segments))
            return super().reply(segments)

    def ids(text: str) -> list[int]:
        return list(TOKENIZER.encode(text, add_special_tokens=False))

    heard: list[list[Segment]] = []
    rules = Turns(Listens(["[r]"]), TOKENIZER, 2, THINK)
    prompt = make_prompt("p", ids(f"<|im_start|>assistant\n{end_of_prompt}"))
    response = rules.reply(batches.build([prompt], [ids(first)], version=0, finish_reasons=["turn"]), 1000)
    turn = batches.build([prompt], [ids("more</think>b")], version=0, finish_reasons=["stop"])
    response = batches.extend(response, turn)
    assert heard == [[Segment(seen, False)]]
    expected = [Segment(seen, False), Segment("[r]", True), Segment("more</think>b", False)]
    assert segments(TOKENIZER, response, THINK) == expected
    assert response.response_tokens.tolist() == ids(first) + ids("[r]") + ids("more</think>b")


def test_a_reply_that_leaves_no_room_is_not_appended() -> None:
    encoded = TOKENIZER.encode("abc", add_special_tokens=False)
    rules = Turns(Script(["abc"]), TOKENIZER, 1, THINK)
    turn = sampled([5, 6])
    assert reply(rules, turn, 2 + len(encoded) + 1).finish_reason == "unfinished"
    ended = reply(rules, turn, 2 + len(encoded))
    assert (ended.finish_reason, ended.tokens, ended.forced) == ("length", [5, 6], [])


def test_control_tokens_do_not_come_in_from_outside() -> None:
    rules = Turns(Script([""]), TOKENIZER, 1, THINK)
    for text, cleaned in (("a<|im_end|>b", "a b"), ("<|im_<|im_end|>end|>", "<|im_ end|>"), ("<|endoftext|>ab", " ab")):
        assert rules.encode(text) == tuple(TOKENIZER.encode(cleaned, add_special_tokens=False))


def test_a_reply_that_fails_is_told_with_its_reason() -> None:
    class Fails(Script):
        def reply(self, segments: Sequence[Segment]) -> str:
            raise Unavailable("no answer in time")

    failed = reply(Turns(Fails([]), TOKENIZER, 1, THINK), sampled([5]), 100)
    assert (failed.finish_reason, failed.failure, failed.tokens) == ("failed", "no answer in time", [5])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("serch", {}, r"rollout\.environment\.name='serch': no such environment .* use one of search"),
        ("no_such.module.function", {}, "no such environment"),
        ("search", {"corpus": "x"}, r"rollout\.environment\.settings of 'search': .*missing"),
        ("tests.rollout.test_environment.Script", {"texts": [], "more": 1}, "unexpected keyword"),
    ],
)
def test_an_environment_that_is_none_is_told(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_environment(name, arguments)
    assert isinstance(open_environment("tests.rollout.test_environment.Script", {"texts": ["a"]}), Script)
