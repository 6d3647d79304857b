"""The page's web application: NiceGUI behind the guard, and the watch over the vLLM that was started for it."""

import asyncio
import secrets

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse
from nicegui import ui
from starlette.middleware.sessions import SessionMiddleware

from recipes.page.guard import Guard
from recipes.page.saving import EditFiles
from recipes.page.searching import SOURCE
from recipes.page.settings import Setup
from recipes.page.view import STYLE, View
from recipes.page.writing import Conversations, Writer, open_writer
from rewards.serve import ServerDied, Supervisor
from rollout.environment import Unavailable

WATCH_SECONDS = 1.0
SHUTDOWN_SECONDS = 3


def serve_page(setup: Setup, supervisor: Supervisor) -> None:
    """Serve the page in this process until a signal. ``supervisor`` has the vLLM that was started for it, if any.

    Raises ServerDied when that ends, ValueError, GeneratorFailed and ValuesUnavailable when a server is not as it must
    be.
    """
    asyncio.run(_serve(setup, supervisor))


async def _serve(setup: Setup, supervisor: Supervisor) -> None:
    page = setup.page
    async with open_writer(setup) as writer:
        app = make_app(setup, writer)
        config = uvicorn.Config(
            app, host=page.host, port=page.port, log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS
        )
        server = uvicorn.Server(config)
        watch = asyncio.create_task(_watch(supervisor, server))
        print(f"the page: http://{page.host}:{page.port}", flush=True)
        await server.serve()
        if watch.done():
            watch.result()
        watch.cancel()


async def _watch(supervisor: Supervisor, server: uvicorn.Server) -> None:
    """End the page when its vLLM ends. Raises ServerDied."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        try:
            supervisor.poll()
        except ServerDied:
            server.should_exit = True
            raise


def make_app(setup: Setup, writer: Writer) -> FastAPI:
    """The application. NiceGUI has one of each process."""
    conversations = Conversations(setup.page.max_conversations)
    edits = EditFiles(setup.edits, setup.page.max_saved_mib)

    @ui.page("/")
    async def talk(request: Request) -> None:
        client = ui.context.client
        ui.add_head_html(f"<style>{STYLE}</style>")
        await client.connected()
        # A tab keeps its conversation when it is loaded again. Another browser's tab never has the same key.
        owner = (str(request.session["id"]), str(client.tab_id))
        View(writer, conversations.of(owner, setup.person), edits).build()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(SOURCE)
    def source(id: str) -> PlainTextResponse:
        """A document of deliberate search, as text whatever it contains."""
        try:
            text = None if writer.deliberator is None else writer.deliberator.search.retriever.read(id)
        except Unavailable as error:
            raise HTTPException(503, str(error)) from error
        if text is None:
            raise HTTPException(404, "no such document")
        return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})

    app.add_middleware(Guard, token=setup.token)
    # Sessions end with this process.
    app.add_middleware(SessionMiddleware, secret_key=secrets.token_hex(32), same_site="strict", max_age=None)
    ui.run_with(app, title="SafeWork", language="en-US", dark=None, tailwind=False, show_welcome_message=False)
    return app
