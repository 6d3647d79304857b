"""A tab of the page without a browser: it opens the page over HTTP, and reads and uses its elements over the socket."""

import ast
import asyncio
import contextlib
import html
import json
import re
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import aiohttp
import socketio

# As nicegui.js and socket.io have them.
ACK_SECONDS = 3.0
CONNECT_SECONDS = 20.0
CONNECT_AGAIN_SECONDS = 0.1  # sooner
RELOAD = "window.location.reload()"


class SocketTab:
    """The elements of a tab, kept as NiceGUI's ``nicegui.js`` keeps them: by id, with tag, class, text and children.

    It numbers messages, asks for those that it missed when it connects again, and loads the page again where the server
    has them no more. As there, a message that comes before one with a smaller number ends the wait for that one.
    ``offline``: it does not connect again. ``deaf``: what the server sends is ``lost``.
    ``loads`` of the page and ``connections`` count those so far. ``is_whole``: since the connection was lost the page
    has sent all elements again, the root among them.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.tab_id = str(uuid.uuid4())
        self.elements: dict[str, dict[str, Any]] = {}
        self.changed = asyncio.Condition()
        self.offline = False
        self.deaf = False
        self.lost: list[dict[str, Any]] = []
        self.loads = self.connections = 0

    async def __aenter__(self) -> "SocketTab":
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True), headers={"Origin": self.address})
        await self._load()
        self.acks = asyncio.create_task(self._acknowledge())
        self.connecting = asyncio.create_task(asyncio.sleep(0))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.acks.cancel()
        self.connecting.cancel()
        await self.socket.disconnect()
        await self.http.close()

    async def _load(self) -> None:
        """The page with its first elements, and the connection, by which the server knows tab and next message."""
        self.loads += 1
        async with self.http.get(f"{self.address}/") as reply:
            text = await reply.text()
        elements = re.search(r"parseElements\(String\.raw`(.*?)`\)", text, re.DOTALL)
        query = re.search(r"query: (\{.*\}),\n", text)
        assert elements is not None and query is not None
        self.elements = json.loads(html.unescape(elements[1]))
        self.is_whole = True
        self.query = ast.literal_eval(query[1])  # written as Python has it
        self.query |= {"implicit_handshake": "true", "tab_id": self.tab_id, "old_tab_id": ""}
        self.query["document_id"] = str(uuid.uuid4())
        # Its own way to connect again gives the server one second to answer.
        self.socket = socketio.AsyncClient(http_session=self.http, reconnection=False)
        self.socket.on("*", self._receive)
        self.socket.on("connect", self._connected)
        self.socket.on("disconnect", self._disconnected)
        self.socket.on("connect_error", self._refused)
        await self._connect()

    async def _connect(self) -> None:
        url = f"{self.address}?{urlencode(self.query)}"
        path = "/_nicegui_ws/socket.io"
        await self.socket.connect(url, socketio_path=path, transports=["websocket"], wait_timeout=CONNECT_SECONDS)

    async def _connected(self) -> None:
        self.connections += 1

    async def _disconnected(self, reason: str) -> None:
        self.is_whole = False
        if reason != self.socket.reason.CLIENT_DISCONNECT:
            self.connecting = asyncio.create_task(self._connect_again())

    async def _connect_again(self) -> None:
        is_connected = False
        while not is_connected:
            await asyncio.sleep(CONNECT_AGAIN_SECONDS)
            # ValueError: the former connection has not been closed yet.
            with contextlib.suppress(socketio.exceptions.ConnectionError, ValueError):
                if not self.offline:
                    await self._connect()
                    is_connected = True

    async def _refused(self, reason: Any) -> None:
        """The server does not know the tab any more."""
        if "Implicit handshake failed" in str(reason):
            self.reload = asyncio.create_task(self._reload())

    async def _reload(self) -> None:
        self.connecting.cancel()
        await self.socket.disconnect()
        await self._load()

    async def _acknowledge(self) -> None:
        """The server forgets what has been received."""
        while True:
            await asyncio.sleep(ACK_SECONDS)
            ack = {name: self.query[name] for name in ("client_id", "next_message_id")}
            with contextlib.suppress(socketio.exceptions.BadNamespaceError):  # not connected
                await self.socket.emit("ack", ack)

    async def lose_connection(self) -> None:
        await self.socket.eio.ws.close()

    async def _receive(self, event: str, message: Any) -> None:
        if self.deaf:
            self.lost.append(message)
            return
        number = message.pop("_id", None)
        if number is not None:
            if number < self.query["next_message_id"]:
                return
            self.query["next_message_id"] = number + 1
        if event == "update":
            self.is_whole = self.is_whole or "0" in message
            for name, element in message.items():
                if element is None:
                    self.elements.pop(name, None)
                else:
                    self.elements[name] = element
        elif event == "try_reconnect" or (event == "run_javascript" and RELOAD in message["code"]):
            self.reload = asyncio.create_task(self._reload())
        async with self.changed:
            self.changed.notify_all()

    def drawn(self, name: str = "0") -> Iterator[tuple[str, dict[str, Any]]]:
        """An element and what is in it, in order, with ids. What is in none is not drawn."""
        if name in self.elements:
            element = self.elements[name]
            yield name, element
            for child in element.get("children", []):
                yield from self.drawn(str(child))

    def with_class(self, *classes: str) -> list[tuple[str, dict[str, Any]]]:
        """The elements that have all these classes, with their ids."""
        return [(name, element) for name, element in self.drawn() if set(classes) <= set(element.get("class", []))]

    async def ask(self, message: str) -> None:
        """Press Enter in the field with the message."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.with_class("message"))
        ((name, field),) = self.with_class("message")
        (listener,) = (each["listener_id"] for each in field["events"] if each["type"] == "keydown")
        arguments = [json.dumps(message)]
        event = {"id": int(name), "client_id": self.query["client_id"], "listener_id": listener, "args": arguments}
        await self.socket.emit("event", event)

    async def answer(self) -> str:
        """The text of the only answer, once it has ended."""
        async with self.changed:
            await self.changed.wait_for(self._has_ended)
        return self.text("answer")

    def _has_ended(self) -> bool:
        is_drawn = bool(self.with_class("text", "answer") and self.with_class("branch"))
        return self.is_whole and is_drawn and not self.with_class("occupied")

    def text(self, part: str) -> str:
        """What is shown of the only answer's ``thinking`` or ``answer``."""
        ((name, _),) = self.with_class("text", part)
        return "".join(element.get("text", "") for _, element in self.drawn(name))
