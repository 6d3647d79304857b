"""The page for people, without a browser: its answers, edits and saved rows, and who may reach it. Its model is a
fake."""

import asyncio
import json
import os
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from recipes.data.preference_pairs import chosen_and_rejected
from recipes.data.processor import PromptProcessor
from recipes.data.rows import PAIR_FIELDS, load_rows
from recipes.data.sft_examples import load_sft_rows, prompt_row, tokenize_example
from recipes.errors import ConfigError
from recipes.page.conversation import (
    PERSON,
    STOPPED,
    Branch,
    Conversation,
    Passage,
    Refused,
    Turn,
    messages,
    sections,
    turns_after,
)
from recipes.page.guard import MOST_BYTES, Guard
from recipes.page.saving import ADDED, KEPT, REMOVED, EditFiles, about, diff, edit_rows
from recipes.page.settings import Setup
from recipes.page.writing import Conversations, Writer, open_writer
from recipes.serve import MODEL_TOKEN, read_setup, served
from rewards.serve import ServerDied
from tests.recipes import tiny
from tests.recipes.fake_thinker import (
    AFTER_ANSWER,
    AFTER_THOUGHT,
    ANSWER,
    CORRECTED,
    QUESTION,
    THOUGHT,
    WRITTEN,
    FakeThinker,
    values,
)
from tests.rewards.test_serve import BrokenServer, LightServer
from tests.rollout.fake_guidance import BEGIN, EOS, PATIENT, FakeServers, FakeValues
from tests.settings import CONF

LETTERS, FAILS = "tests.recipes.letters.letters", "tests.recipes.letters.fails_of_odd_length"
MARKS = ("<think>", "</think>")
EDITED = THOUGHT.replace("Mind this", "But I mind that")


def edited_text(thought: str) -> str:
    """The response up to the end of an edited thought that begins as ``WRITTEN`` does."""
    return f"<think>{thought}"


@dataclass
class World:
    fakes: FakeServers
    writer: Writer
    conversation: Conversation

    @property
    def model(self) -> FakeThinker:
        assert isinstance(self.fakes.model, FakeThinker)
        return self.fakes.model

    async def finished(self) -> None:
        async with asyncio.timeout(60):
            while self.conversation.is_busy:
                await asyncio.sleep(0.002)

    async def asked(self, message: str = QUESTION) -> Branch:
        """The answer to a message."""
        self.writer.ask(self.conversation, message)
        await self.finished()
        return self.conversation.turns[-1].branches[0]

    async def continued(self, place: int, edited: str) -> Branch:
        """The branch that goes on from an edit."""
        await self.writer.continue_from(self.conversation, 0, place, edited)
        await self.finished()
        return self.conversation.turns[0].branches[-1]


def setup_of(generator: str, values_at: str | None, *overrides: str) -> Setup:
    options = {"generator": generator} | ({} if values_at is None else {"values": values_at})
    return read_setup(options, ["guidance.values.principles=[safety,value]", "guidance.log=null", *overrides])


@asynccontextmanager
async def open_world(has_values: bool, *overrides: str) -> AsyncGenerator[World, None]:
    model = FakeThinker()
    fakes = FakeServers(model, FakeValues(model, values))
    async with fakes.running() as (generator, values_at):
        setup = setup_of(generator, values_at if has_values else None, *overrides)
        async with open_writer(setup) as writer:
            yield World(fakes, writer, Conversation())


