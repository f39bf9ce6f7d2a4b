"""Checks the key and the size of a request before any of its body is read."""

import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.server.answers import EarlyAnswer, Failure
from inference.server.config import MIB, ServerConfig
from inference.server.storage_api import UPLOAD_PREFIX

MAX_JSON_BYTES = 5 * MIB
"""A worker may report a failure with all of its stderr. Where the real server runs, bodies end at 4.5 MB
(vercel.com/docs/functions/limitations)."""

FORM_OVERHEAD_BYTES = MIB
"""The size that a form may have beyond its photo."""

POLICY_VIOLATION = 1008
"""A close code of websockets (RFC 6455, 7.4.1)."""


class Guard:
    """Requires the key where one is set; without a key, admits only programs on this machine.

    A web page can make a browser call loopback, either across origins, which shows in the Origin header, or through a
    domain of its own that resolves to loopback, which shows in the Host header. Programs do neither.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI application."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if scope["type"] == "websocket":
            if self._refusal(headers, needs_key=True) is None:
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": POLICY_VIOLATION})  # becomes a 403
            return
        limit = self._limit(scope)
        refusal = self._refusal(headers, needs_key=scope["path"].startswith("/api/"))
        if refusal is None and limit is not None and _length(headers) > limit:
            refusal = (413, f"body: more than {limit} bytes")
        if refusal is not None:
            status, error = refusal
            extra = {"www-authenticate": "Worker"} if status == 401 else None
            await EarlyAnswer(Failure(error=error).model_dump(), status, extra)(scope, receive, send)
            return
        await self._app(scope, receive if limit is None else _limited(receive, limit), send)

    def _refusal(self, headers: Headers, *, needs_key: bool) -> tuple[int, str] | None:
        if self._config.api_key is None:
            return _not_from_here(headers)
        return _not_the_key(headers, self._config.api_key) if needs_key else None

    def _limit(self, scope: Scope) -> int | None:
        if scope["path"].startswith(UPLOAD_PREFIX):
            return None  # storage routes have a limit and an error format of their own
        if scope["path"] == "/api/tasks":
            return self._config.max_photo_bytes + FORM_OVERHEAD_BYTES
        return MAX_JSON_BYTES


def _not_from_here(headers: Headers) -> tuple[int, str] | None:
    if not is_loopback(_host_name(headers.get("host", ""))):
        return 403, "without a key this server answers to loopback names only: set WORKER_API_KEY"
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return 403, "without a key this server answers to no other site's pages: set WORKER_API_KEY"
    return None


def _not_the_key(headers: Headers, key: str) -> tuple[int, str] | None:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("worker", "bearer"):
        return 401, "the key is missing: Authorization: Worker KEY"
    # As bytes, since compare_digest refuses text that is not ASCII. Starlette decodes headers as Latin-1.
    if not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        return 401, "the key is wrong"
    return None


def is_loopback(host: str) -> bool:
    """Whether a name, or an address without brackets, is this machine and nothing else."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


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
