"""Progress as server-sent events (html.spec.whatwg.org/multipage/server-sent-events.html)."""

from collections.abc import Awaitable, Callable

import anyio
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from inference.errors import ListenerTooSlow
from inference.progress.web.follow import Tell

RETRY_MS = 2000
"""How long a browser waits until it connects again."""

KEEPALIVE_S = 15.0
"""Proxies close what is silent for long, some after 30 s; and only who is written to is found to have left."""

ENDS = str.maketrans({character: f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"})
"""Ends of lines in Unicode, as JSON may write them, too. They end no line of a stream, but some readers think they do:
httpx's `iter_lines` is one."""

HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # nginx would collect events until its buffer is full
}


class EventStream:
    """A response of the events that `follow` tells, for as long as it does.

    `follow` raises TimeoutError or ListenerTooSlow where the listener is too slow; the browser then connects again, and
    names the last event that it has.
    """

    def __init__(self, follow: Callable[[Tell], Awaitable[None]], *, is_for_any_site: bool) -> None:
        """`is_for_any_site`: pages of other sites may read it."""
        self._follow = follow
        self._headers = HEADERS | ({"access-control-allow-origin": "*"} if is_for_any_site else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any response."""
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if scope["method"] != "HEAD":
            await self._stream(receive, send)
        # Of a listener that takes nothing, only this response waits now, until its server gives the connection up.
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, receive: Receive, send: Send) -> None:
        turns = anyio.Lock(fast_acquire=True)

        async def write(text: str) -> None:
            async with turns:
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        async def tell(event_id: str | None, text: str) -> None:
            if not text.isascii():
                text = text.translate(ENDS)
            await write(f"data: {text}\n\n" if event_id is None else f"id: {event_id}\ndata: {text}\n\n")

        async def keep_alive() -> None:
            while True:
                await anyio.sleep(KEEPALIVE_S)
                await write(":\n\n")

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_until_gone, receive, tasks.cancel_scope)
            tasks.start_soon(keep_alive)
            try:
                await write(f"retry: {RETRY_MS}\n\n")
                await self._follow(tell)
            except (TimeoutError, ListenerTooSlow):
                pass
            tasks.cancel_scope.cancel()


async def _until_gone(receive: Receive, scope: anyio.CancelScope) -> None:
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except HTTPException:  # somebody between the server and us has found what the listener sends too long
        pass
    scope.cancel()
