"""A tab that loses its connection shows the whole answer all the same, at whatever moment it connects again."""

import asyncio
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.recipes.fake_thinker import ANSWER, QUESTION, THOUGHT, WRITTEN, FakeThinker
from tests.recipes.page_client import SocketTab
from tests.recipes.slow_page import HOLD
from tests.recipes.test_serve_page_browser import FakesInAThread, served_page
from tests.rewards.fake_server import free_port
from tests.rollout.fake_guidance import FakeTokenizer

SECONDS = 300  # until an answer is there, on a busy machine
BEGUN = "The user asks"
TOKENS = len(FakeTokenizer().encode(WRITTEN)) + 1  # with the end


class Pen:
    """The fake model writes a token when it may."""

    def __init__(self, fakes: FakesInAThread, model: FakeThinker) -> None:
        self.fakes, self.model = fakes, model
        model.gate = asyncio.Semaphore(0)

    def write(self, count: int) -> None:
        assert self.model.gate is not None
        for _ in range(count):
            self.fakes.loop.call_soon_threadsafe(self.model.gate.release)


@contextmanager
def page(program: str, folder: Path) -> Iterator[tuple[str, Pen]]:
    """The page's address, and what makes its model write."""
    model = FakeThinker()
    fakes = FakesInAThread(model)
    port = free_port()
    command = [sys.executable, "-m", program, f"generator={fakes.addresses[0]}", f"page.port={port}"]
    command += [f"page.edits={folder / 'edits'}"]
    address = f"http://127.0.0.1:{port}/"
    try:
        with served_page(command, address, folder / "page.log", **{HOLD: str(folder / "hold")}):
            yield address, Pen(fakes, model)
    finally:
        fakes.stop()


async def until(happened: Callable[[], bool]) -> None:
    while not happened():
        await asyncio.sleep(0.01)


@asynccontextmanager
async def begun_answer(address: str, pen: Pen) -> AsyncIterator[SocketTab]:
    """A tab that shows the beginning of the thought."""
    async with asyncio.timeout(SECONDS), SocketTab(address) as tab:
        await tab.ask(QUESTION)
        pen.write(len(FakeTokenizer().encode(f"<think>{BEGUN}")))
        await until(lambda: bool(tab.with_class("text", "thinking")) and tab.text("thinking") == BEGUN)
        yield tab


async def shows_all(tab: SocketTab) -> None:
    assert await tab.answer() == ANSWER
    assert tab.text("thinking") == THOUGHT


def test_a_tab_that_missed_messages_shows_an_answer_that_ended_meanwhile(tmp_path: Path) -> None:
    """NiceGUI sends what is new before what was missed, which says that the model is still writing."""

    def says_occupied(message: dict[str, Any]) -> bool:
        return any("occupied" in element.get("class", []) for element in message.values() if isinstance(element, dict))

    async def run(address: str, pen: Pen) -> None:
        async with asyncio.timeout(SECONDS), SocketTab(address) as tab:
            await until(lambda: bool(tab.with_class("message")))
            tab.deaf = tab.offline = True
            await tab.ask(QUESTION)
            await until(lambda: any(map(says_occupied, tab.lost)))
            await tab.lose_connection()
            pen.write(TOKENS)
            await until(lambda: pen.model.sent == TOKENS)
            await asyncio.sleep(1)  # the page looks for what has changed ten times a second
            tab.deaf = tab.offline = False
            await shows_all(tab)

    with page("recipes.serve", tmp_path) as served:
        asyncio.run(run(*served))


@pytest.mark.parametrize("received", [True, False])
def test_a_tab_that_connects_again_while_a_message_is_sent_shows_the_answer(received: bool, tmp_path: Path) -> None:
    """NiceGUI notes a message when it has been sent. Until then it does not send it again, and a tab that has it
    already asks for one that NiceGUI does not know: the tab loads the page again."""

    async def run(address: str, pen: Pen) -> None:
        async with begun_answer(address, pen) as tab:
            number = tab.query["next_message_id"]
            tab.deaf = not received
            (tmp_path / "hold").touch()
            pen.write(TOKENS)
            await until(lambda: bool(tab.lost) or tab.query["next_message_id"] > number)
            await tab.lose_connection()
            tab.deaf = False
            await until(lambda: tab.connections >= 2)
            (tmp_path / "hold").unlink()
            await until(lambda: tab.loads == 1 + received)
            await shows_all(tab)

    with page("tests.recipes.slow_page", tmp_path) as served:
        asyncio.run(run(*served))
