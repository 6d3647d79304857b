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
from recipes.page.conversation import STOPPED, Branch, Conversation, Refused, messages
from recipes.page.documents import Library
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
    press_button,
    served_page,
    wait_for_text,
)
from tests.rewards.fake_server import free_port
from tests.rollout.fake_guidance import FakeServers, FakeValues
from tests.rollout.fake_searcher import CORPUS, HF_TOKENIZER, HOSTILE, QUESTION, SURE, WITHOUT_SEARCH, FakeSearcher


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model's tokenizer, and a corpus."""
    folder = tmp_path_factory.mktemp("search_page")
    HF_TOKENIZER.save_pretrained(folder / "model")
    rows = [json.dumps({"id": document.id, "text": document.text}) for document in CORPUS]
    (folder / "corpus.jsonl").write_text("\n".join(rows))
    return folder


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
            options = {"generator": generator, "search": str(folder / "corpus.jsonl")}
            setup = read_setup(options, [*overrides, "deliberation.max_tokens=500", "guidance.max_tokens=400"])
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
        # Sorted: which sample follows which script depends on whose request arrives first.
        assert sorted(len(episode.shown) for episode in branch.deliberation.episodes) == [3, 4, 6]
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


OWN_TEXT = "Notes of Ann.\n\nThe capital of Norland is Veska, she says."


def sources_of(branch: Branch) -> list[str]:
    assert branch.deliberation is not None and branch.deliberation.chosen is not None
    return [source.id for source in branch.deliberation.chosen.sources]


def test_own_documents_are_searched_in_their_session_alone_until_they_are_removed(folder: Path) -> None:
    async def test(model: FakeSearcher, setup: Setup, writer: Writer, conversation: Conversation) -> None:
        ann, bob = (Conversation(searches=True, session=name) for name in ("ann", "bob"))
        await writer.library.add("ann", "notes.txt", OWN_TEXT.encode())
        (source,) = sources_of(await asked(writer, ann))
        assert source == "own/notes.txt"
        assert "norland" in sources_of(await asked(writer, bob))
        await writer.library.remove("ann", "notes.txt")
        assert writer.library.by_session == {}
        assert "norland" in sources_of(await asked(writer, ann))

    with_writer(folder, test, FakeSearcher([[SURE[0], SURE[2]]]))


def test_a_session_adds_documents_over_http_and_no_other_session_reads_them(folder: Path) -> None:
    async def test(model: FakeSearcher, setup: Setup, writer: Writer, conversation: Conversation) -> None:
        app = make_app(setup, writer)
        ann, bob = (TestClient(app, base_url="http://127.0.0.1:8200") for _ in range(2))
        for browser_of in (ann, bob):
            # The first request gets the session's cookie. Browsers send it to a host's other ports too.
            browser_of.get("/source", params={"id": "norland"})
            assert list(browser_of.cookies) == [f"session_{setup.page.port}"]
        assert ann.post("/documents", params={"name": "notes.txt"}, content=OWN_TEXT.encode()).status_code == 204
        reply = ann.get("/source", params={"id": "own/notes.txt"})
        assert (reply.status_code, reply.text) == (200, OWN_TEXT)
        assert bob.get("/source", params={"id": "own/notes.txt"}).status_code == 404
        longer = b"x" * (setup.page.max_document_kib * 1024 + 1)
        assert ann.post("/documents", params={"name": "long"}, content=longer).status_code == 413
        reply = ann.post("/documents", params={"name": "b.txt"}, content=b"%PDF-1.7 \0")
        assert reply.status_code == 400 and "U+0000" in reply.text
        foreign = {"Origin": "http://evil.example"}
        assert ann.post("/documents", params={"name": "c"}, content=b"text", headers=foreign).status_code == 403
        (names,) = (writer.library.names(session) for session in writer.library.by_session)
        assert names == ["notes.txt"]

    with_writer(folder, test)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\xff\xd8\xff\xe0 JFIF", "not a text in UTF-8 .* at byte 0"),
        (b"\x7fELF", "control character U\\+007F"),
        (b" \n", "no text in it"),
        (b"x" * 1025, "more than 1 KiB"),
        (b"a - of", "no document has a word"),
    ],
)
def test_what_is_no_text_is_refused_by_its_content(content: bytes, why: str) -> None:
    page = setup_of("http://127.0.0.1:1", None, "page.max_document_kib=1").page
    library = Library(page)
    with pytest.raises(Refused, match=why):
        asyncio.run(library.add("ann", "notes.txt", content))
    assert library.by_session == {}