def with_world(test: Callable[[World], Awaitable[None]], *overrides: str, has_values: bool = False) -> None:
    async def run() -> None:
        async with asyncio.timeout(300), open_world(has_values, *overrides) as world:
            await test(world)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "opens", "thinking", "answer"),
    [
        ("<think>so</think>yes", False, "so", "yes"),
        ("<think>\nso\n</think>\n\nyes", False, "so\n", "yes"),
        ("<think>so", False, "so", None),
        ("so</think>yes", True, "so", "yes"),
        ("<think>so</think>yes", True, "so", "yes"),
        ("so", True, "so", None),
        ("yes", False, None, "yes"),
        ("yes, <think>as text</think>", False, None, "yes, <think>as text</think>"),
        ("<thi", False, None, None),
        ("", False, None, None),
        ("<think></think>yes", False, "", "yes"),
    ],
)
def test_thinking_and_answer_are_told_apart(text: str, opens: bool, thinking: str | None, answer: str | None) -> None:
    spans = sections(text, opens, MARKS)
    shown = [None if section is None else text[slice(*section)] for section in (spans.thinking, spans.answer)]
    assert shown == [thinking, answer]


@PATIENT
@given(st.text("ab \n.", max_size=40), st.text("ab \n.", max_size=40), st.booleans())
def test_a_diff_holds_both_texts(before: str, after: str, is_long: bool) -> None:
    if is_long:
        before, after = before * 2000, after * 2000
    parts = diff(before, after)
    assert "".join(text for kind, text in parts if kind in (KEPT, REMOVED)) == before
    assert "".join(text for kind, text in parts if kind in (KEPT, ADDED)) == after
    assert (len(parts) <= 1 and {kind for kind, _ in parts} <= {KEPT}) == (before == after)


def test_an_answer_with_and_without_values() -> None:
    async def test(world: World) -> None:
        branch = await world.asked()
        assert branch.text == WRITTEN
        assert branch.finish_reason == "stop" and branch.notice is None
        # The tokens are those that the model wrote, its end among them.
        assert branch.token_ids == (*world.model.tokenizer.encode(WRITTEN), EOS)
        ((prompt, options),) = world.model.requests
        assert prompt == world.model.tokenizer.encode(BEGIN + QUESTION)
        assert options.get("temperature") == world.writer.page.temperature
        scored = [passage for passage in branch.passages if passage.values is not None]
        if world.writer.guide is None:
            assert scored == []
            return
        assert "".join(passage.text for passage in scored) == WRITTEN
        for passage in scored:
            upto = WRITTEN[: WRITTEN.index(passage.text) + len(passage.text)]
            assert passage.values == dict(zip(("safety", "value"), values(upto), strict=True))
        assert {passage.values["safety"] for passage in scored if passage.values} == {0.25, 0.75}

    with_world(test)
    with_world(test, "page.temperature=0.5", has_values=True)


def test_an_edit_keeps_the_tokens_before_it_and_the_model_goes_on_from_it() -> None:
    async def test(world: World) -> None:
        first = await world.asked()
        before = replace(first, passages=list(first.passages))
        edited = edited_text(EDITED)
        branch = await world.continued(0, edited)
        assert branch.text == edited + AFTER_THOUGHT
        assert (branch.parent, branch.edited, branch.finish_reason) == (0, edited, "stop")
        assert world.conversation.turns[0].chosen == 1
        # The former branch is as it was.
        assert world.conversation.turns[0].branches[0] == before
        # What the model was asked: the prompt, the tokens before the edit as it wrote them, and the edit's.
        prompt = world.model.tokenizer.encode(BEGIN + QUESTION)
        kept = world.model.tokenizer.encode(f"<think>{THOUGHT.partition(' Mind')[0]}")
        assert first.token_ids[: len(kept)] == tuple(kept)
        tail = world.model.tokenizer.encode(" But I mind that" + THOUGHT.partition("Mind this")[2])
        assert world.model.requests[-1][0] == [*prompt, *kept, *tail]
        assert branch.token_ids[: len(kept) + len(tail)] == (*kept, *tail)
        by_person = [passage.text for passage in branch.passages if passage.origin == PERSON]
        assert by_person == [edited[len("<think>" + THOUGHT.partition(" Mind")[0]) :]]
        # Whole sentences that are kept keep their values.
        if world.writer.guide is not None:
            assert [passage.values for passage in branch.passages[:2]] == [each.values for each in first.passages[:2]]

        # An edit of the answer, and of an edited branch.
        answered = await world.continued(0, f"<think>{THOUGHT}</think>Use cold water.")
        assert answered.text == f"<think>{THOUGHT}</think>Use cold water.{AFTER_ANSWER}"
        again = await world.continued(1, edited[:-10])
        assert again.text == edited[:-10] + AFTER_THOUGHT and again.parent == 1
        assert len(world.conversation.turns[0].branches) == 4

    with_world(test)
    with_world(test, has_values=True)


