"""The page that describes the API, whole from this server, and what browsers may do with any of its answers.

Swagger UI comes with the package fastapi-offline: scripts of another site could be changed there, and would run beside
whatever key is typed into the page. That it cannot be framed keeps others from having it clicked unseen.
"""

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Relative addresses: the server may stand behind a proxy, under a path that it does not know.
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
    # Swagger UI has its icons in its style sheet, and sets styles of elements.
    "content-security-policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # addresses of photos and videos are signed: who has one may see what is there
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
    """Adds HEADERS to every answer, photos and videos of strangers included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI application."""

        async def ruled(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, ruled)
