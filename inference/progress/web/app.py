"""Progress for pages and programs, as an application of its own or mounted into another.

    GET /events/{project_id}    server-sent events: `id:` and `data:`; resumed after `Last-Event-ID`
    WS  /ws/{project_id}        the same events, each with its `id` as one more member; resumed after `?after=ID`

Who comes for the first time, or after too long, gets the newest event of each task and then everything.
"""

from functools import partial
from inspect import isawaitable

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from inference.progress.hub import ProgressHub
from inference.progress.web.access import Access, Check, Refusal, is_for_any_site
from inference.progress.web.follow import MAX_PROJECT_ID, Bounds, Snapshot, Tell, follow, is_project_id, last_seen
from inference.progress.web.sse import EventStream
from inference.progress.web.websocket import POLICY_VIOLATION, serve_websocket


def progress_app(
    hub: ProgressHub,
    *,
    access: Check | None = None,
    snapshot: Snapshot | None = None,
    bounds: Bounds = Bounds(),  # noqa: B008 - frozen
) -> Starlette:
    """An application over a hub, which others mount: `app.mount("/progress", …)`. Streams end when the hub is closed.

    `access`: who may follow which project; by default programs and pages of this machine alone. An `Access` asks for a
    key or a token; any other callable is given the connection and the project's id, and returns None or a Refusal.
    `snapshot`: the newest event of each task of a project, where an application knows more than the hub has kept.
    """
    listening = _Listening(hub, access or Access(), snapshot, bounds)
    return Starlette(
        routes=[
            Route("/events/{project_id}", listening.events, methods=["GET"]),
            WebSocketRoute("/ws/{project_id}", listening.websocket),
        ]
    )


class _Listening:
    def __init__(self, hub: ProgressHub, access: Check, snapshot: Snapshot | None, bounds: Bounds) -> None:
        self._hub, self._access, self._snapshot = hub, access, snapshot
        self._bounds = bounds
        self._listeners: set[HTTPConnection] = set()  # from when they are admitted until they are told nothing more

    async def events(self, request: Request) -> ASGIApp:
        refusal = await self._refusal(request)
        if refusal is not None:
            headers = {"www-authenticate": "Bearer"} if refusal.status == 401 else None
            return JSONResponse({"error": refusal.why}, refusal.status, headers)
        self._listeners.add(request)
        return partial(self._stream, request)

    async def _stream(self, request: Request, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            stream = EventStream(partial(self._follow, request), is_for_any_site=is_for_any_site(request))
            await stream(scope, receive, send)
        finally:
            self._listeners.discard(request)

    async def websocket(self, websocket: WebSocket) -> None:
        if await self._refusal(websocket) is not None:
            await websocket.close(POLICY_VIOLATION)  # becomes a 403
            return
        self._listeners.add(websocket)
        try:
            await serve_websocket(websocket, partial(self._follow, websocket))
        finally:
            self._listeners.discard(websocket)

    async def _refusal(self, connection: HTTPConnection) -> Refusal | None:
        project_id = connection.path_params["project_id"]
        if not is_project_id(project_id):
            return Refusal(400, f"project_id: has to be 1 to {MAX_PROJECT_ID} characters that can be read")
        try:
            found = self._access(connection, project_id)
            refusal = await found if isawaitable(found) else found
        except HTTPException as error:  # what an application's own check raises elsewhere
            refusal = Refusal(error.status_code, str(error.detail))
        # Afterwards: a check may take long, and others come meanwhile.
        if refusal is None and len(self._listeners) >= self._bounds.listeners:
            refusal = Refusal(503, "too many listen now: try again later")
        return refusal

    async def _follow(self, connection: HTTPConnection, tell: Tell) -> None:
        project_id, after = connection.path_params["project_id"], last_seen(connection)

        async def told(event_id: str | None, text: str) -> None:
            # What `fail_after` does, at half the price; this is done for every event and listener.
            with anyio.CancelScope(deadline=anyio.current_time() + self._bounds.send_s) as limit:
                await tell(event_id, text)
            if limit.cancelled_caught:
                raise TimeoutError

        try:
            with anyio.move_on_after(self._bounds.longest_s):
                await follow(self._hub, project_id, after, self._snapshot, told)
        finally:
            self._listeners.discard(connection)  # ending the stream may take a dead listener long
