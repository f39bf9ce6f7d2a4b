"""Runs any ASGI application under uvicorn, in the caller's task group."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import anyio
import anyio.to_thread
import uvicorn
from anyio.abc import TaskStatus
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.errors import SettingsError
from inference.server.connections import BACKLOG, Connection, Crowd, Patience, WebSocket, affordable, told_briefly

GRACE_S = 5
"""How long requests under way have to finish when the server stops."""

PING_S = 20.0
"""Between two pings of a WebSocket, and how long its client has to answer one."""

MAX_MESSAGE_BYTES = 4096
"""Of what a client sends over a WebSocket. No route of ours reads any of it."""


class _Server(uvicorn.Server):
    """Leaves signals to the program that it runs in, and tells when it accepts connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = anyio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.ready.set()


class _Unfinished:
    """Answers requests that the end of the grace cuts off; uvicorn would log a traceback for each of them."""

    def __init__(self, app: ASGIApp, stopping: ASGIApp) -> None:
        self._app, self._stopping = app, stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI application."""
        is_begun = False

        async def noted(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:  # uvicorn cancels the task, which has nothing to do beside this request
            if scope["type"] == "lifespan":
                raise
            if scope["type"] == "http" and not is_begun:
                await self._stopping(scope, receive, send)


async def serve_app(
    app: ASGIApp,
    listener: socket.socket,
    *,
    stopping: ASGIApp,
    closing: Callable[[], None] | None = None,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    task_status: TaskStatus[tuple[str, int]] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled, then gives running requests GRACE_S to finish. On asyncio only, as uvicorn is.

    `stopping`: answers the requests that did not finish. `closing`: called in a thread as soon as the server stops; it
    ends what would never finish by itself, such as streams of events. Starts with the (host, port) it listens on, once
    it does.
    """
    crowd = Crowd(replace(patience, connections=affordable(patience.connections)))
    server = _Server(
        uvicorn.Config(
            _Unfinished(app, stopping),
            http=partial(Connection, crowd=crowd),  # type: ignore[arg-type]  # called as the class would be
            ws=partial(WebSocket, crowd=crowd),  # type: ignore[arg-type]  # as above
            ws_max_size=MAX_MESSAGE_BYTES,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,  # events are short; a compressor each would cost more than it saves
            backlog=BACKLOG,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # see proxied.py
            lifespan="on",
            timeout_graceful_shutdown=GRACE_S,
        )
    )
    with told_briefly():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_stop_when_cancelled, server, closing)
            tasks.start_soon(_announce, server, listener, task_status)
            # Shielded: when told to exit, it closes connections and the application in order.
            with anyio.CancelScope(shield=True):
                await server.serve(sockets=[listener])
            tasks.cancel_scope.cancel()


async def _announce(server: _Server, listener: socket.socket, task_status: TaskStatus[tuple[str, int]]) -> None:
    host, port = listener.getsockname()[:2]
    await server.ready.wait()
    task_status.started((host, port))


async def _stop_when_cancelled(server: _Server, closing: Callable[[], None] | None) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        server.should_exit = True
        if closing is not None:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(closing)


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections; port 0 takes a free one. Raises SettingsError where it cannot listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error.strerror
        raise SettingsError(
            f"cannot listen on {host}, port {port}: {reason}; set I2V_HOST and I2V_PORT, or --host and --port"
        ) from None
    # Answers are written in two pieces. Linux would send the second once the client has acknowledged the first, which
    # clients delay by 40 ms. Connections inherit this; asyncio sets it only where a socket names its protocol.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