def test_a_stopped_answer_goes_on_where_it_was() -> None:
    async def test(world: World) -> None:
        world.model.gate = asyncio.Semaphore(9)
        world.writer.ask(world.conversation, QUESTION)
        branch = world.conversation.turns[0].branches[0]
        async with asyncio.timeout(60):
            while len(branch.token_ids) < 9:
                await asyncio.sleep(0.002)
        with pytest.raises(Refused, match="an answer is under way"):
            world.writer.ask(world.conversation, QUESTION)
        with pytest.raises(Refused, match="an answer is under way"):
            await world.writer.continue_from(world.conversation, 0, 0, "<think>Else")
        world.writer.stop(world.conversation)
        await world.finished()
        assert branch.finish_reason == STOPPED
        written = branch.token_ids
        assert len(written) == 9 and branch.text == world.model.tokenizer.decode(written)
        async with asyncio.timeout(60):
            while world.fakes.open_streams:
                await asyncio.sleep(0.002)
        world.model.gate = None
        await world.writer.go_on(world.conversation, 0, 0)
        await world.finished()
        assert (branch.text, branch.finish_reason) == (WRITTEN, "stop")
        assert branch.token_ids[:9] == written
        assert world.writer.under_way == 0
        # Stopped before it began.
        world.writer.ask(world.conversation, QUESTION)
        world.writer.stop(world.conversation)
        await world.finished()
        assert world.conversation.turns[1].branches[0].finish_reason == STOPPED
        assert world.writer.under_way == 0

    with_world(test)


def test_a_failing_server_is_said_and_the_answer_can_go_on() -> None:
    async def test(world: World) -> None:
        world.fakes.fail_after = 5
        branch = await world.asked()
        assert branch.finish_reason == STOPPED and branch.notice is not None
        assert 0 < len(branch.token_ids) <= 5
        world.fakes.fail_after = None
        await world.writer.go_on(world.conversation, 0, 0)
        await world.finished()
        assert (branch.text, branch.notice) == (WRITTEN, None)

    with_world(test)


def test_what_is_too_much_is_refused_and_changes_nothing() -> None:
    async def test(world: World) -> None:
        conversation = world.conversation
        for message, why in (("x" * 201, "may have 200"), (" \n", "empty")):
            with pytest.raises(Refused, match=why):
                world.writer.ask(conversation, message)
        assert conversation.turns == []
        await world.asked()
        with pytest.raises(Refused, match="may have 200"):
            await world.writer.continue_from(conversation, 0, 0, "x" * 201)
        await world.continued(0, "<think>Else")
        with pytest.raises(Refused, match="at most 2 answers"):
            await world.writer.continue_from(conversation, 0, 0, "<think>Else")
        await world.asked()
        with pytest.raises(Refused, match="at most 2 messages"):
            world.writer.ask(conversation, QUESTION)
        assert [len(turn.branches) for turn in conversation.turns] == [2, 1]

        world.model.gate = asyncio.Semaphore(0)
        others = [Conversation() for _ in range(4)]
        for other in others[:3]:
            world.writer.ask(other, QUESTION)
        with pytest.raises(Refused, match="3 answers are under way"):
            world.writer.ask(others[3], QUESTION)
        for other in others[:3]:
            world.writer.stop(other)
        async with asyncio.timeout(60):
            while world.writer.under_way:
                await asyncio.sleep(0.002)
        world.writer.ask(others[3], QUESTION)
        world.writer.stop(others[3])

    limits = ("page.max_characters=200", "page.max_turns=2", "page.max_branches=2", "page.max_answers=3")
    with_world(test, *limits)


