"""Who may follow progress."""

import hmac
import secrets
import time
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import NamedTuple
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection

from inference.progress.web.seals import Seals

TOKEN_LIFETIME_S = 300.0
"""A page uses its token at once; one that was copied from a log should be worth nothing soon."""

TOKEN = "token"  # noqa: S105 - a name
"""The parameter of the query that carries a token: browsers let a page set no header of a WebSocket or EventSource."""

FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""Headers in which a proxy tells for whom it asks."""


class Refusal(NamedTuple):
    """Why somebody may not: the status of HTTP, and a reason for people. A websocket is refused with 403 always."""

    status: int
    why: str


Check = Callable[[HTTPConnection, str], Refusal | Awaitable[Refusal | None] | None]
"""Whether a connection may follow the project of that id; None lets it in. May be a coroutine function."""


class Access:
    """Admits holders of the key, or of a token for one project; without a key, this machine's programs and pages.

    A token is itself the permission, so the page that holds it may be of any site. An application signs one for each of
    its pages, with the same key and secret: `Access(key, secret).sign(project_id)`.
    """

    def __init__(
        self, key: str | None = None, secret: str | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        """`secret` signs tokens; by default a random one, so that they end with this process. Raises ValueError."""
        self._key = key
        self._seals = Seals(secrets.token_hex(32) if secret is None else secret, "listen", key or "", clock)

    def sign(self, project_id: str, lifetime_s: float = TOKEN_LIFETIME_S) -> str:
        """A token with which anybody may begin to follow this project for `lifetime_s`, and go on for longer."""
        return self._seals.make(project_id, lifetime_s)

    def __call__(self, connection: HTTPConnection, project_id: str) -> Refusal | None:
        """See Check."""
        if self._key is None:
            return not_from_here(connection.headers)
        token = connection.query_params.get(TOKEN)
        if token is None or "authorization" in connection.headers:
            return not_the_key(connection.headers, self._key)
        if not self._seals.is_valid(token, project_id):
            return Refusal(401, "the token is wrong, has expired, or is for another project")
        connection.state.is_for_any_site = True
        return None


def is_for_any_site(connection: HTTPConnection) -> bool:
    """Whether a page of another site may read the answer, since it was let in for a token.

    A token in the address alone says nothing: another check may not have looked at it, and have let a browser in for
    where it is, say.
    """
    return getattr(connection.state, "is_for_any_site", False)


def not_the_key(headers: Headers, key: str) -> Refusal | None:
    """None where the header Authorization has the key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() not in ("worker", "bearer"):
        return Refusal(401, "the key is missing: Authorization: Worker KEY")
    # As bytes, since compare_digest refuses text that is not ASCII. Starlette decodes headers as Latin-1.
    if not hmac.compare_digest(given.strip().encode("latin-1"), key.encode()):
        return Refusal(401, "the key is wrong")
    return None


def not_from_here(headers: Headers, remedy: str = "set a key") -> Refusal | None:
    """None for programs on this machine and for pages of this server.

    A web page can make a browser call loopback, either across origins, which shows in the Origin header, or through a
    domain of its own that resolves to loopback, which shows in the Host header. Programs do neither. A proxy on this
    machine asks for others, and many name themselves in the Host header; most tell for whom they ask.
    """
    if any(name in headers for name in FORWARDED):
        return Refusal(403, f"without a key this server answers nobody behind a proxy: {remedy}")
    if not is_loopback(_host_name(headers.get("host", ""))):
        return Refusal(403, f"without a key this server answers to loopback names only: {remedy}")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return Refusal(403, f"without a key this server answers to no other site's pages: {remedy}")
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
