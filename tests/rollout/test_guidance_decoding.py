"""Segments of a stream, edits, and both modes of guided decoding against plain references, on fakes in memory."""

import asyncio
import codecs
import itertools
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.guidance import edits
from rollout.guidance.clients import GeneratorFailed, Piece, ValuesUnavailable
from rollout.guidance.decoding import Answer, Question, Step
from rollout.guidance.edits import EditRefused
from rollout.guidance.reading import Segment, read_segments
from rollout.guidance.segments import segment_ends
from rollout.guidance.settings import GuidanceConfig
from tests.rollout.fake_guidance import (
    EOS,
    PATIENT,
    TREE,
    FakeModel,
    FakeTokenizer,
    FakeValues,
    full_tree,
    guidance,
    guide,
    leaves,
    reference_monitor,
    table_of,
)

MARKS = ["<think>", "</think>"]
TEXT = "<think>First we look at it. Then we see more.\nA line\n\n</think>The answer is yes. And more follows"


async def read_all(pieces: Sequence[Piece], longest: int, tokenizer: FakeTokenizer) -> list[Segment]:
    async def stream() -> AsyncGenerator[Piece, None]:
        for piece in pieces:
            yield piece

    async def decode(token_ids: Sequence[int]) -> str:
        return tokenizer.decode(token_ids)

    return [segment async for segment in read_segments(stream(), MARKS, longest, decode)]


def pieces_of(tokens: Sequence[int], sizes: Sequence[int], tokenizer: FakeTokenizer) -> list[Piece]:
    """The tokens in pieces of these sizes, taken round; the last one ends the stream."""
    pieces = []
    start = 0
    for size in itertools.cycle(sizes):
        taken = tokens[start : start + size]
        start += size
        text = tokenizer.decode([token for token in taken if token != EOS])
        pieces.append(Piece(text, tuple(taken), "stop" if start >= len(tokens) else None))
        if start >= len(tokens):
            return pieces
    raise AssertionError


@settings(PATIENT, max_examples=50)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_segments_do_not_depend_on_the_pieces_in_which_a_stream_comes(sizes: list[int]) -> None:
    tokenizer = FakeTokenizer()
    tokens = [*tokenizer.encode(TEXT), EOS]
    segments = asyncio.run(read_all(pieces_of(tokens, sizes, tokenizer), 100, tokenizer))
    ends = list(itertools.accumulate(len(segment.text) for segment in segments))
    assert ends == segment_ends(TEXT, MARKS, complete=True)
    assert [segment.finish_reason for segment in segments] == [None] * (len(segments) - 1) + ["stop"]
    assert [token for segment in segments for token in segment.token_ids] == tokens
    for segment in segments:
        assert tokenizer.decode(segment.token_ids[: segment.scored]) == segment.text
    assert len(segments) > 4


