"""What a proxy in front says of a request."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send


class Proxied:
    """Believes X-Forwarded-Proto, so that addresses in answers and the cookie are for https where the caller came so.

    Anybody may send that header, but all that follows from it is in the sender's own answer. X-Forwarded-For is not
    believed: many proxies pass on what a stranger wrote there, who would be somebody else with each wrong key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI application."""
        if scope["type"] == "http":
            said = Headers(scope=scope).get("x-forwarded-proto", "").split(",")[0].strip().lower()
            if said == "https":
                scope["scheme"] = "https"
        await self._app(scope, receive, send)
