"""Progress over a WebSocket."""

from collections.abc import Awaitable, Callable

import anyio
from starlette.websockets import WebSocket, WebSocketDisconnect

from inference.errors import ListenerTooSlow
from inference.progress.web.follow import Tell

POLICY_VIOLATION, SERVICE_RESTART, TRY_AGAIN_LATER = 1008, 1012, 1013
"""Codes with which a WebSocket is closed (iana.org/assignments/websocket)."""

CLOSE_S = 1.0
"""How long is waited until a close frame can be sent. It cannot be, where the client has not read what came before."""

BURST, PER_S = 60, 1.0
"""How many messages a client may send at once, and in the long run. They are thrown away, which is work, too."""


async def serve_websocket(websocket: WebSocket, follow: Callable[[Tell], Awaitable[None]]) -> None:
    """Sends the events that `follow` tells, and closes: 1012 at their end, 1013 where the client takes them too slowly.

    What the client sends is ignored; a client that sends much is closed with 1008.
    """

    async def tell(event_id: str | None, text: str) -> None:
        # A WebSocket has no ids of its own, so the event has it. Every event is an object with a type in it.
        frame = text if event_id is None else f'{{"id":"{event_id}",{text[1:]}'
        await websocket.send({"type": "websocket.send", "text": frame})

    code = SERVICE_RESTART
    try:
        await websocket.accept()
        async with anyio.create_task_group() as tasks:
            talks = _Talks(tasks.cancel_scope)
            tasks.start_soon(talks.read, websocket)
            try:
                await follow(tell)
            except (TimeoutError, ListenerTooSlow):
                code = TRY_AGAIN_LATER
            except WebSocketDisconnect:
                talks.is_over = True
            tasks.cancel_scope.cancel()
        if not talks.is_over:
            with anyio.move_on_after(CLOSE_S):
                await websocket.close(POLICY_VIOLATION if talks.too_much else code)
    except WebSocketDisconnect:
        pass  # while it was accepted or closed


class _Talks:
    """What a client says."""

    def __init__(self, scope: anyio.CancelScope) -> None:
        self._scope = scope
        self.is_over = False  # the client has left
        self.too_much = False

    async def read(self, websocket: WebSocket) -> None:
        """Reads until the client leaves or says too much, and ends the scope then."""
        began, said = anyio.current_time(), 0
        while (await websocket.receive())["type"] != "websocket.disconnect":
            said += 1
            if said > BURST + PER_S * (anyio.current_time() - began):
                self.too_much = True
                break
        else:
            self.is_over = True
        self._scope.cancel()
