"""A tab of the page without a browser: it opens the page over HTTP, and reads and uses its elements over the socket."""

import ast
import asyncio
import json
import re
from typing import Any
from urllib.parse import urlencode

import aiohttp
import socketio


class SocketTab:
    """The elements of one client, as the server has them; ``elements``: by id, with tag, class, text and children."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.elements: dict[str, dict[str, Any]] = {}
        self.changed = asyncio.Condition()

    async def __aenter__(self) -> "SocketTab":
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True), headers={"Origin": self.address})
        async with self.http.get(f"{self.address}/") as reply:
            query = re.search(r"query: (\{.*\}),\n", await reply.text())
        assert query is not None
        # Written as Python has it. A tab's own handshake follows the connection.
        self.query = ast.literal_eval(query[1]) | {"document_id": "document", "tab_id": "tab", "old_tab_id": ""}
        del self.query["implicit_handshake"]
        self.client_id = self.query["client_id"]
        self.socket = socketio.AsyncClient(http_session=self.http, reconnection_delay=0.1)
        self.socket.on("update", self._update)
        url = f"{self.address}?{urlencode(self.query)}"
        await self.socket.connect(url, socketio_path="/_nicegui_ws/socket.io", transports=["websocket"])
        await self._handshake()
        # The server closes the connection of a tab that answers too late, and the tab connects again.
        self.socket.on("connect", self._handshake)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.socket.disconnect()
        await self.http.close()

    async def _handshake(self) -> None:
        """Tell the server which message is the next. It sends those again that were lost with the connection."""
        assert await self.socket.call("handshake", self.query)

    async def lose_connection(self) -> None:
        await self.socket.eio.ws.close()

    async def _update(self, elements: dict[str, Any]) -> None:
        async with self.changed:
            if elements["_id"] < self.query["next_message_id"]:
                return
            self.query["next_message_id"] = elements["_id"] + 1
            for name, element in elements.items():
                if element is None:
                    self.elements.pop(name, None)
                elif not name.startswith("_"):
                    self.elements[name] = element
            self.changed.notify_all()

    def with_class(self, *classes: str) -> list[tuple[str, dict[str, Any]]]:
        """The elements that have all these classes, with their ids."""
        return [
            (name, element) for name, element in self.elements.items() if set(classes) <= set(element.get("class", []))
        ]

    async def ask(self, message: str) -> None:
        """Press Enter in the field with the message."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.with_class("message"))
        ((name, field),) = self.with_class("message")
        (listener,) = (each["listener_id"] for each in field["events"] if each["type"] == "keydown")
        event = {"id": int(name), "client_id": self.client_id, "listener_id": listener, "args": [json.dumps(message)]}
        await self.socket.emit("event", event)

    async def answer(self) -> str:
        """The text of the only answer, once it has ended."""

        def has_ended() -> bool:
            # An area that is drawn anew is there twice until the message that removes the former one.
            is_drawn = len(self.with_class("text", "answer")) == 1
            return is_drawn and bool(self.with_class("branch")) and not self.with_class("occupied")

        async with self.changed:
            await self.changed.wait_for(has_ended)
        ((_, area),) = self.with_class("text", "answer")
        return "".join(self.elements[str(child)]["text"] for child in area.get("children", []))
