"""An OpenAI-compatible server that misbehaves as a test wants, over real sockets: in a thread, or as a process.

``python -m tests.rewards.fake_server PORT`` answers every question after 20 ms, until it is killed.
"""

import asyncio
import json
import secrets
import socket
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from aiohttp import web

from rewards.verifiers.judges import Judge, written_label

MODEL = "judge"
JUDGE = Judge("{question}\n{answer}", {"good": 1.0, "bad": 0.0}, written_label, 16)


def free_port() -> int:
    """A free port below those that the kernel gives out by itself, so that nobody gets it in the meantime."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def choice(text: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def good(text: str = "Label: good") -> web.Response:
    return web.json_response(choice(text))


async def models(request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})


type Behaviour = Callable[[int, web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


class FakeServer:
    """``behave(n, request, body)`` answers the n-th question (from 0); ``bodies`` are the questions so far. ``events``
    are they, "asked", and what vLLM's development endpoints were told, "/sleep" and "/wake_up", in their order."""

    def __init__(self, behave: Behaviour, port: int = 0) -> None:
        self.behave = behave
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.headers_of_checks: list[dict[str, str]] = []
        self.events: list[str] = []
        self.under_way = self.most_under_way = 0
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.port = asyncio.run_coroutine_threadsafe(self._start(port), self.loop).result()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def _start(self, port: int) -> int:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", models)
        app.router.add_get("/is_sleeping", self._is_sleeping)
        app.router.add_post("/sleep", self._turn)
        app.router.add_post("/wake_up", self._turn)
        app.router.add_post("/{path:.*}", self._answer)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", port).start()
        return self.runner.addresses[0][1]

    async def _stop(self) -> None:
        await self.runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        self.headers_of_checks.append(dict(request.headers))
        return await models(request)

    async def _turn(self, request: web.Request) -> web.StreamResponse:
        self.headers.append(dict(request.headers))
        self.events.append(request.path)
        return web.json_response({"status": request.query_string})

    async def _is_sleeping(self, request: web.Request) -> web.StreamResponse:
        turns = [event for event in self.events if event != "asked"]
        return web.json_response({"is_sleeping": turns[-1:] == ["/sleep"]})

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        number = len(self.bodies)
        self.bodies.append(body)
        self.events.append("asked")
        self.headers.append(dict(request.headers))
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self.behave(number, request, body)
        finally:
            self.under_way -= 1


async def prompt_answer(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    return good()


async def slow_answer(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    await asyncio.sleep(0.02)
    return good()


async def never(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    await asyncio.sleep(3600)
    return good()


async def truncated(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    return web.Response(text=json.dumps(choice("Label: good"))[:40], content_type="application/json")


async def cut_off(number: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """Half of what the header promises, then the connection is closed."""
    response = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    assert request.transport is not None
    request.transport.abort()
    return response


def status(code: int, text: str = "sorry", **headers: str) -> Behaviour:
    async def behave(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(status=code, text=text, headers=headers)

    return behave


def says(text: str) -> Behaviour:
    async def behave(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
        return good(text)

    return behave


async def by_the_answer(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
    """A verdict that depends on what is judged alone."""
    return good(f"Label: {'good' if len(json.dumps(body['messages'])) % 2 else 'bad'}")


def replies(value: Any) -> Behaviour:
    async def behave(number: int, request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.json_response(value)

    return behave


def first(count: int, bad: Behaviour) -> Behaviour:
    """``bad`` for the first questions, then good."""

    async def behave(number: int, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await (bad if number < count else prompt_answer)(number, request, body)

    return behave


if __name__ == "__main__":
    with FakeServer(slow_answer, int(sys.argv[1])):
        threading.Event().wait()
