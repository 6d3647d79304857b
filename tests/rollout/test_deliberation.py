"""Deliberate search by a served model: its turns, steps, votes and sources, and how it ends. The model is a fake."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from rewards.verifiers.text import THINK_BEGIN
from rollout import search
from rollout.deliberation.deliberating import Deliberation, Deliberator
from rollout.deliberation.episodes import Episode, ShownStep
from rollout.deliberation.voting import Reply, vote
from rollout.environment import Segment, Turns, Unavailable
from rollout.guidance.clients import GeneratorFailed
from rollout.guidance.decoding import Question
from rollout.retrieval import Document
from rollout.search import Search
from tests.rollout.fake_guidance import MODEL
from tests.rollout.fake_searcher import (
    CORPUS,
    HF_TOKENIZER,
    HOSTILE,
    LOOK,
    QUESTION,
    SCRIPTS,
    SEARCH,
    SURE,
    FakeSearcher,
    deliberation,
)

PROMPT = tuple(HF_TOKENIZER.encode(QUESTION, add_special_tokens=False))
TURNS = Turns(SEARCH, HF_TOKENIZER, 4, THINK_BEGIN)


def followed(model: FakeSearcher, turns: Turns = TURNS, max_tokens: int = 500, **more: Any) -> Episode:
    """An episode to its end."""

    async def run() -> Episode:
        episode = Episode(model, turns, Question(MODEL, PROMPT, max_tokens, **more), 0)
        steps = [step async for step in episode.steps()]
        assert steps == episode.shown
        return episode

    return asyncio.run(run())


def expected_segments(script: Sequence[str], environment: Search = SEARCH) -> list[Segment]:
    """The episode of a script, made without tokens."""
    said: list[Segment] = []
    for turn in script:
        if said:
            reply = environment.reply(said).replace("<|im_end|>", " ")
            said.append(Segment(reply, by_environment=True))
        said.append(Segment(turn, by_environment=False))
    return said


@pytest.mark.parametrize("merge", [1, 3, 1000])
def test_an_episode_is_that_of_training_token_by_token(merge: int) -> None:
    """The model goes on from its own tokens and from the environment's reply, which is encoded once, by itself."""
    model = FakeSearcher([SURE], merge)
    episode = followed(model, sampling={"temperature": 0.5, "top_p": 0.9}, seed=7)
    said = expected_segments(SURE)
    prefixes = [list(PROMPT)]
    for segment in said[:-1]:
        prefixes.append([*prefixes[-1], *HF_TOKENIZER.encode(segment.text, add_special_tokens=False)])
    assert [request for request, _ in model.requests] == prefixes[::2]
    for prefix, options in model.requests:
        assert options["max_tokens"] == 500 - (len(prefix) - len(PROMPT))
        assert (options["temperature"], options["top_p"], options["stop"]) == (0.5, 0.9, ["</search>", "</read>"])
    assert len({options["seed"] for _, options in model.requests}) == 3, "noise of its own for each turn"
    assert [shown.step for shown in episode.shown] == search.steps(said)
    assert [shown.reply for shown in episode.shown if shown.reply is not None] == [said[1].text, said[3].text]
    listed, read = (shown.documents for shown in episode.shown if shown.reply is not None)
    assert listed == (Document("norland", "The capital of Norland is Veska."), replace(CORPUS[1], text=CORPUS[1].text))
    assert read == (Document("norland", CORPUS[0].text.replace("<|im_end|>", " ")),)
    assert (episode.answer, episode.confidence, episode.finish_reason) == ("Veska", 9, "stop")


@pytest.mark.parametrize("merge", [1, 1000])
def test_an_episode_whose_thinking_the_prompt_has_begun_has_the_same_steps(merge: int) -> None:
    model = FakeSearcher([[SURE[0].removeprefix(THINK_BEGIN), *SURE[1:]]], merge)
    model.prompt = f"{QUESTION}{THINK_BEGIN}\n"
    prompt = tuple(HF_TOKENIZER.encode(model.prompt, add_special_tokens=False))

    async def run() -> Episode:
        episode = Episode(model, TURNS, Question(MODEL, prompt, 500), 0)
        assert [step async for step in episode.steps()] == episode.shown
        return episode

    episode = asyncio.run(run())
    assert [shown.step for shown in episode.shown] == search.steps(expected_segments(SURE))
    assert not any(shown.step.fault for shown in episode.shown)