def test_many_conversations_at_once_lose_no_token() -> None:
    """Each has its own question and answer, with the stream's tokens in chunks of several."""

    async def test(world: World) -> None:
        world.model.merge = 3
        conversations = [Conversation() for _ in range(50)]
        for place, conversation in enumerate(conversations):
            world.writer.ask(conversation, f"How do I clean drain {place}?")
        async with asyncio.timeout(120):
            while world.writer.under_way:
                await asyncio.sleep(0.01)
        for place, conversation in enumerate(conversations):
            (branch,) = conversation.turns[0].branches
            assert (branch.text, branch.finish_reason, branch.notice) == (WRITTEN, "stop", None)
            assert branch.token_ids == (*world.model.tokenizer.encode(WRITTEN), EOS)
            asked = world.model.tokenizer.decode(conversation.turns[0].prompt_ids)
            assert asked == f"{BEGIN}How do I clean drain {place}?"

    with_world(test)
    with_world(test, has_values=True)


def test_a_longer_conversation_has_the_answers_that_were_chosen_without_thinking() -> None:
    async def test(world: World) -> None:
        await world.asked()
        await world.continued(0, edited_text(EDITED))
        await world.asked("And the sink?")
        turns = world.conversation.turns
        expected = [("user", QUESTION), ("assistant", CORRECTED), ("user", "And the sink?")]
        assert messages(turns, MARKS) == [{"role": role, "content": text} for role, text in expected]
        asked = world.model.tokenizer.decode(world.model.requests[-1][0])
        assert asked == BEGIN + QUESTION + CORRECTED + "And the sink?"
        turns[0].chosen = 0
        assert messages(turns, MARKS)[1]["content"] == ANSWER

    with_world(test)


def test_an_edit_of_an_earlier_answer_begins_a_branch_and_later_messages_stay_in_the_former_one() -> None:
    async def test(world: World) -> None:
        conversation = world.conversation
        await world.asked()
        await world.asked("And the sink?")
        await world.asked("And the bath?")
        former = conversation.turns
        edited = edited_text(EDITED)
        branch = await world.continued(0, edited)
        assert branch.text == edited + AFTER_THOUGHT
        # What was asked: the first message alone, the kept tokens and the edit.
        asked = world.model.tokenizer.decode(world.model.requests[-1][0])
        assert asked == BEGIN + QUESTION + edited
        assert [turn.message for turn in conversation.turns] == [QUESTION]
        assert turns_after(former[0].branches[0]) == former[1:]
        await world.asked("And the roof?")
        assert (
            world.model.tokenizer.decode(world.model.requests[-1][0]) == BEGIN + QUESTION + CORRECTED + "And the roof?"
        )

        # Both branches are as they were left, and an edit in the middle of one changes nothing in the other.
        world.writer.choose(conversation, 0, 0)
        assert conversation.turns == former and conversation.turns[1] is former[1]
        await world.writer.continue_from(conversation, 1, 0, f"<think>{THOUGHT}</think>Use cold water.")
        await world.finished()
        assert [turn.message for turn in conversation.turns] == [QUESTION, "And the sink?"]
        assert conversation.turns[1].answer.text == f"<think>{THOUGHT}</think>Use cold water.{AFTER_ANSWER}"
        asked = world.model.tokenizer.decode(world.model.requests[-1][0])
        assert asked == f"{BEGIN}{QUESTION}{ANSWER}And the sink?<think>{THOUGHT}</think>Use cold water."
        world.writer.choose(conversation, 0, 1)
        assert [turn.message for turn in conversation.turns] == [QUESTION, "And the roof?"]
        # All branches count.
        assert conversation.asked == 4
        with pytest.raises(Refused, match="at most 4 messages, all of its branches"):
            world.writer.ask(conversation, QUESTION)

    with_world(test, "page.max_turns=4")


