"""The page for people in a real browser, as `python -m recipes.serve` serves it. Behind it are a fake model and fake
values."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipes import browser
from tests.recipes.fake_thinker import AFTER_ANSWER, ANSWER, CORRECTED, HOSTILE, QUESTION, THOUGHT, FakeThinker, values
from tests.recipes.test_serve_page import LETTERS, write_run
from tests.rewards.fake_server import free_port
from tests.rollout.fake_guidance import FakeModel, FakeServers, FakeValues

TOKEN = "a token of the test"
EDIT = " But I mind <b>that</b>"
START_SECONDS = 120
FOCUS = "document.activeElement"
MESSAGE_BOX = "document.querySelector('.message textarea')"
WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LEAST_CONTRAST = 4.5  # of text, by WCAG 2.2's criterion 1.4.3
# The luminance of the page's background, and the contrast of every visible text with what stands behind it.
CONTRASTS = """(() => {
  const context = Object.assign(document.createElement('canvas'), {width: 1, height: 1})
    .getContext('2d', {willReadFrequently: true});
  const drawn = (colours) => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const linear = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map(each => each / 255)
      .map(each => each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const behind = (element) => {
    const colours = [];
    for (let each = element; each; each = each.parentElement) colours.unshift(getComputedStyle(each).backgroundColor);
    return colours;
  };
  const texts = [];
  for (const each of document.querySelectorAll('body *')) {
    const has = each.value || [...each.childNodes].some(node => node.nodeType == 3 && node.data.trim());
    if (!has || !each.checkVisibility({visibilityProperty: true, opacityProperty: true})) continue;
    if (!each.getClientRects().length || ['SCRIPT', 'STYLE'].includes(each.tagName)) continue;
    const style = getComputedStyle(each);
    const lights = [drawn(behind(each)), drawn([...behind(each), style.color])].sort((a, b) => b - a);
    const tag = each.closest('button') ? 'BUTTON' : each.tagName;
    texts.push([tag, (each.value || each.innerText || '').slice(0, 40), (lights[0] + 0.05) / (lights[1] + 0.05)]);
  }
  return {background: drawn(behind(document.body)), texts};
})()"""
EDIT_BOX = "document.querySelector('.edit-box textarea')"


@dataclass
class Page:
    address: str
    edits: Path
    model: FakeModel


class FakesInAThread:
    """The fake servers in a thread with a loop of its own."""

    def __init__(self, model: FakeModel, root: str = "") -> None:
        self.fakes = FakeServers(model, FakeValues(model, values), root)
        self.addresses: tuple[str, str] = ("", "")
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()))
        self.thread.start()
        assert self.ready.wait(30)

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        async with self.fakes.running() as self.addresses:
            self.ready.set()
            await self.ended.wait()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.ended.set)
        self.thread.join()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("page")
    model = FakeThinker()
    fakes = FakesInAThread(model)
    port = free_port()
    generator, values_at = fakes.addresses
    # Of the run the page has the verifiers; its model is the fake one.
    (folder / "run").mkdir()
    write_run(folder / "run", ["<think>", "</think>"])
    command = [sys.executable, "-m", "recipes.serve", f"run={folder / 'run'}", f"generator={generator}"]
    command += [f"values={values_at}"]
    command += ["guidance.values.principles=[safety,value]", "guidance.log=null", f"page.edits={folder / 'edits'}"]
    command += [f"page.port={port}", "page.key_variable=PAGE_TOKEN"]
    address = f"http://127.0.0.1:{port}/"
    try:
        with served_page(command, address, folder / "page.log", PAGE_TOKEN=TOKEN):
            yield Page(address, folder / "edits", model)
        # It said where it is, and nothing went wrong.
        assert (folder / "page.log").read_text() == f"the page: {address.rstrip('/')}\n"
    finally:
        fakes.stop()


@contextmanager
def served_page(command: Sequence[str], address: str, log_file: Path, **variables: str) -> Iterator[None]:
    """The page answers within the block. Afterwards SIGTERM ends it, in order."""
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(address):
            assert process.poll() is None and time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.1)
        yield
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    with browser.running(tmp_path_factory.mktemp("browser")) as process:
        yield process


def open_page(chromium: browser.Browser, page: Page, width: int = 1280, context: str | None = None) -> browser.Tab:
    """A tab with the page, where a person has signed in and can write."""
    tab = chromium.open(width, context)
    tab.go(page.address)
    if "Sign in" in tab.text():
        tab.wait(f"{FOCUS}.type == 'password'")
        tab.type(TOKEN)
        tab.press("Enter")
    tab.wait(f"{MESSAGE_BOX} && {FOCUS} == {MESSAGE_BOX}")
    return tab


def ask(tab: browser.Tab, message: str = QUESTION) -> None:
    tab.type(message)
    tab.press("Enter")


def wait_for_text(tab: browser.Tab, text: str) -> None:
    tab.wait(f"document.body.innerText.includes({json.dumps(text)})")


def press_button(tab: browser.Tab, text: str) -> None:
    """Move the focus to the button by the keyboard alone, and press it."""
    for _ in range(60):
        tab.press("Tab")
        if tab.evaluate(f"{FOCUS}.localName == 'button' && {FOCUS}.innerText.includes({json.dumps(text)})"):
            tab.press("Enter")
            return
    raise AssertionError(f"the keyboard does not reach {text!r}: {tab.text()}")


def test_a_person_edits_a_thought_by_the_keyboard_alone_and_the_model_goes_on(
    chromium: browser.Browser, page: Page
) -> None:
    tab = open_page(chromium, page)
    ask(tab)
    wait_for_text(tab, ANSWER)
    assert THOUGHT in tab.text()
    # Thinking and answer apart, and a value for each sentence, whose number is shown on demand.
    assert tab.evaluate("document.querySelector('.text.thinking').innerText") == THOUGHT
    assert tab.evaluate("document.querySelector('.text.answer').innerText") == ANSWER
    number = "getComputedStyle(document.querySelector('.valued'), '::after').content"
    assert "safety" not in tab.evaluate(number)
    assert tab.evaluate("document.querySelector('.valued').dataset.values") == "safety 0.75 · value 0.50"

    # The run's verifiers stand beside the answer; the one that fails is left out.
    wait_for_text(tab, "format: well-formed")
    chips = tab.evaluate("[...document.querySelectorAll('article .chip')].map(each => each.innerText)")
    labels = [chip.rpartition(" ")[0] for chip in chips]
    assert labels == [f"{LETTERS}: some letters", "brief: long", "format: well-formed"]

    press_button(tab, "Edit thinking")
    tab.wait(f"{EDIT_BOX} && {FOCUS} == {EDIT_BOX}")
    assert tab.evaluate(f"{EDIT_BOX}.value") == THOUGHT
    tab.type(EDIT)
    tab.wait("document.querySelector('.diff ins')")
    assert tab.evaluate("document.querySelector('.diff ins').innerText") == EDIT
    assert ANSWER in tab.evaluate("document.querySelector('.diff del').innerText")
    tab.press("Enter", control=True)
    wait_for_text(tab, CORRECTED)
    tab.wait("!document.querySelector('.edit-box')")
    # The former answer stands beside the new one.
    branches = tab.evaluate("[...document.querySelectorAll('article')].map(each => each.innerText)")
    assert ANSWER in branches[0] and CORRECTED not in branches[0]
    assert THOUGHT + EDIT in branches[1] and CORRECTED in branches[1]
    boxes = tab.evaluate("[...document.querySelectorAll('article')].map(each => each.getBoundingClientRect().left)")
    assert boxes[0] < boxes[1]
    # What the server was asked begins with the tokens that it wrote.
    (first, _), (second, _) = page.model.requests[-2:]
    written = page.model.tokenizer.encode(f"<think>{THOUGHT}")
    assert second[: len(first) + len(written)] == [*first, *written]

    # Nobody has given a name: on a page with a token nothing is known of a person.
    press_button(tab, "Save edit")
    wait_for_text(tab, "write your name")
    for _ in range(60):
        tab.press("Tab")
        if tab.evaluate(f"{FOCUS}.ariaLabel") == "Your name":
            break
    tab.type("Ann")
    press_button(tab, "Save edit")
    wait_for_text(tab, "as a preference pair")
    rows = [json.loads((page.edits / name).read_text()) for name in ("sft.jsonl", "pairs.jsonl")]
    assert [row["who"] for row in rows] == ["Ann", "Ann"]
    assert rows[0]["messages"][-1]["content"] == rows[1]["chosen"]
    assert rows[1]["chosen"].endswith(CORRECTED) and rows[1]["rejected"].endswith(ANSWER)

    # A page that is loaded again shows the same.
    tab.go(page.address)
    wait_for_text(tab, CORRECTED)
    again = tab.evaluate("[...document.querySelectorAll('article')].map(each => each.innerText)")
    assert len(again) == 2 and ANSWER in again[0] and THOUGHT + EDIT in again[1] and "saved" in again[1]
    tab.wait("document.querySelector('.name input').value == 'Ann'")
    ask(tab, "And then?")
    tab.wait("document.querySelectorAll('.said').length == 2 && document.querySelectorAll('article').length == 3")

    # Markup and scripts of the model and of the person were shown and did nothing.
    look = tab.evaluate(browser.LOOK)
    assert HOSTILE in look["text"] and EDIT in look["text"]
    seen = tab.seen(look)
    assert seen.dialogs == [] and look["handlers"] == 0
    assert (
        "img" not in look["elements"] and tab.evaluate("document.querySelectorAll('main script, main b').length") == 0
    )
    assert [url for url in seen.requests if not url.startswith((page.address, "data:"))] == []
    assert [each for each in seen.messages if each.get("entry", {}).get("level") != "verbose"] == []


def test_numbers_and_an_edit_of_the_answer_from_the_cursor(chromium: browser.Browser, page: Page) -> None:
    tab = open_page(chromium, page)
    ask(tab)
    wait_for_text(tab, ANSWER)
    tab.evaluate("document.querySelector('.q-checkbox').click()")
    tab.wait("getComputedStyle(document.querySelector('.valued'), '::after').content.includes('safety')")
    press_button(tab, "Edit answer")
    tab.wait(f"{EDIT_BOX} && {FOCUS} == {EDIT_BOX}")
    place = ANSWER.index(" <b>")
    tab.evaluate(f"{EDIT_BOX}.setSelectionRange({place}, {place})")
    tab.press("Escape")
    tab.wait("!document.querySelector('.edit-box')")
    press_button(tab, "Edit answer")
    tab.wait(f"{EDIT_BOX} && {FOCUS} == {EDIT_BOX}")
    tab.evaluate(f"{EDIT_BOX}.setSelectionRange({place}, {place})")
    tab.type(" Then wait.")
    press_button(tab, "Continue from here")
    wait_for_text(tab, f"{ANSWER[:place]} Then wait.{AFTER_ANSWER}")


def test_an_earlier_answer_is_edited_by_the_keyboard_and_both_branches_keep_their_messages(
    chromium: browser.Browser, page: Page
) -> None:
    tab = open_page(chromium, page)
    said = "[...document.querySelectorAll('.talk > .said')].map(each => each.innerText)"
    for number, message in enumerate(("The first?", "The second?", "The third?"), start=1):
        ask(tab, message)
        tab.wait(f"document.querySelectorAll('article').length == {number}")
        tab.wait("!document.querySelector('main.occupied')")
    tab.evaluate("document.querySelector('.name input').focus()")
    # From the top of the page the first of these buttons is that of the first answer.
    press_button(tab, "Edit thinking")
    tab.wait(f"{EDIT_BOX} && {FOCUS} == {EDIT_BOX}")
    assert tab.evaluate(f"{EDIT_BOX}.closest('.talk').querySelector('.said').innerText") == "The first?"
    assert tab.evaluate(f"{EDIT_BOX}.value") == THOUGHT
    tab.type(EDIT)
    tab.press("Enter", control=True)
    wait_for_text(tab, CORRECTED)
    tab.wait("!document.querySelector('main.occupied')")
    # The former answer stands beside the new one, with the messages that follow it, folded.
    assert tab.evaluate(said) == ["The first?"]
    former, new = tab.evaluate("[...document.querySelectorAll('article')].map(each => each.innerText)")
    assert "2 later messages in this branch" in former
    later = "document.querySelector('article details .said')"
    assert tab.evaluate(f"{later}.textContent") == "The second?" and not tab.evaluate(f"{later}.checkVisibility()")
    assert THOUGHT + EDIT in new and "the conversation goes on from here" in new
    tab.tab_to(f"{FOCUS}.localName == 'summary'", most=60)
    tab.press("Enter")
    tab.wait(f"{later}.checkVisibility()")
    tab.evaluate(f"{MESSAGE_BOX}.focus()")
    ask(tab, "The fourth?")
    tab.wait("document.querySelectorAll('.talk').length == 2")
    tab.wait("!document.querySelector('main.occupied')")
    assert tab.evaluate(said) == ["The first?", "The fourth?"]

    tab.evaluate("document.querySelector('.name input').focus()")
    press_button(tab, "Go on from this answer")
    tab.wait("document.querySelectorAll('.talk').length == 3")
    assert tab.evaluate(said) == ["The first?", "The second?", "The third?"]
    assert "1 later message in this branch" in tab.text()
    tab.go(page.address)
    wait_for_text(tab, "The third?")
    assert tab.evaluate(said) == ["The first?", "The second?", "The third?"]
    assert "1 later message in this branch" in tab.text()


def test_an_answer_is_stopped_and_goes_on(chromium: browser.Browser, page: Page) -> None:
    tab = open_page(chromium, page)
    page.model.gate = asyncio.Semaphore(20)
    ask(tab)
    wait_for_text(tab, THOUGHT.partition(".")[0])
    # Loading the page again does not stop the answer.
    tab.go(page.address)
    wait_for_text(tab, THOUGHT.partition(".")[0])
    tab.wait(f"{MESSAGE_BOX} && {FOCUS} == {MESSAGE_BOX}")
    assert "Let it go on" not in tab.text()
    tab.press("Escape")
    wait_for_text(tab, "stopped")
    page.model.gate = None
    assert ANSWER not in tab.text()
    press_button(tab, "Let it go on")
    wait_for_text(tab, ANSWER)
    assert tab.evaluate("document.querySelectorAll('article').length") == 1


def test_tabs_and_people_have_conversations_of_their_own(chromium: browser.Browser, page: Page) -> None:
    first = open_page(chromium, page)
    ask(first, "What is the first secret?")
    wait_for_text(first, ANSWER)
    second = open_page(chromium, page)
    ask(second, "What is the second secret?")
    other = open_page(chromium, page, context=chromium.other_person())
    ask(other, "What is the other secret?")
    for tab in (second, other):
        wait_for_text(tab, ANSWER)
    for name, tab in {"first": first, "second": second, "other": other}.items():
        said = tab.evaluate("[...document.querySelectorAll('.said')].map(each => each.innerText)")
        assert said == [f"What is the {name} secret?"]
        assert tab.text().count(ANSWER) == 1


def test_a_phone_and_both_colour_schemes(chromium: browser.Browser, page: Page) -> None:
    tab = open_page(chromium, page, width=390)
    ask(tab, f"How do I clean a drain of {'x' * 300}?")
    wait_for_text(tab, ANSWER)
    press_button(tab, "Edit thinking")
    tab.wait(f"{EDIT_BOX} && {FOCUS} == {EDIT_BOX}")
    assert tab.evaluate(WIDER) <= 0
    tab.press("Enter", control=True)
    tab.wait("document.querySelectorAll('article').length == 2")
    assert tab.evaluate(WIDER) <= 0
    tab.wait("!document.querySelector('main.occupied')")
    press_button(tab, "Edit answer")
    tab.wait(f"{EDIT_BOX} && {FOCUS} == {EDIT_BOX}")
    tab.type(" More.")
    tab.wait("document.querySelector('.diff ins')")
    for scheme in ("light", "dark"):
        tab.scheme(scheme)
        tab.wait(f"document.body.classList.contains('body--dark') == {json.dumps(scheme == 'dark')}")
        time.sleep(1)  # colours change within less
        seen = tab.evaluate(CONTRASTS)
        assert (seen["background"] < 0.1) == (scheme == "dark")
        assert len(seen["texts"]) > 20 and {"INS", "TEXTAREA", "BUTTON"} <= {tag for tag, _, _ in seen["texts"]}
        assert [text for text in seen["texts"] if text[2] < LEAST_CONTRAST] == [], scheme