def test_a_step_is_shown_as_soon_as_it_is_complete() -> None:
    async def run() -> None:
        model = FakeSearcher([["<think>One.</think> <think>Two.</think><confidence>3</confidence><answer>x</answer>"]])
        model.gate = asyncio.Semaphore(0)
        episode = Episode(model, TURNS, Question(MODEL, PROMPT, 500), 0)
        steps = episode.steps()
        text = model.scripts[0][0]
        for end in ("One.</think>", "Two.</think>"):
            waiting = asyncio.ensure_future(anext(steps))
            tokens = len(model.tokenizer.encode(text[: text.index(end) + len(end)]))
            while model.sent < tokens:
                assert not waiting.done()
                model.gate.release()
                await asyncio.sleep(0.002)
            shown = await asyncio.wait_for(waiting, 30)
            assert (shown.step.action, shown.step.content, shown.step.fault) == ("think", end.partition("<")[0], "")
            assert model.sent == tokens
        await steps.aclose()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("script", "max_turns", "max_tokens", "reason", "last"),
    [
        ([f"<think>a</think>{LOOK}", LOOK], 1, 500, "turns", ("end", "no answer at the end")),
        ([f"<think>a</think>{LOOK}"], 4, 60, "length", ("end", "no answer at the end")),
        (
            ["<think>a</think><confidence>3</confidence><answer>x</answer>"],
            4,
            20,
            "length",
            ("end", "no answer at the end"),
        ),
        (["It is Veska."], 4, 500, "stop", ("end", "no answer at the end")),
        (["It is Veska, I think."], 4, 5, "length", ("end", "no answer at the end")),
        (["<think>a</think>so</search>", "<answer>x</answer>"], 4, 500, "stop", ("answer", "no confidence before it")),
        ([f"<think>a</think>{LOOK}", "<read>westland</read>", SURE[-1]], 4, 500, "stop", ("answer", "")),
        (["<think>a</think>" + SURE[-1] + " done"], 4, 500, "stop", ("text", "not an action")),
    ],
)
def test_how_an_episode_ends_and_what_its_steps_are(
    script: list[str], max_turns: int, max_tokens: int, reason: str, last: tuple[str, str]
) -> None:
    episode = followed(FakeSearcher([script], merge=2), Turns(SEARCH, HF_TOKENIZER, max_turns, THINK_BEGIN), max_tokens)
    assert episode.finish_reason == reason
    shown = [shown.step for shown in episode.shown]
    if reason == "stop":
        assert shown == search.steps(expected_segments(script))
    steps = [step for step in shown if step.action != "end"] if last[0] != "end" else shown
    assert (steps[-1].action, steps[-1].fault) == last
    assert (episode.answer is not None) == (reason == "stop")
    replies = [step for step in episode.shown if step.reply is not None]
    assert len(replies) == (len(script) - 1 if reason == "stop" else max_turns if reason == "turns" else 0)


def test_a_search_engine_that_fails_ends_its_sample_with_the_reason() -> None:
    class Fails:
        def search(self, query: str, count: int) -> list[Document]:
            raise Unavailable("no answer in time")

    turns = Turns(Search(Fails(), 1, 6), HF_TOKENIZER, 4, THINK_BEGIN)  # type: ignore[arg-type]
    episode = followed(FakeSearcher([SURE]), turns)
    assert (episode.finish_reason, episode.failure, episode.answer) == ("failed", "no answer in time", None)
    assert episode.shown[1].step.fault == "without a result"


def deliberator(model: FakeSearcher, turns: Turns = TURNS, **changes: Any) -> Deliberator:
    return Deliberator(model, [{"id": MODEL}], deliberation(**changes), turns)  # type: ignore[arg-type]


async def deliberated(opened: Deliberator, samples: int = 3) -> tuple[Deliberation, list[ShownStep]]:
    deliberation = opened.deliberate(Question(MODEL, PROMPT, 500), samples)
    return deliberation, [step async for step in deliberation.steps()]


def test_both_votes_their_confidence_and_their_sources() -> None:
    deliberation, steps = asyncio.run(deliberated(deliberator(FakeSearcher())))
    majority, weighted = deliberation.conclusion(weighted=False), deliberation.conclusion(weighted=True)
    assert majority is not None and weighted is not None and deliberation.chosen == weighted
    assert (majority.answer, majority.samples, majority.share) == ("Tarn", (1, 2), pytest.approx(2 / 3))
    assert (majority.confidence, majority.is_certain) == (1.5, False)
    assert (weighted.answer, weighted.samples, weighted.share) == ("Veska", (0,), pytest.approx(9 / 12))
    assert (weighted.confidence, weighted.is_certain) == (9, True)
    # What the samples with the answer were shown, in the longer form; what has the answer comes first.
    assert [(source.id, source.has_answer) for source in weighted.sources] == [
        ("norland", True),
        ("https://sudland.example/a", False),
    ]
    assert HOSTILE in weighted.sources[0].text and weighted.sources[0].link is None
    assert [source.id for source in majority.sources] == ["https://sudland.example/a", "norland"]
    assert majority.sources[0].link == "https://sudland.example/a"
    for sample, episode in enumerate(deliberation.episodes):
        assert [step for step in steps if step.sample == sample] == episode.shown
    summary = deliberation.summary()
    assert summary["votes"]["majority"]["answer"] == "Tarn" and summary["vote"] == "confidence_weighted"
    assert [sample["legal"] for sample in summary["samples"]] == [True, True, True]