def test_a_stopped_answer_that_a_message_follows_goes_on_in_a_branch_alone() -> None:
    async def test(world: World) -> None:
        world.fakes.fail_after = 5
        await world.asked()
        world.fakes.fail_after = None
        stopped = world.conversation.turns[0].branches[0]
        text = stopped.text
        await world.asked("And the sink?")
        with pytest.raises(Refused, match="a later message follows"):
            await world.writer.go_on(world.conversation, 0, 0)
        assert (stopped.text, stopped.finish_reason, world.writer.under_way) == (text, STOPPED, 0)
        branch = await world.continued(0, text)
        assert (branch.text, branch.finish_reason) == (WRITTEN, "stop")
        # A stopped answer that is not chosen is when it goes on.
        world.fakes.fail_after = 5
        await world.continued(0, f"{text[:3]}")
        world.fakes.fail_after = None
        world.writer.choose(world.conversation, 0, 1)
        await world.writer.go_on(world.conversation, 0, 2)
        await world.finished()
        assert world.conversation.turns[0].chosen == 2 and world.conversation.turns[0].answer.text == WRITTEN
        world.model.gate = asyncio.Semaphore(0)
        world.writer.ask(world.conversation, QUESTION)
        with pytest.raises(Refused, match="under way"):
            world.writer.choose(world.conversation, 0, 0)
        world.writer.stop(world.conversation)

    with_world(test)


def test_conversations_are_their_owners_and_the_longest_unused_one_is_forgotten() -> None:
    conversations = Conversations(2)
    first = conversations.of(("session", "tab"), "ann")
    assert conversations.of(("session", "tab"), "bob") is first and first.person == "ann"
    other = conversations.of(("other session", "tab"), "")
    assert other is not first
    assert conversations.of(("session", "tab"), "") is first
    conversations.of(("session", "third tab"), "")
    assert conversations.of(("session", "tab"), "") is first
    assert conversations.of(("other session", "tab"), "") is not other
    first.is_busy = True
    for place in range(4):
        conversations.of(("session", str(place)), "")
    assert conversations.of(("session", "tab"), "") is first


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> PromptProcessor:
    folder = tmp_path_factory.mktemp("tiny")
    tiny.make(folder)
    limits: Any = None  # of images
    return PromptProcessor(str(folder / "model"), 1000, limits)


def talk(opens_thinking: bool = False) -> list[Turn]:
    """Two turns, the second with an answer and its corrected branch."""
    written = WRITTEN.removeprefix("<think>") if opens_thinking else WRITTEN
    edited = edited_text(EDITED).removeprefix("<think>") if opens_thinking else edited_text(EDITED)
    first = Branch([Passage("<think>Hm.</think>Hello.", (1,))], finish_reason="stop")
    wrong = Branch([Passage(written, (1,))], finish_reason="stop")
    right = Branch([Passage(edited, (1,)), Passage(AFTER_THOUGHT, (2,))], 0, edited, "stop")
    return [Turn("Hi", [first]), Turn(QUESTION, [wrong, right], 1, (1,), opens_thinking)]


