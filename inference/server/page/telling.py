"""Errors of the page's routes, told to people instead of programs."""

from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from inference.errors import I2VError
from inference.server.answers import status_of
from inference.server.page.asking import is_fragment, words_for
from inference.server.page.rendering import Renderer

log = structlog.get_logger(__name__)


def told_to_people(renderer: Renderer) -> type[APIRoute]:
    """Routes whose errors are pages, or a line of text for the page's script, and not the API's JSON."""

    class PageRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            """See APIRoute."""
            handle = super().get_route_handler()

            async def told(request: Request) -> Response:
                try:
                    return await handle(request)
                except I2VError as error:
                    return _told(renderer, request, error)

            return told

    return PageRoute


def _told(renderer: Renderer, request: Request, error: I2VError) -> Response:
    status = status_of(error)
    if status == 500:
        log.error("the page cannot be shown", path=request.url.path, error=str(error))
    if is_fragment(request):
        return Response(str(error), status, {"cache-control": "no-store"}, "text/plain")
    home = "../" * (request.url.path.count("/") - 1) or "./"  # the page's folder, as the browser sees it from here
    reason = None if status == 404 else str(error)
    return renderer.html("problem.html", words_for(request), status, reason=reason, home=home)
