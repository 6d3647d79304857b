"""The page's web application: NiceGUI with the guard before it, and a watch over the vLLM that was started for it."""

import asyncio
import secrets
import uuid
import warnings
from functools import partial

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse, Response
from nicegui import Client, ui
from starlette.middleware.sessions import SessionMiddleware

from recipes.page.conversation import Refused
from recipes.page.documents import OwnRetriever
from recipes.page.guard import Guard
from recipes.page.saving import EditFiles
from recipes.page.searching import DOCUMENTS, SOURCE
from recipes.page.settings import Setup
from recipes.page.view import STYLE, View
from recipes.page.writing import Conversations, Writer, open_writer
from rewards.serve import ServerDied, Supervisor
from rollout.environment import Unavailable

WATCH_SECONDS = 1.0
SHUTDOWN_SECONDS = 3
# Interval at which ``send_again`` checks whether messages have been sent.
SENT_SECONDS = 0.1

# NiceGUI asks each tab for a sign of life every four fifths of this time, and waits two fifths for it. A busy machine
# or a sleeping phone takes longer than its default of 3 s allows.
RECONNECT_SECONDS = 60.0


def serve_page(setup: Setup, supervisor: Supervisor) -> None:
    """Serve the page in this process until a signal. ``supervisor`` has the vLLM that was started for it, if any.

    Raises ServerDied when this vLLM ends. Raises ValueError, GeneratorFailed and ValuesUnavailable when a server is not
    as it must be.
    """
    # NiceGUI looks at all objects of the process for its server, and an old one of torch's warns when it is looked at.
    warnings.filterwarnings("ignore", "`torch.distributed.reduce_op` is deprecated", FutureWarning)
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


def session_of(request: Request) -> str:
    """The id of a browser's session, under the key that NiceGUI uses too."""
    return str(request.session.setdefault("id", str(uuid.uuid4())))


async def send_again(client: Client) -> None:
    """Send all elements as they are now to a tab that has connected again.

    NiceGUI sends the tab the messages that it missed, but after newer states of the same elements, which waited for the
    connection. It also leaves out the message that it was sending when the tab connected (``nicegui.outbox``).
    """
    while client.outbox.messages:  # what the tab missed
        if not client.has_socket_connection:
            return  # the next connection calls again
        await asyncio.sleep(SENT_SECONDS)
    for element in client.elements.values():
        element.update()


def make_app(setup: Setup, writer: Writer) -> FastAPI:
    """The application. NiceGUI has one per process."""
    conversations = Conversations(setup.page.max_conversations)
    edits = EditFiles(setup.edits, setup.page.max_saved_mib)

    @ui.page("/")
    async def talk(request: Request) -> None:
        client = ui.context.client
        ui.add_head_html(f"<style>{STYLE}</style>")
        await client.connected()
        if client.is_deleted:
            return  # fetched by a program that opened no connection within a minute
        client.on_connect(partial(send_again, client))
        # A tab keeps its conversation when it is loaded again. Another browser's tab never has the same key.
        owner = (session_of(request), str(client.tab_id))
        View(writer, conversations.of(owner, setup.person), edits).build()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get(SOURCE)
    def source(request: Request, id: str) -> PlainTextResponse:
        """A document of deliberate search, from the session's own or from the corpus. It is served as plain text."""
        try:
            text = OwnRetriever(writer.library, session_of(request)).read(id)
            if text is None and writer.deliberator is not None:
                text = writer.deliberator.search.retriever.read(id)
        except Unavailable as error:
            raise HTTPException(503, str(error)) from error
        if text is None:
            raise HTTPException(404, "no such document")
        return PlainTextResponse(text, headers={"X-Content-Type-Options": "nosniff"})

    @app.post(DOCUMENTS)
    async def add(request: Request, name: str) -> Response:
        """Add a document to the session's own. If it is refused, the response is 400 or 413 with the reason."""
        if writer.deliberator is None:
            raise HTTPException(404, "this page has no deliberate search")
        content = b""
        async for part in request.stream():
            content += part
            if len(content) > setup.page.max_document_kib * 1024:
                return PlainTextResponse(f"more than {setup.page.max_document_kib} KiB", 413)
        try:
            await writer.library.add(session_of(request), name, content)
        except Refused as error:
            return PlainTextResponse(str(error), 400)
        return Response(status_code=204)

    app.add_middleware(Guard, token=setup.token)
    # Sessions end with this process. Browsers send a host's cookies to all of its ports, so the name has the port:
    # otherwise two pages would overwrite each other's session.
    app.add_middleware(
        SessionMiddleware,
        secret_key=secrets.token_hex(32),
        session_cookie=f"session_{setup.page.port}",
        same_site="strict",
        max_age=None,
    )
    ui.run_with(
        app,
        title="SafeWork",
        language="en-US",
        dark=None,
        tailwind=False,
        show_welcome_message=False,
        reconnect_timeout=RECONNECT_SECONDS,
    )
    return app