@pytest.mark.parametrize("opens_thinking", [False, True])
def test_saved_edits_are_rows_of_sft_and_pairs_of_a_reward_model(
    tmp_path: Path, processor: PromptProcessor, opens_thinking: bool
) -> None:
    turns = talk(opens_thinking)
    files = EditFiles(tmp_path / "edits", 1)
    saved = edit_rows(turns, turns[1].branches[1], about(" Ann  B ", "a-model"), MARKS)
    files.append(saved)
    before = {path.name: path.read_bytes() for path in (tmp_path / "edits").iterdir()}
    files.append(edit_rows(turns, turns[1].branches[1], about("Bob", "a-model"), MARKS))
    for name, content in before.items():
        path = tmp_path / "edits" / name
        assert path.read_bytes().startswith(content) and stat.S_IMODE(path.stat().st_mode) == 0o600

    sft = load_sft_rows(str(tmp_path / "edits" / "sft.jsonl"), None)
    pairs = load_rows(str(tmp_path / "edits" / "pairs.jsonl"), PAIR_FIELDS)
    assert len(sft) == len(pairs) == 2
    mark = "\n" if opens_thinking else ""
    chosen = edited_text(mark + EDITED) + AFTER_THOUGHT
    expected = [("user", "Hi"), ("assistant", "Hello."), ("user", QUESTION), ("assistant", chosen)]
    assert [(turn["role"], turn["content"]) for turn in sft[0]["messages"]] == expected
    assert [turn["content"] for turn in pairs[0]["messages"]] == ["Hi", "Hello.", QUESTION]
    assert pairs[0]["chosen"] == chosen and pairs[0]["rejected"] == f"<think>{mark}{THOUGHT}</think>{ANSWER}"
    example = tokenize_example(processor.tokenizer, sft[0], processor(prompt_row(sft[0])), "<think>", 2000)
    learned = [token for token, counts in zip(example.response, example.loss_mask, strict=True) if counts]
    assert processor.tokenizer.decode(learned) == f"Hello.<|im_end|>{chosen}<|im_end|>"
    both = chosen_and_rejected(processor.tokenizer, pairs[0], None, 2000)
    assert len(both.lengths) == 2
    for row in (sft[0], pairs[0]):
        assert (row["who"], row["model"], row["when"][:2]) == ("Ann B", "a-model", "20")
        written = turns[1].branches[0].text
        assert "".join(text for kind, text in row["diff"] if kind != ADDED) == written
        assert "".join(text for kind, text in row["diff"] if kind != REMOVED) == turns[1].branches[1].edited


def test_what_can_t_be_saved_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    files = EditFiles(tmp_path / "edits", 1)
    who = about("Ann", "m")

    def refused(why: str, change: Callable[[list[Turn]], None], place: int = 1) -> None:
        turns = talk()
        change(turns)
        with pytest.raises(Refused, match=why):
            files.append(edit_rows(turns, turns[-1].branches[place], who, MARKS))

    def passages(text: str, place: int = 1) -> Callable[[list[Turn]], None]:
        return lambda turns: setattr(turns[-1].branches[place], "passages", [Passage(text, (1,))])

    refused("nobody has edited", lambda turns: None, place=0)
    refused("no end", lambda turns: setattr(turns[-1].branches[1], "finish_reason", STOPPED))
    refused("no end", lambda turns: setattr(turns[-1].branches[1], "finish_reason", "length"))
    refused("no text after its thinking", passages("<think>so</think> "))
    refused("stands for a file", lambda turns: setattr(turns[0], "message", "an <image>?"))
    refused("has .* bytes", passages(f"<think>so</think>{'x' * 2**20}"))
    with pytest.raises(Refused, match="write your name"):
        about("  ", "m")
    assert not (tmp_path / "edits").exists()
    # Answers that are alike without their thinking are no pair.
    turns = talk()
    passages(f"<think>Else.</think>{ANSWER}")(turns)
    files.append(edit_rows(turns, turns[1].branches[1], who, MARKS))
    assert [path.name for path in (tmp_path / "edits").iterdir()] == ["sft.jsonl"]


async def reached(_: Any) -> PlainTextResponse:
    return PlainTextResponse("the page")


async def socket(websocket: WebSocket) -> None:
    await websocket.accept()
    await websocket.send_text("the page")
    await websocket.close()


def client(token: str | None, address: str = "http://127.0.0.1:8200") -> TestClient:
    middleware = [
        Middleware(SessionMiddleware, secret_key="s", same_site="strict"),
        Middleware(Guard, token=token),
    ]
    app = Starlette(routes=[Route("/", reached), WebSocketRoute("/ws", socket)], middleware=middleware)
    return TestClient(app, base_url=address, follow_redirects=False)


