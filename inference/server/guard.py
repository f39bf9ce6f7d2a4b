"""Checks who calls, and the size of a request, before any of its body is read."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.progress.web.access import Access, Refusal, not_from_here, not_the_key
from inference.progress.web.websocket import POLICY_VIOLATION
from inference.server.answers import EarlyAnswer, Failure
from inference.server.config import MIB, ServerConfig
from inference.server.sessions import COOKIE, Sessions
from inference.server.storage_api import UPLOAD_PREFIX

MAX_JSON_BYTES = 5 * MIB
"""A worker may report a failure with all of its stderr. Where the real server runs, bodies end at 4.5 MB
(vercel.com/docs/functions/limitations)."""

MAX_OPEN_BYTES = 64 * 1024
"""The body of a request that needs no key: the form of the sign-in is the only one that has any."""

FORM_OVERHEAD_BYTES = MIB
"""The size that a form may have beyond its photo."""

OPEN = ("/healthz", "/openapi.json", "/sign-in", "/sign-out", "/favicon.ico", "/docs")
"""Paths that need no key."""

OPEN_BENEATH = ("/storage/", "/docs/", "/page/static/")
"""What lies beneath these needs none either. Addresses under /storage are signed."""

STREAMS = ("/events/", "/ws/")
"""Beneath these, the id of a project is the rest of the path, and a token for it admits."""

SAFE_METHODS = ("GET", "HEAD")
"""What these ask for changes nothing."""


class Guard:
    """Requires the key where one is set; without a key, admits only programs and pages of this machine.

    Instead of the key, a browser may show the cookie of a session, and a listener a token for its project. A browser
    sends cookies whoever makes it ask, so a cookie counts only where no page of another site did.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._access = Access(config.api_key, config.signing_secret)
        self._sessions = Sessions(config.signing_secret, config.api_key) if config.api_key else None
        self._public_host = urlsplit(config.public_url).netloc if config.public_url else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        connection = HTTPConnection(scope)
        refusal = self._refusal(connection)
        if scope["type"] == "websocket":
            if refusal is None:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # becomes a 403
            return
        limit = self._limit(scope["path"])
        if refusal is None and limit is not None and _length(connection.headers) > limit:
            refusal = Refusal(413, f"body: more than {limit} bytes")
        if refusal is not None:
            await self._refuse(refusal, scope, receive, send)
            return
        await self._app(scope, receive if limit is None else _limited(receive, limit), send)

    async def _refuse(self, refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
        status, error = refusal
        extra = {"www-authenticate": "Worker"} if status == 401 else None
        path = scope["path"]
        if status == 401 and scope["method"] in SAFE_METHODS and (path == "/" or path.startswith("/page/")):
            # Relative: the server may be behind a proxy, under a path that it does not know.
            status, extra = 303, {"location": "../" * (path.count("/") - 1) + "sign-in", "cache-control": "no-store"}
        await EarlyAnswer(Failure(error=error).model_dump(), status, extra)(scope, receive, send)

    def _refusal(self, connection: HTTPConnection) -> Refusal | None:
        if self._config.api_key is None or self._sessions is None:
            refusal = not_from_here(connection.headers, "set WORKER_API_KEY")
            return refusal or (_embedded(connection) if not connection.scope["path"].startswith("/storage/") else None)
        is_websocket = connection.scope["type"] == "websocket"
        path = connection.scope["path"]
        if not is_websocket and is_open(path):
            return self._forged(connection) if path.startswith("/sign-") else None
        project_id = next((path.removeprefix(each) for each in STREAMS if path.startswith(each)), None)
        if project_id is None:
            refusal = not_the_key(connection.headers, self._config.api_key)
        else:
            refusal = self._access(connection, project_id)
        if refusal is not None and self._sessions.holds(connection.cookies.get(COOKIE, "")):
            return self._forged(connection)
        return refusal

    def _forged(self, connection: HTTPConnection) -> Refusal | None:
        """A refusal where a page of another site, or of another port of this one, made the browser ask.

        A link that somebody followed is none of that. What changes something, and a websocket, needs a sign that it was
        our own page; old browsers send none with a GET.
        """
        site = connection.headers.get("sec-fetch-site")
        origin = connection.headers.get("origin")
        is_safe = connection.scope["type"] == "http" and connection.scope["method"] in SAFE_METHODS
        if site == "same-origin":  # a page cannot set this header
            return None
        if origin is not None and site in (None, "none"):
            host = origin.partition("://")[2]
            is_own = host != "" and host in (connection.headers.get("host"), self._public_host)
        elif is_safe:
            is_own = site in (None, "none") or connection.headers.get("sec-fetch-mode") == "navigate"
        else:
            is_own = False
        return None if is_own else Refusal(403, "this request was made by a page of another site")

    def _limit(self, path: str) -> int | None:
        if path.startswith(UPLOAD_PREFIX):
            return None  # storage routes have a limit and an error format of their own
        if path == "/api/tasks":
            return self._config.max_photo_bytes + FORM_OVERHEAD_BYTES
        return MAX_OPEN_BYTES if is_open(path) else MAX_JSON_BYTES


def _embedded(connection: HTTPConnection) -> Refusal | None:
    """A refusal where a browser says that a page of another site, or of another port of this one, asks.

    There is no Origin in such a request where it loads a picture or a script. A link that somebody follows is let
    through, and so are programs, which do not send this header.
    """
    if connection.headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return None
    is_safe = connection.scope["type"] == "http" and connection.scope["method"] in SAFE_METHODS
    if is_safe and connection.headers.get("sec-fetch-mode") == "navigate":
        return None
    return Refusal(403, "without a key this server answers to no other site's pages: set WORKER_API_KEY")


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or path.startswith(OPEN_BENEATH)


def _length(headers: Headers) -> int:
    length = headers.get("content-length", "0")
    return int(length) if length.isascii() and length.isdigit() and len(length) < 20 else 0


def _limited(receive: Receive, limit: int) -> Receive:
    """Counts the bytes of a body that declares no length."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, f"body: more than {limit} bytes")
        return message

    return counted