def test_own_documents_are_bounded_in_number_and_their_names_are_names() -> None:
    limits = ("page.max_documents=2", "page.max_documents_of_all=3")

    async def run() -> None:
        library = Library(setup_of("http://127.0.0.1:1", None, *limits).page)
        for name in ("a.txt", "../[x]\n"):
            await library.add("ann", name, b"\xef\xbb\xbfsome words")
        assert library.names("ann") == ["a.txt", "..__x__"]
        assert library.by_session["ann"].texts["a.txt"] == "some words"
        for name, why in (("a.txt", "already"), ("b.txt", "you have 2 documents")):
            with pytest.raises(Refused, match=why):
                await library.add("ann", name, b"words")
        await library.add("bob", "a.txt", b"words")
        with pytest.raises(Refused, match="3 documents of all people"):
            await library.add("eve", "a.txt", b"words")
        await library.remove("ann", "a.txt")
        await library.remove("ann", "a.txt")
        await library.remove("eve", "a.txt")
        assert (library.names("ann"), library.names("bob"), library.names("eve")) == (["..__x__"], ["a.txt"], [])

    asyncio.run(run())


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
        tab.tab_to(f"{FOCUS}.getAttribute('role') == 'checkbox'", most=20, backward=True)
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


def test_own_documents_in_a_browser(tmp_path_factory: pytest.TempPathFactory, page: SearchPage, tmp_path: Path) -> None:
    listed = "[...document.querySelectorAll('.documents li > span')].map(each => each.innerText)"
    (tmp_path / "notes.txt").write_text(f"The capital of Norland is Veska. {HOSTILE}")
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "large.md").write_bytes(b"word " * 2**18)
    page.model.gate = None
    with browser.running(tmp_path_factory.mktemp("browser")) as chromium:
        tab = open_page(chromium, page, width=390)
        tab.tab_to(f"{FOCUS}.localName == 'summary'", most=20, backward=True)
        assert tab.evaluate(f"{FOCUS}.innerText") == "Own documents (0)"
        tab.press("Enter")
        tab.choose_files(".documents input", [tmp_path / name for name in ("notes.txt", "picture.txt", "large.md")])
        wait_for_text(tab, "large.md: more than 1024 KiB")
        wait_for_text(tab, "picture.txt: not a text in UTF-8")
        tab.wait(f"{listed}.length == 1")
        assert tab.evaluate(listed) == ["notes.txt"] and "Own documents (1)" in tab.text()
        assert tab.evaluate(WIDER) <= 0
        tab.evaluate("document.querySelector('.q-checkbox').click()")
        tab.evaluate("document.querySelector('.message textarea').focus()")
        ask(tab, QUESTION)
        wait_for_text(tab, "of 10: certain")
        links = tab.evaluate("[...document.querySelectorAll('.sources a')].map(a => [a.innerText, a.href])")
        assert links == [["own/notes.txt", f"{page.address}source?id=own%2Fnotes.txt"]]

        # Another tab of this browser has them, another person has not.
        second = open_page(chromium, page)
        wait_for_text(second, "Own documents (1)")
        other = open_page(chromium, page, context=chromium.other_person())
        wait_for_text(other, "Own documents (0)")
        other.go(links[0][1])
        assert "Veska" not in other.text()

        # It is asked before one is removed.
        second.evaluate("document.querySelector('.documents').open = true")
        press_button(second, "Remove")
        second.wait("document.querySelector('.q-dialog')")
        press_button(second, "Keep it")
        second.wait("!document.querySelector('.q-dialog')")
        assert "Own documents (1)" in second.text()
        press_button(second, "Remove")
        second.wait("document.querySelector('.q-dialog')")
        press_button(second, "Remove it")
        wait_for_text(tab, "Own documents (0)")
        tab.go(links[0][1])
        assert "no such document" in tab.text()