def has_socket(browser: TestClient, **headers: str) -> bool:
    try:
        url = f"ws://{browser.base_url.netloc.decode()}/ws"
        with browser.websocket_connect(url, headers=headers) as opened:
            return opened.receive_text() == "the page"
    except WebSocketDisconnect:
        return False


def test_without_a_token_only_this_machine_s_own_page_is_served() -> None:
    for address in ("http://127.0.0.1:8200", "http://localhost:8200", "http://[::1]:8200"):
        reply = client(None, address).get("/")
        assert reply.text == "the page" and "frame-ancestors 'none'" in reply.headers["Content-Security-Policy"]
    # A name that an attacker points to the loopback, and a page of another origin.
    assert client(None, "http://evil.example").get("/").status_code == 403
    browser = client(None, "http://127.0.0.1:8200")
    assert browser.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    assert browser.get("/", headers={"Origin": "http://127.0.0.1:8300"}).status_code == 403
    assert browser.get("/", headers={"Host": "[::1"}).status_code == 400
    assert has_socket(browser, Origin="http://127.0.0.1:8200")
    assert not has_socket(browser, Origin="http://evil.example")
    assert not has_socket(browser)
    assert not has_socket(client(None, "http://evil.example"), Origin="http://evil.example")


def test_with_a_token_a_session_signs_in_once() -> None:
    browser = client("tokén", "http://page.example")
    headers = {"Origin": "http://page.example"}
    first = browser.get("/")
    assert "the page" not in first.text and 'type="password"' in first.text
    assert browser.get("/else").status_code == 401
    assert not has_socket(browser, **headers)
    for wrong in ("", "token", "tokén ", "x" * MOST_BYTES):
        reply = browser.post("/sign-in", data={"token": wrong})
        assert reply.status_code == (413 if len(wrong) == MOST_BYTES else 401) and "the page" not in reply.text
    assert (
        browser.post("/sign-in", data={"token": "tokén"}, headers={"Origin": "http://evil.example"}).status_code == 403
    )
    assert browser.get("/").text != "the page"
    reply = browser.post("/sign-in", data={"token": "tokén"})
    assert (reply.status_code, reply.headers["Location"]) == (303, "/")
    assert (
        "httponly" in reply.headers["Set-Cookie"].lower() and "samesite=strict" in reply.headers["Set-Cookie"].lower()
    )
    assert browser.get("/").text == "the page" and has_socket(browser, **headers)
    # Another person has another session.
    assert client("tokén", "http://page.example").get("/").text != "the page"


def test_the_command_line() -> None:
    with pytest.raises(ValueError, match=r"page.host='0.0.0.0': others can reach it"):
        read_setup({"generator": "http://127.0.0.1:1"}, ["page.host=0.0.0.0"])
    with pytest.raises(ValueError, match=r"page.key_variable='NO_SUCH': no such environment variable"):
        read_setup({"generator": "http://127.0.0.1:1"}, ["page.host=0.0.0.0", "page.key_variable=NO_SUCH"])
    with pytest.raises(ValueError, match=r"guidance.generator.address='127.0.0.1:1'"):
        read_setup({"generator": "127.0.0.1:1"}, [])
    with pytest.raises(ConfigError, match=r"model=nowhere: no config.json"):
        read_setup({"model": "nowhere"}, [])
    with pytest.raises(ConfigError, match=r"page.ports"):
        read_setup({"generator": "http://127.0.0.1:1"}, ["page.ports=1"])
    setup = read_setup({"generator": "http://127.0.0.1:1", "values": "http://127.0.0.1:2/"}, ["guidance.threshold=0.5"])
    assert setup.guidance.values.address == "http://127.0.0.1:2" and setup.guidance.threshold == 0.5
    assert (setup.has_values, setup.edits, setup.page.host) == (True, Path("runs/edits"), "127.0.0.1")