def test_a_long_segment_is_cut_and_what_follows_the_text_is_not_scored() -> None:
    tokenizer = FakeTokenizer()
    tokens = [*tokenizer.encode("a b c d e f g\n "), EOS]
    segments = asyncio.run(read_all(pieces_of(tokens, [1], tokenizer), 5, tokenizer))
    assert [segment.text for segment in segments] == ["a b c d e", " f g", "\n "]
    assert [segment.scored for segment in segments] == [5, 2, 0]


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_segment_is_not_cut_inside_a_character(goes_on: bool) -> None:
    """Each token is a byte, and its text comes with the last byte of a character, as in a stream of vLLM."""
    tokens = list("aé🎉b🎉🎉é".encode())

    async def decode(token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")

    async def read(length: int) -> list[Segment]:
        async def stream() -> AsyncGenerator[Piece, None]:
            decoder = codecs.getincrementaldecoder("utf-8")()
            for place, token in enumerate(tokens[:length], start=1):
                yield Piece(decoder.decode(bytes([token])), (token,), "length" if place == length else None)

        longest = 100 if goes_on else 5
        return [segment async for segment in read_segments(stream(), MARKS, longest, decode, goes_on)]

    if goes_on:
        for length in range(5, len(tokens)):
            (segment,) = asyncio.run(read(length))
            assert segment.text == bytes(segment.token_ids).decode()
            assert segment.finish_reason is None
            assert length - 4 < len(segment.token_ids) <= length
    else:
        segments = asyncio.run(read(len(tokens)))
        assert len(segments) > 3
        assert all(segment.text == bytes(segment.token_ids).decode() for segment in segments)
        assert [token for segment in segments for token in segment.token_ids] == tokens


def test_tokens_that_can_t_be_told_apart_stay_together() -> None:
    """A tokenizer whose pieces read otherwise alone: the piece is taken as a whole, and no token is lost."""

    async def pieces() -> AsyncGenerator[Piece, None]:
        yield Piece("One sentence here. Tw", (5, 6, 7), None)
        yield Piece("o", (8,), "stop")

    async def decode(token_ids: Sequence[int]) -> str:
        return "?" * 50

    async def read() -> list[Segment]:
        return [segment async for segment in read_segments(pieces(), MARKS, 100, decode)]

    assert asyncio.run(read()) == [
        Segment("One sentence here. Tw", (5, 6, 7), 3, None),
        Segment("o", (8,), 1, "stop"),
    ]


# Edits.


@pytest.mark.parametrize(
    ("edited", "kept"),
    [
        ("One two three", 3),
        ("One two three four", 3),
        ("One two tree", 2),
        ("One tw", 1),
        ("", 0),
        ("Zero one", 0),
    ],
)
def test_an_edit_keeps_the_whole_tokens_before_it_but_no_end(edited: str, kept: int) -> None:
    model = FakeModel({})
    token_ids = [*model.tokenizer.encode("One two three"), EOS]
    edit = asyncio.run(edits.edit_text(model, "fake", token_ids, edited))
    assert edit.kept == kept
    assert edit.tail == edited[len(model.tokenizer.decode(token_ids[:kept])) :]
    assert model.tokenizer.decode([*token_ids[:kept], *edit.tail_ids]) == edited


class ByteModel(FakeModel):
    """A token for each byte, so that a character takes several."""

    async def encode(self, model: str, text: str, special_tokens: bool) -> list[int]:
        return list(text.encode())

    async def decode(self, model: str, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


@settings(PATIENT)
@given(old=st.text("aé🎉🎊", max_size=8), edited=st.text("aé🎉🎊", max_size=8))
def test_an_edit_never_ends_inside_a_character_and_keeps_the_most(old: str, edited: str) -> None:
    edit = asyncio.run(edits.edit_text(ByteModel({}), "fake", list(old.encode()), edited))
    assert old.encode()[: edit.kept] + bytes(edit.tail_ids) == edited.encode()
    shared = next((place for place, (a, b) in enumerate(zip(old, edited, strict=False)) if a != b), None)
    assert edit.kept == len(old[: min(len(old), len(edited)) if shared is None else shared].encode())


def test_an_edit_that_would_read_otherwise_is_refused() -> None:
    class Lower(FakeModel):
        async def encode(self, model: str, text: str, special_tokens: bool) -> list[int]:
            return await super().encode(model, text.lower(), special_tokens)

    model = Lower({})
    kept = model.tokenizer.encode("One")
    assert asyncio.run(edits.replace_tail(model, "fake", kept, " two"))
    with pytest.raises(EditRefused, match="the tokens after the edit read ' two', not ' Two'"):
        asyncio.run(edits.replace_tail(model, "fake", kept, " Two"))


# Decoding. The trees' segments are sentences, each longer than the shortest sentence.


async def run(answer: Answer) -> list[Step]:
    return [step async for step in answer.steps()]


@dataclass
class Result:
    answer: Answer
    steps: list[Step]

    @property
    def text(self) -> str:
        return "".join(step.text for step in self.steps)


def decode(
    config: GuidanceConfig, model: FakeModel, value: Callable[[str], Sequence[float]], **question: Any
) -> Result:
    """Answer the fake's question; ``value`` is of the answer's text so far."""
    values = FakeValues(model, lambda text: value(text.removeprefix(model.prompt)))
    asked = {"max_tokens": config.max_tokens, "seed": 0, **question}
    answer = guide(config, model, values).answer(Question("fake", model.prompt_ids(), **asked))
    return Result(answer, asyncio.run(run(answer)))


def reference_beams(tree: dict[str, list[str]], score: dict[str, float], width: int) -> str:
    beams = [""]
    while any(beam in tree for beam in beams):
        pool = [beam for beam in beams if beam not in tree]
        for beam in beams:
            pool += [beam + segment for segment in tree.get(beam, [])]
        beams = sorted(pool, key=lambda text: -score[text])[:width]
    return beams[0]


DISTINCT = st.lists(st.floats(0, 1), min_size=40, max_size=60, unique=True)


@settings(PATIENT, max_examples=30)
@given(scores=DISTINCT, width=st.integers(1, 4))
def test_search_finds_what_a_plain_beam_search_finds(scores: list[float], width: int) -> None:
    """Three candidates with seeds in a row are all three children."""
    score = table_of(scores, TREE)
    config = guidance(mode="search", threshold=None, candidates=3, beams=width)
    result = decode(config, FakeModel(TREE), lambda text: (score[text], score[text]))
    expected = reference_beams(TREE, score, width)
    assert result.text == expected
    assert result.answer.finish_reason == "stop"
    assert result.answer.lowest_score is not None


@settings(PATIENT, max_examples=10)
@given(scores=DISTINCT)
def test_search_with_all_beams_finds_the_best_answer_of_all(scores: list[float]) -> None:
    tree = full_tree(3, 2)
    score = table_of(scores, tree)
    config = guidance(mode="search", threshold=None, candidates=2, beams=len(leaves(tree)))
    result = decode(config, FakeModel(tree), lambda text: (score[text], score[text]))
    assert result.text == max(leaves(tree), key=lambda leaf: score[leaf])


def test_the_weights_decide() -> None:
    tree = {"": ["Sentence one here.", "Sentence two here."]}
    value = {"Sentence one here.": (0.9, 0.2), "Sentence two here.": (0.3, 0.7)}
    for weights, expected in (((1.0, 1.0), 0), ((1.0, 3.0), 1), ((0.0, 1.0), 1)):
        config = guidance(
            mode="search", threshold=None, candidates=2, weights=dict(zip(("safety", "value"), weights, strict=True))
        )
        assert decode(config, FakeModel(tree), value.__getitem__).text == tree[""][expected]


@settings(PATIENT, max_examples=40)
@given(scores=DISTINCT, threshold=st.floats(0, 1), candidates=st.integers(1, 3), merge=st.integers(1, 9))
def test_monitor_does_what_a_plain_loop_does(
    scores: list[float], threshold: float, candidates: int, merge: int
) -> None:
    score = table_of(scores, TREE)
    model = FakeModel(TREE, merge=merge)
    config = guidance(threshold=threshold, candidates=candidates)
    result = decode(config, model, lambda text: (score[text], score[text]))
    assert (result.text, result.answer.steered) == reference_monitor(model, score, threshold, candidates)
    assert result.answer.unguided is None


def test_an_answer_above_the_threshold_is_the_unguided_one_from_one_stream() -> None:
    model = FakeModel(TREE)
    result = decode(guidance(threshold=0.1), model, lambda text: (0.5, 0.5), seed=1)
    assert result.text == "".join(model.continuation("", 1))
    assert len(model.requests) == 1
    assert result.answer.generated_tokens == result.answer.answer_tokens
    assert {step.origin for step in result.steps} == {"draft"}
    assert result.steps[0].values == {"safety": 0.5, "value": 0.5}


def test_segments_that_wait_are_scored_in_one_request() -> None:
    """All of the draft has come when the first values are asked for."""
    model = FakeModel(TREE)
    values = FakeValues(model, lambda text: (0.9, 0.9))
    answer = guide(guidance(), model, values).answer(Question("fake", model.prompt_ids(), 500, seed=0))
    steps = asyncio.run(run(answer))
    assert sum(len(texts) for texts in values.scored) == len(steps)
    assert len(values.scored) < len(steps)


CORRECTING = {"": ["<think>It is easy to harm."], "<think>It is easy to harm.": [" More harm follows now."]}


@pytest.mark.parametrize(("where", "text"), [("thinking", " Wait, that is wrong."), ("answer", " No, I will not.")])
def test_a_correction_takes_the_place_of_a_segment_that_stays_low(where: str, text: str) -> None:
    beginning = "<think>It is very easy." if where == "thinking" else "<think>It is very easy.</think>"
    after = beginning + text
    tree = {
        "": [beginning],
        beginning: [" Here is how to harm."],
        beginning + " Here is how to harm.": [" And then some more."],
        after: [" I help in another way."],
    }
    model = FakeModel(tree)
    config = guidance(candidates=2, **{f"correction__{where}": text})
    result = decode(config, model, lambda text: (0.0, 0.0) if text.endswith("harm.") else (0.9, 0.9))
    assert result.text == after + " I help in another way."
    assert [step.origin for step in result.steps if step.origin != "draft"] == ["correction"]
    assert (result.answer.steered, result.answer.corrections) == (1, 1)
    # The tokens before the correction are those that were generated, and it goes on from them as they are.
    tokens = [token for step in result.steps for token in step.token_ids]
    last_prefix = model.requests[-1][0]
    assert [*model.prompt_ids(), *tokens][: len(last_prefix)] == last_prefix
    assert model.tokenizer.decode(last_prefix) == model.prompt + after


def test_a_correction_follows_the_mark_that_begins_the_thinking() -> None:
    model = FakeModel(CORRECTING | {"<think> Wait, that is wrong.": [" And so I stop here."]})
    config = guidance(candidates=1, correction__thinking=" Wait, that is wrong.")
    result = decode(config, model, lambda text: (0.0, 0.0) if "harm" in text else (0.9, 0.9))
    assert result.text == "<think> Wait, that is wrong. And so I stop here."


def test_a_correction_for_the_answer_alone_leaves_the_thinking() -> None:
    model = FakeModel(CORRECTING)
    config = guidance(candidates=1, correction__answer=" No, I will not.")
    result = decode(config, model, lambda text: (0.0, 0.0))
    assert result.answer.corrections == 0
    assert result.text == "".join(model.continuation("", 0))


@pytest.mark.parametrize(
    ("mode", "changes", "reason"),
    [
        ("monitor", {"budget_tokens": 12}, "budget_tokens=12 are spent"),
        ("search", {"budget_tokens": 12}, "budget_tokens=12 are spent"),
        ("monitor", {"max_steered": 1}, "max_steered=1 segments were steered"),
    ],
)
def test_what_is_used_up_ends_the_guidance_and_is_said(
    mode: str, changes: dict[str, int], reason: str, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    model = FakeModel(TREE)
    config = guidance(mode=mode, threshold=0.5 if mode == "monitor" else None, log=str(log), **changes)
    result = decode(config, model, lambda text: (0.0, 0.0))
    assert result.answer.unguided == reason
    assert result.answer.finish_reason == "stop"
    assert result.text in leaves(TREE)
    (entry,) = [entry for entry in read(log) if entry["decision"] == "unguided"]
    assert entry["reason"] == reason


def read(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["monitor", "search"])
def test_every_decision_is_in_the_log(mode: str, tmp_path: Path) -> None:
    log = tmp_path / "folder" / "log.jsonl"
    score = table_of([0.4, 0.6, 0.2, 0.9, 0.3], TREE)
    config = guidance(mode=mode, threshold=0.5 if mode == "monitor" else None, log=str(log))
    result = decode(config, FakeModel(TREE), lambda text: (score[text], score[text]))
    entries = read(log)
    chosen = ""
    for entry in entries[:-1]:
        candidates = entry["candidates"]
        assert all(set(candidate) >= {"text", "tokens", "values", "score", "origin"} for candidate in candidates)
        scores = [candidate["score"] for candidate in candidates]
        assert scores[entry["chosen"][0]] == max(scores)
        assert (entry["decision"] == "accept") == (len(candidates) == 1)
        assert entry["weights"] == [0.5, 0.5]
        assert entry["seconds"] >= 0
        chosen += candidates[entry["chosen"][0]]["text"]
    assert chosen == result.text
    assert {entry["answer"] for entry in entries} == {result.answer.id}
    assert entries[-1]["decision"] == "end"
    assert entries[-1]["finish_reason"] == "stop"
    assert entries[-1]["generated_tokens"] == result.answer.generated_tokens
    assert log.stat().st_mode & 0o777 == 0o600


class DyingValues(FakeValues):
    """Dead after so many requests."""

    def __init__(self, model: FakeModel, requests: int, value: float) -> None:
        super().__init__(model, lambda text: (value, value))
        self.left = requests

    async def score(self, prefixes: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        self.left -= 1
        self.is_dead = self.left < 0
        return await super().score(prefixes)


@pytest.mark.parametrize("mode", ["monitor", "search"])
@pytest.mark.parametrize("requests", [0, 1, 2])
@pytest.mark.parametrize("policy", ["stop", "unguided"])
def test_a_dead_value_server_ends_in_the_stated_policy(mode: str, requests: int, policy: str, tmp_path: Path) -> None:
    """Monitor, with a low draft: request 0 scores it, 1 the candidates, 2 the next draft."""
    log = tmp_path / "log.jsonl"
    model = FakeModel(TREE)
    threshold = 0.5 if mode == "monitor" else None
    config = guidance(mode=mode, threshold=threshold, values__on_failure=policy, log=str(log))
    values = DyingValues(model, requests, 0.1)
    answer = guide(config, model, values).answer(Question("fake", model.prompt_ids(), 500, seed=0))
    if policy == "stop":
        with pytest.raises(ValuesUnavailable, match="the value server is dead"):
            asyncio.run(run(answer))
        assert [entry["decision"] for entry in read(log)][-2:] == ["stop", "end"]
        return
    steps = asyncio.run(run(answer))
    assert "".join(step.text for step in steps) in leaves(TREE)
    assert answer.unguided == "the value server is dead"
    assert answer.summary()["unguided"] == "the value server is dead"
    assert steps[-1].values is None
    assert values.left == -1  # and it is not asked again
    assert [entry["reason"] for entry in read(log) if entry["decision"] == "unguided"] == ["the value server is dead"]


def test_a_generator_that_refuses_or_dies_ends_the_answer() -> None:
    model = FakeModel(TREE)
    with pytest.raises(GeneratorFailed, match="temperature"):
        decode(guidance(), model, lambda text: (1.0, 1.0), sampling={"temperature": 9})
    with pytest.raises(GeneratorFailed, match="temperature"):
        decode(guidance(mode="search"), model, lambda text: (1.0, 1.0), sampling={"temperature": 9})


@pytest.mark.parametrize("mode", ["monitor", "search"])
@pytest.mark.parametrize("max_tokens", [1, 5, 11])
def test_an_answer_is_never_longer_than_it_may_be(mode: str, max_tokens: int) -> None:
    threshold = 0.5 if mode == "monitor" else None
    config = guidance(mode=mode, threshold=threshold, max_segment_tokens=3, max_steered=2)
    result = decode(config, FakeModel(TREE), lambda text: (0.1, 0.1), max_tokens=max_tokens)
    assert result.answer.answer_tokens == max_tokens == sum(len(step.token_ids) for step in result.steps)
    assert result.answer.finish_reason == "length"


class LineTokenizer(FakeTokenizer):
    """A line's last colon and its line break are one token."""

    def encode(self, text: str) -> list[int]:
        pieces = [piece for line in text.splitlines(keepends=True) for piece in line.partition(":\n") if piece]
        return [token for piece in pieces for token in self.tokens(piece)]

    def tokens(self, piece: str) -> list[int]:
        if piece != ":\n":
            return super().encode(piece)
        if piece not in self.pieces:
            self.pieces.append(piece)
        return [self.pieces.index(piece)]


@pytest.mark.parametrize("mode", ["monitor", "search"])
@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_an_answer_s_last_token_may_end_a_line(mode: str, max_tokens: int) -> None:
    """vLLM says "length" with this token, and the reader only after the segment that the token ends."""
    first, second = "First we add:\n", "Then we take:\n"
    model = FakeModel({"": [first], first: [second]})
    model.tokenizer = LineTokenizer()
    assert len(model.tokenizer.encode(first + second)) == 8
    config = guidance(mode=mode, threshold=0.5 if mode == "monitor" else None, max_steered=2)
    result = decode(config, model, lambda text: (0.1, 0.1), max_tokens=max_tokens)
    assert result.answer.answer_tokens == max_tokens
    assert result.answer.finish_reason == "length"


def test_a_stop_text_ends_the_answer_also_across_segments() -> None:
    tree = {"": ["The first one is here."], "The first one is here.": [" Then the rest is here."]}
    model = FakeModel(tree)
    shown = decode(guidance(), model, lambda text: (0.9, 0.9), stops=("here. Then",))
    assert shown.text == "The first one is "
    assert shown.steps[0].text == "The first one is "
    assert shown.answer.finish_reason == "stop"
    assert decode(guidance(), model, lambda text: (0.9, 0.9), stops=("absent",)).text == "".join(leaves(tree))


def test_candidates_have_seeds_of_their_own_and_the_same_seed_gives_the_same_answer() -> None:
    score = table_of([0.4, 0.6, 0.2, 0.9, 0.3], TREE)
    first, again = FakeModel(TREE), FakeModel(TREE)
    texts = [decode(guidance(), model, lambda text: (score[text],) * 2, seed=7).text for model in (first, again)]
    assert texts[0] == texts[1]
    seeds = [options["seed"] for _, options in first.requests]
    assert seeds == list(range(7, 7 + len(seeds)))
    assert first.requests == again.requests
