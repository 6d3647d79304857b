"""A Chromium without a window that looks at pages and uses them, over its DevTools protocol on two pipes."""

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import debian

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
INSTALL_SECONDS = 180
WAIT = 120  # seconds for a reply
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
FLAGS += ("--disable-background-networking", "--remote-debugging-pipe")
FLAGS += ("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",)
# Clicks everything, unfolds everything, looks.
LOOK = """(async () => {
  const all = [...document.querySelectorAll('*')];
  for (const each of all) each.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true}));
  for (const each of document.querySelectorAll('details')) each.open = true;
  await new Promise(done => setTimeout(done, 100));
  return {
    title: document.title,
    text: document.body.innerText,
    width: document.documentElement.scrollWidth,
    cut: [...document.querySelectorAll('svg text')].filter(each => each.getBBox().x < 0).map(each => each.textContent),
    elements: [...new Set(all.map(each => each.localName))],
    handlers: all.flatMap(each => [...each.attributes]).filter(each => each.name.startsWith('on')).length,
  };
})()"""


def program() -> tuple[str, str]:
    """The browser's path, installed from Debian's package where there is none; or "" and why there can't be one."""
    if path := next(filter(None, map(shutil.which, PROGRAMS)), ""):
        return path, ""
    if reason := debian.install(["chromium"], INSTALL_SECONDS):
        return "", f"Chromium is {reason}"
    return shutil.which("chromium") or "", "apt-get's chromium has no program of that name"


@dataclass(frozen=True)
class Seen:
    """What a page asked for, said and did: addresses, dialogs' texts, messages of the console; ``LOOK``'s result."""

    requests: list[str]
    dialogs: list[str]
    messages: list[Any]
    look: dict[str, Any]


class Browser:
    """``folder`` holds its profile and log. Ends with :meth:`stop`."""

    def __init__(self, path: str, folder: Path) -> None:
        browser_in, self.to_browser = os.pipe()
        self.from_browser, browser_out = os.pipe()
        # The browser reads from 3 and writes to 4. Both ends get numbers above 9 first, so that neither is in the way.
        moved_in, moved_out = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (browser_in, browser_out))
        command = ["bash", "-c", f'exec "$@" 3<&{moved_in} 4>&{moved_out}', "bash", path, *FLAGS]
        command += [f"--user-data-dir={folder / 'profile'}", "about:blank"]
        with (folder / "browser.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(moved_in, moved_out),
                start_new_session=True,
            )
        for end in (browser_in, browser_out, moved_in, moved_out):
            os.close(end)
        self.count = 0
        self.received = b""
        self.events: list[dict[str, Any]] = []

    def visit(self, page: Path, width: int) -> Seen:
        """Load the page in a window of that width (CSS pixels), and look."""
        tab = self.open(width)
        tab.go(page.as_uri())
        look = tab.evaluate(LOOK)
        tab.close()
        return tab.seen(look)

    def open(self, width: int, context: str | None = None) -> "Tab":
        """A new tab of that width. ``context``: of another person's browser, from :meth:`other_person`."""
        where = {} if context is None else {"browserContextId": context}
        target = self._call("", "Target.createTarget", url="about:blank", **where)["targetId"]
        session = self._call("", "Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(session, f"{domain}.enable")
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": False}
        self._call(session, "Emulation.setDeviceMetricsOverride", **size)
        return Tab(self, target, session)

    def other_person(self) -> str:
        """A context with cookies and storage of its own."""
        return str(self._call("", "Target.createBrowserContext")["browserContextId"])

    def _send(self, session: str, method: str, **parameters: Any) -> int:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        os.write(self.to_browser, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self.count

    def _call(self, session: str, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(session, method, **parameters)
        while (reply := self._next()).get("id") != number:
            self.events.append(reply)
        assert "error" not in reply, (method, reply)
        return reply["result"]

    def _next(self) -> dict[str, Any]:
        """The next message. A dialog, which would keep the page waiting, is closed."""
        while b"\0" not in self.received:
            assert select.select([self.from_browser], [], [], WAIT)[0], f"the browser has not answered for {WAIT} s"
            part = os.read(self.from_browser, 1 << 20)
            assert part, "the browser has ended"
            self.received += part
        text, _, self.received = self.received.partition(b"\0")
        message = json.loads(text)
        if message.get("method") == "Page.javascriptDialogOpening":
            self._send(message["sessionId"], "Page.handleJavaScriptDialog", accept=True)
        return message

    def stop(self) -> None:
        """End the browser with its children, which are in its session."""
        self._send("", "Browser.close")
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)


@contextmanager
def running(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in ``folder``; the test is skipped, and says why, where there can be none."""
    path, reason = program()
    if not path:
        pytest.skip(reason)
    process = Browser(path, folder)
    try:
        yield process
    finally:
        process.stop()


class Tab:
    """A tab of a browser."""

    def __init__(self, browser: Browser, target: str, session: str) -> None:
        self.browser = browser
        self.target = target
        self.session = session

    def go(self, url: str) -> None:
        """Load an address, or the same one again."""
        loaded = len(self._of("Page.loadEventFired"))
        self._call("Page.navigate", url=url)
        while len(self._of("Page.loadEventFired")) == loaded:
            self.browser.events.append(self.browser._next())

    def evaluate(self, script: str) -> Any:
        """The value of an expression; a promise's when it has one."""
        reply = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in reply, (script, reply["exceptionDetails"])
        return reply["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true."""
        deadline = time.monotonic() + WAIT
        while not self.evaluate(f"!!({script})"):
            if time.monotonic() > deadline:
                raise AssertionError(f"{script}: not true after {WAIT} s; the page: {self.text()[-2000:]}")
            time.sleep(0.05)

    def text(self) -> str:
        return str(self.evaluate("document.body.innerText"))

    def type(self, text: str) -> None:
        """Type where the focus is."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, control: bool = False, shift: bool = False) -> None:
        """Press a key where the focus is."""
        code, text = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), " ": (32, " ")}.get(key, (0, ""))
        held = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 2 * control + 8 * shift}
        self._call("Input.dispatchKeyEvent", type="keyDown", **held, **({} if control else {"text": text}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **held)

    def tab_to(self, is_there: str, most: int, backward: bool = False) -> None:
        """Press Tab, ``most`` times at most, until the script ``is_there`` is true."""
        for _ in range(most):
            self.press("Tab", shift=backward)
            if self.evaluate(is_there):
                break

    def choose_files(self, field: str, paths: Sequence[Path]) -> None:
        """Choose files in the field that a CSS selector finds, as in the browser's own dialog."""
        document = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=document, selector=field)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def scheme(self, name: str) -> None:
        """Prefer light or dark."""
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def close(self) -> None:
        self.browser._call("", "Target.closeTarget", targetId=self.target)

    def seen(self, look: dict[str, Any]) -> Seen:
        """What the tab has done, with the ``look`` at it."""
        messages = self._of("Runtime.consoleAPICalled") + self._of("Runtime.exceptionThrown")
        return Seen(
            [each["request"]["url"] for each in self._of("Network.requestWillBeSent")],
            [each["message"] for each in self._of("Page.javascriptDialogOpening")],
            messages + self._of("Log.entryAdded"),
            look,
        )

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser._call(self.session, method, **parameters)

    def _of(self, method: str) -> list[dict[str, Any]]:
        return [
            event["params"]
            for event in self.browser.events
            if event.get("method") == method and event.get("sessionId") == self.session
        ]
