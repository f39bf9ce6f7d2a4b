"""The page that describes the API, and the security headers of every answer.

Swagger UI is served from this server, by the package fastapi-offline: a script from another site could read the key
that is typed into the page. Framing is forbidden against clickjacking.
"""

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Relative addresses: the server may be behind a proxy, under a path that it does not know.
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>i2v queue</title>
<link rel="icon" href="docs/ui/favicon.png">
<link rel="stylesheet" href="docs/ui/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="docs/ui/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

START = """SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null})
"""

HEADERS = {
    # Swagger UI has its icons as data: URLs in its style sheet, and sets inline styles.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # URLs of photos and videos are signed: whoever has one may see the file
}


def add_docs(app: FastAPI) -> None:
    """Serves the page under /docs."""

    async def page(_request: Request) -> Response:
        return HTMLResponse(PAGE)

    async def start(_request: Request) -> Response:
        return Response(START, media_type="text/javascript")

    app.add_route("/docs", page, include_in_schema=False)
    app.add_route("/docs/start.js", start, include_in_schema=False)
    app.mount("/docs/ui", StaticFiles(packages=[("fastapi_offline", "static")]))


class BrowserRules:
    """Adds HEADERS to every answer, photos and videos of strangers included; those of the page at / bring their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI application."""

        async def ruled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, ruled)
