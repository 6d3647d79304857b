"""An ASGI middleware before all routes and sockets of the page that decides who may use it.

Without a token, only programs of this machine reach the page. Other pages in a browser must not reach it. A request
therefore has to name the loopback as its host (DNS rebinding), and a socket has to come from the page itself. With a
token, a person signs in once. The session's cookie is signed, is not shown to scripts, and is not sent from other
sites.
"""

import secrets
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recipes.report import markup
from rollout.guidance.settings import is_loopback

SIGN_IN = "/sign-in"
ICON = "/favicon.ico"  # a browser asks for it beside the form
SIGNED_IN = "signed_in"
# Largest body of the form with the token.
MOST_BYTES = 4096
# NiceGUI compiles templates and runs scripts in the page. Nothing is loaded from or sent to another host.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
FORM = f"""<form method="post" action="{SIGN_IN}" class="card"><h1>Sign in</h1>
<p><label>Token
<input class="text" type="password" name="token" autocomplete="current-password" autofocus required></label>
<button class="text">Sign in</button></p><p role="alert">{{message}}</p></form>"""


class Guard:
    """The middleware. ``token``: the users' token. If it is None, the host of a request must be the loopback."""

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app = app
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = await self.refusal(scope, receive)
        if answer is None:
            await self.app(scope, receive, with_policy(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await answer(scope, receive, with_policy(send))

    async def refusal(self, scope: Scope, receive: Receive) -> Response | None:
        """The response to a request that may not reach the page, or None for a request that may."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        origin = headers.get("origin")
        try:
            is_local = is_loopback(host)
            is_foreign = scope["type"] == "websocket" if origin is None else urlsplit(origin).netloc != host
        except ValueError as error:
            return PlainTextResponse(str(error), 400)
        if self.token is None and not is_local:
            return PlainTextResponse("this page is for http://127.0.0.1 alone", 403)
        if is_foreign:
            return PlainTextResponse("the request comes from another page", 403)
        if self.token is None or scope["session"].get(SIGNED_IN):
            return None
        if scope["type"] == "http" and scope["path"] == SIGN_IN and scope["method"] == "POST":
            return await self.sign_in(Request(scope, receive), self.token)
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in ("/", SIGN_IN):
            return sign_in_page("", 200)
        if scope["path"] == ICON:
            return Response(status_code=204)
        return PlainTextResponse("sign in first", 401)

    async def sign_in(self, request: Request, token: str) -> Response:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MOST_BYTES:
                return sign_in_page("This is too long.", 413)
        given = parse_qs(body.decode(errors="replace")).get("token", [""])[0]
        if not secrets.compare_digest(given.encode(errors="replace"), token.encode(errors="replace")):
            return sign_in_page("This is not the token.", 401)
        request.session[SIGNED_IN] = True
        return RedirectResponse("/", 303)


def sign_in_page(message: str, status: int) -> HTMLResponse:
    return HTMLResponse(markup.page("Sign in", [FORM.format(message=message)]), status, {"Cache-Control": "no-store"})


def with_policy(send: Send) -> Send:
    """Add the headers that tell a browser what the page may load and who may frame it."""

    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "same-origin"
        await send(message)

    return send_with
