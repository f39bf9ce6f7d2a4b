"""Runs the application under uvicorn, in the caller's task group."""

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import anyio
import anyio.to_thread
import structlog
import uvicorn
from anyio.abc import TaskStatus
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference.errors import SettingsError
from inference.server.answers import failure
from inference.server.api import create_app
from inference.server.config import ServerConfig
from inference.server.connections import BACKLOG, Connection, Crowd, Patience, affordable, told_briefly
from inference.server.guard import is_loopback

GRACE_S = 5
"""How long requests under way have to finish when the server stops."""

log = structlog.get_logger(__name__)


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

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
            if scope["type"] != "http":
                raise
            if not is_begun:
                await failure(503, "the server is stopping: try again", {"connection": "close"})(scope, receive, send)


async def serve(
    config: ServerConfig,
    host: str,
    port: int,
    *,
    patience: Patience = Patience(),  # noqa: B008 - frozen
    task_status: TaskStatus[tuple[str, int]] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Serves until cancelled, then gives running requests GRACE_S to finish. On asyncio only, as uvicorn is.

    Port 0 takes a free one. Starts with the (host, port) it listens on, once it does: `await tasks.start(serve, …)`.
    Raises SettingsError where it cannot listen, or would be open to strangers; and as `create_app`.
    """
    if config.api_key is None:
        if not is_loopback(host):
            raise SettingsError(
                f"WORKER_API_KEY is not set, so this server may not listen on {host}: set it, or listen on 127.0.0.1"
            )
        log.warning("no key is set: this server answers programs on this machine only", setting="WORKER_API_KEY")
    listener = _listen(host, port)
    try:
        app = await anyio.to_thread.run_sync(create_app, config)
        crowd = Crowd(replace(patience, connections=affordable(patience.connections)))
        server = _Server(
            uvicorn.Config(
                _Unfinished(app),
                http=partial(Connection, crowd=crowd),  # type: ignore[arg-type]  # called as the class would be
                ws="none",  # no route uses websockets
                backlog=BACKLOG,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        with told_briefly():
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_stop_when_cancelled, server)
                tasks.start_soon(_announce, server, listener, task_status)
                # Shielded: when told to exit, it closes connections and the application in order.
                with anyio.CancelScope(shield=True):
                    await server.serve(sockets=[listener])
                tasks.cancel_scope.cancel()
    finally:
        listener.close()


async def _announce(server: _Server, listener: socket.socket, task_status: TaskStatus[tuple[str, int]]) -> None:
    host, port = listener.getsockname()[:2]
    await server.ready.wait()
    log.info("the queue is open", host=host, port=port)
    task_status.started((host, port))


async def _stop_when_cancelled(server: _Server) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error.strerror
        raise SettingsError(
            f"cannot listen on {host}, port {port}: {reason}; set I2V_HOST and I2V_PORT, or --host and --port"
        ) from None