def test_many_questions_at_once_are_those_that_come_alone() -> None:
    async def run() -> None:
        opened = deliberator(FakeSearcher())

        async def one(place: int) -> tuple[str, list[str | None]]:
            prompt = tuple(HF_TOKENIZER.encode(f"Question {place}?", add_special_tokens=False))
            deliberation = opened.deliberate(Question(MODEL, prompt, 500), 3)
            async for _ in deliberation.steps():
                pass
            assert deliberation.chosen is not None
            return deliberation.chosen.answer, [episode.answer for episode in deliberation.episodes]

        assert await asyncio.gather(*map(one, range(40))) == [("Veska", ["Veska", "Tarn", "Tarn"])] * 40

    asyncio.run(run())


def test_what_is_left_early_or_fails_ends_all_its_samples() -> None:
    class Dies(FakeSearcher):
        def turn(self, prompt: str, response: str) -> str:
            if response.startswith(SCRIPTS[1][0]):
                raise GeneratorFailed("the server is gone")
            return super().turn(prompt, response)

    async def run() -> None:
        before = len(asyncio.all_tasks())
        left = deliberator(FakeSearcher()).deliberate(Question(MODEL, PROMPT, 500), 3).steps()
        await anext(left)
        await left.aclose()
        assert len(asyncio.all_tasks()) == before
        with pytest.raises(GeneratorFailed, match="the server is gone"):
            await deliberated(deliberator(Dies()))
        assert len(asyncio.all_tasks()) == before

    asyncio.run(run())


def test_a_sample_whose_search_failed_has_no_vote_and_all_of_them_are_an_error() -> None:
    class FailsToRead:
        def search(self, query: str, count: int) -> list[Document]:
            return CORPUS[:count]

        def read(self, document_id: str) -> str | None:
            raise Unavailable("it is gone")

    turns = Turns(Search(FailsToRead(), 1, 6), HF_TOKENIZER, 4, THINK_BEGIN)
    deliberation, _ = asyncio.run(deliberated(deliberator(FakeSearcher(), turns)))
    assert deliberation.episodes[0].finish_reason == "failed"
    assert deliberation.chosen is not None and deliberation.chosen.answer == "Tarn"
    with pytest.raises(Unavailable, match="it is gone"):
        asyncio.run(deliberated(deliberator(FakeSearcher([SURE]), turns)))
    nothing, _ = asyncio.run(deliberated(deliberator(FakeSearcher([["<think>I do not know.</think>"]]))))
    assert nothing.chosen is None and nothing.summary()["votes"] == {"majority": None, "confidence_weighted": None}


@pytest.mark.parametrize(
    ("replies", "majority", "weighted"),
    [
        ([("Tarn", 2), ("tarn. ", 1), ("Veska", 9)], (0, 1), (2,)),
        ([("Tarn", 5), ("Tarn", 4), ("Veska", 9)], (0, 1), (0, 1)),  # 9 against 9: more replies win
        ([("Tarn", 5), ("Veska", 5)], (0,), (0,)),  # the first
        ([("Tarn", 9), ("Veska", None)], (0,), (1,)),  # not stated: 10
        ([("Tarn", 0), (None, 10), ("Veska", 0), ("Veska", 0)], (2, 3), (2, 3)),
        ([(None, 9)], None, None),
        ([], None, None),
    ],
)
def test_votes(
    replies: list[tuple[str | None, int | None]], majority: tuple[int, ...] | None, weighted: tuple[int, ...] | None
) -> None:
    for expected, by_confidence in ((majority, False), (weighted, True)):
        won = vote([Reply(*reply) for reply in replies], by_confidence)
        assert (None if won is None else won.places) == expected


def test_the_share_of_a_vote() -> None:
    replies = [Reply("Tarn", 2), Reply("Veska", 6), Reply("Tarn", None), Reply(None, 3)]
    by_count, by_confidence = vote(replies, weighted=False), vote(replies, weighted=True)
    assert by_count is not None and by_confidence is not None
    assert (by_count.share, by_confidence.share) == (pytest.approx(2 / 3), pytest.approx(12 / 18))
    zero = vote([Reply("Tarn", 0)], weighted=True)
    assert zero is not None and zero.share == 0
