"""Deliberate search on the page for people, without a browser and in one. Its model is a fake."""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from fastapi.testclient import TestClient

from recipes.page.app import make_app
from recipes.page.conversation import STOPPED, Branch, Conversation, messages
from recipes.page.settings import Setup
from recipes.page.writing import Writer, open_writer
from recipes.serve import read_setup
from rollout.environment import Unavailable
from rollout.search import Search
from tests.recipes import browser
from tests.recipes.test_serve_page import MARKS, setup_of, write_run
from tests.recipes.test_serve_page_browser import (
    FOCUS,
    WIDER,
    FakesInAThread,
    Page,
    ask,
    open_page,
    served_page,
    wait_for_text,
)
from tests.rewards.fake_server import free_port
from tests.rollout.fake_guidance import FakeServers, FakeValues
from tests.rollout.fake_searcher import CORPUS, HF_TOKENIZER, HOSTILE, QUESTION, SURE, WITHOUT_SEARCH, FakeSearcher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model's tokenizer, and a corpus."""
    made = tmp_path_factory.mktemp("search_page")
    HF_TOKENIZER.save_pretrained(made / "model")
    rows = [json.dumps({"id": document.id, "text": document.text}) for document in CORPUS]
    (made / "corpus.jsonl").write_text("\n".join(rows))
    return made


def with_writer(
    folder: Path,
    test: Callable[[FakeSearcher, Setup, Writer, Conversation], Awaitable[None]],
    model: FakeSearcher | None = None,
) -> None:
    fake = model or FakeSearcher()

    async def run() -> None:
        fakes = FakeServers(fake, FakeValues(fake, lambda text: ()), str(folder / "model"))
        async with asyncio.timeout(300), fakes.running() as (generator, _):
            overrides = ["rollout.environment.settings.results=2", "deliberation.samples=3"]
            own = {"generator": generator, "search": str(folder / "corpus.jsonl")}
            setup = read_setup(own, [*overrides, "deliberation.max_tokens=500", "guidance.max_tokens=400"])
            async with open_writer(setup) as writer:
                await test(fake, setup, writer, Conversation(searches=True))

    asyncio.run(run())


async def asked(writer: Writer, conversation: Conversation) -> Branch:
    writer.ask(conversation, QUESTION)
    while conversation.is_busy:
        await asyncio.sleep(0.005)
    return conversation.turns[-1].branches[0]


def test_a_message_is_answered_by_search_and_the_conversation_goes_on_with_the_answer(folder: Path) -> None:
    async def test(model: FakeSearcher, setup: Setup, writer: Writer, conversation: Conversation) -> None:
        branch = await asked(writer, conversation)
        assert (branch.text, branch.finish_reason, branch.notice) == ("Veska", "stop", None)
        assert branch.deliberation is not None and branch.verdicts == {}
        assert [len(episode.shown) for episode in branch.deliberation.episodes] == [6, 4, 3]
        conversation.searches = False
        plain = await asked(writer, conversation)
        assert (plain.text, plain.deliberation) == (WITHOUT_SEARCH, None)
        assert [each["content"] for each in messages(conversation.turns, MARKS)] == [QUESTION, "Veska", QUESTION]

        # A document's text is there for who may see the page, as text.
        client = TestClient(make_app(setup, writer), base_url="http://127.0.0.1:8200")
        reply = client.get("/source", params={"id": "norland"})
        assert (reply.status_code, reply.text) == (200, CORPUS[0].text)
        assert reply.headers["content-type"].startswith("text/plain")
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert client.get("/source", params={"id": "../../etc/passwd"}).status_code == 404
        assert client.get("/source?id=norland", headers={"host": "evil.example"}).status_code >= 400

    with_writer(folder, test)


def test_a_search_is_stopped_and_a_failing_one_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(model: FakeSearcher, setup: Setup, writer: Writer, conversation: Conversation) -> None:
        model.gate = asyncio.Semaphore(30)
        writer.ask(conversation, QUESTION)
        while model.gate._value:
            await asyncio.sleep(0.005)
        writer.stop(conversation)
        while conversation.is_busy:
            await asyncio.sleep(0.005)
        (branch,) = conversation.turns[0].branches
        assert (branch.text, branch.finish_reason) == ("", STOPPED) and writer.under_way == 0
        model.gate = None

        def fails(*_: object) -> str:
            raise Unavailable("the search engine is gone")

        monkeypatch.setattr(Search, "reply", fails)
        failed = await asked(writer, conversation)
        assert (failed.text, failed.notice) == ("", "the search engine is gone")

    with_writer(folder, test, FakeSearcher([SURE]))