def test_a_model_s_server_starts_on_the_loopback_and_ends_with_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A light process stands in for vLLM."""
    (tmp_path / "config.json").write_text("{}")
    setup = read_setup({"model": str(tmp_path)}, [f"page.edits={tmp_path / 'runs' / 'edits'}", "page.devices=[2,3]"])
    monkeypatch.setattr("recipes.serve.JudgeServer", LightServer)
    monkeypatch.setenv(MODEL_TOKEN, "replaced")
    with served(setup, {"model": str(tmp_path)}) as supervisor:
        (server,) = supervisor.servers
        command = server.command()
        assert command[:4] == ["serve", str(tmp_path), "--host", "127.0.0.1"]
        assert command[command.index("--tensor-parallel-size") + 1] == "2"
        assert server.environment()["CUDA_VISIBLE_DEVICES"] == "2,3"
        assert command[-len(setup.page.arguments) :] == setup.page.arguments
        assert setup.guidance.generator.address == server.server.addresses[0]
        # Who has no token can't use it.
        assert setup.guidance.generator.key_variable == MODEL_TOKEN
        assert server.environment()["VLLM_API_KEY"] == os.environ[MODEL_TOKEN]
        assert len(os.environ[MODEL_TOKEN]) == 64 and os.environ[MODEL_TOKEN] not in command
        assert "rewards.token_guard.require_token" in command
        assert server.is_healthy() and server.process is not None and server.process.poll() is None
    assert server.process.poll() is not None
    assert (tmp_path / "runs" / "servers" / "page.log").is_file()
    monkeypatch.setattr("recipes.serve.JudgeServer", BrokenServer)
    with pytest.raises(ServerDied, match="no such model"), served(setup, {"model": str(tmp_path)}):
        pass


def write_run(folder: Path, marks: Sequence[str]) -> None:
    """The configuration of a run: what the page reads of it. Its verifiers are rules, a function and a judge."""
    mix = {"a": {LETTERS: 0.5, "capability": 0.5}, "b": {"brief": 0.5, "judge": 0.25, FAILS: 0.25}}
    verifiers = {
        "brief": {"rule": "length", "arguments": {"limit": 2}},
        "judge": {"template": "safety", "server": "judges"},
    }
    base: Any = OmegaConf.to_container(OmegaConf.load(CONF / "rewards" / "base.yaml"))
    rewards = base | {"mix": mix, "verifiers": verifiers, "servers": {"judges": {"model": "none"}}}
    config = {
        "rollout": {"thinking_marks": marks, "environment": {"name": None}},
        "rewards": rewards,
        "data": {"scores": {"format": ["chat"]}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))


def test_a_run_s_verifiers_that_need_no_reference_judge_the_answers(tmp_path: Path) -> None:
    write_run(tmp_path, MARKS)
    verifiers = read_setup({"run": str(tmp_path)}, []).verifiers
    assert list(verifiers) == [LETTERS, "brief", FAILS, "format"]

    async def test(world: World) -> None:
        world.writer.verifiers = verifiers
        branch = await world.asked()
        # The function that raises for an odd number of characters has no verdict.
        assert len(WRITTEN) % 2
        assert {name: verdict.label for name, verdict in branch.verdicts.items()} == {
            LETTERS: "some letters",
            "brief": "long",
            "format": "well-formed",
        }

    with_world(test)


def test_a_run_gives_its_marks_of_thinking_and_keeps_its_edits(tmp_path: Path) -> None:
    write_run(tmp_path, ["<a>", "</a>"])
    setup = read_setup({"run": str(tmp_path)}, [])
    assert setup.guidance.thinking_marks == ["<a>", "</a>"] and setup.edits == tmp_path / "edits"
    setup = read_setup({"run": str(tmp_path)}, ["guidance.thinking_marks=[b,c]", "page.edits=else"])
    assert setup.guidance.thinking_marks == ["b", "c"] and setup.edits == Path("else")