def test_where_a_page_has_deliberate_search(tmp_path: Path) -> None:
    assert setup_of("http://127.0.0.1:1", None).deliberation is None
    write_run(tmp_path, MARKS)
    run = {"run": str(tmp_path)}
    assert read_setup(run, []).environment is None
    config = tmp_path / "config.yaml"
    of_run = {"corpus": "of/the/run.jsonl", "endpoint": None, "results": 7, "snippet_words": 9}
    stored = yaml.safe_load(config.read_text())
    stored["rollout"]["environment"] = {"name": "search", "max_turns": 5, "settings": of_run}
    config.write_text(yaml.safe_dump(stored))
    environment = read_setup(run, []).environment
    assert environment is not None and (environment.max_turns, environment.settings) == (5, of_run)
    changed = read_setup(run | {"search": "my/notes"}, ["rollout.environment.settings.snippet_words=40"]).environment
    assert changed is not None and changed.max_turns == 5
    assert changed.settings == of_run | {"corpus": "my/notes", "snippet_words": 40}


@dataclass
class SearchPage(Page):
    model: FakeSearcher
    loop: asyncio.AbstractEventLoop


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[SearchPage]:
    model = FakeSearcher()
    fakes = FakesInAThread(model, str(folder / "model"))
    port = free_port()
    command = [sys.executable, "-m", "recipes.serve", f"generator={fakes.addresses[0]}", f"page.port={port}"]
    command += [f"search={folder / 'corpus.jsonl'}", "rollout.environment.settings.results=2"]
    command += ["deliberation.samples=3", "deliberation.max_tokens=500", f"page.edits={folder / 'edits'}"]
    address = f"http://127.0.0.1:{port}/"
    try:
        with served_page(command, address, folder / "page.log"):
            yield SearchPage(address, folder / "edits", model, fakes.loop)
    finally:
        fakes.stop()


def test_steps_sources_and_confidence_in_a_browser(tmp_path_factory: pytest.TempPathFactory, page: SearchPage) -> None:
    with browser.running(tmp_path_factory.mktemp("browser")) as chromium:
        tab = open_page(chromium, page, width=390)
        for _ in range(20):
            tab.press("Tab", shift=True)
            if tab.evaluate(f"{FOCUS}.getAttribute('role') == 'checkbox'"):
                break
        assert tab.evaluate(f"{FOCUS}.innerText") == "Deliberate search"
        tab.press(" ")
        tab.evaluate("document.querySelector('.message textarea').focus()")
        # The first steps are shown while the model still writes.
        first = len(HF_TOKENIZER.encode(SURE[0]))
        page.model.gate = asyncio.Semaphore(3 * first)
        ask(tab, QUESTION)
        wait_for_text(tab, "capital of Norland")
        assert "confidence 9.0" not in tab.text()
        for _ in range(3000):
            page.loop.call_soon_threadsafe(page.model.gate.release)
        wait_for_text(tab, "confidence 9.0 of 10: certain")
        text = tab.text()
        assert "weighted by confidence: Veska (75% of the votes)" in text
        assert "by majority: Tarn (67% of the votes)" in text
        assert tab.evaluate("document.querySelector('.text.answer').innerText") == "Veska"
        steps = tab.evaluate(
            "[...document.querySelectorAll('.sample')].map(s => [...s.querySelectorAll('li b')].map(b => b.innerText))"
        )
        assert ["think", "search", "read", "think", "confidence", "answer"] in steps and len(steps) == 3
        assert HOSTILE in text and "Edit answer" not in text and "Let it go on" not in text
        links = tab.evaluate("[...document.querySelectorAll('.sources a')].map(a => [a.innerText, a.href, a.rel])")
        assert links == [
            ["norland", f"{page.address}source?id=norland", "noopener noreferrer"],
            [CORPUS[1].id, CORPUS[1].id, "noopener noreferrer"],
        ]
        assert tab.evaluate(WIDER) <= 0
        # A page that is loaded again shows the same, and what a model or a document writes does nothing.
        tab.go(page.address)
        wait_for_text(tab, "confidence 9.0 of 10: certain")
        look = tab.evaluate("({elements: [...document.querySelectorAll('main img, main script')].length})")
        assert look == {"elements": 0}
        tab.go(links[0][1])
        assert HOSTILE in tab.text()
        assert tab.evaluate("document.querySelectorAll('img').length") == 0
