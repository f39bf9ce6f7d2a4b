"""Time limits for slow clients, and a limit on the number of connections.

uvicorn waits for ever for the rest of a request and accepts any number of connections, so a thousand incomplete
requests of one stranger use up the files that this process may open, and other clients get no answer. Here a client has
a time limit for its next step (completing the header, sending more of the body, reading the answer). If there is no
room for another connection, the one whose client has been idle for longest is closed.

A client that follows events over a WebSocket owes nothing but to read them.
"""

import asyncio
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

BACKLOG = 64
"""Connections that the kernel queues until they are accepted; asyncio accepts as many at once."""

WANTED_FILES = 4096
"""The limit of open files that this process asks the system for; many systems allow 1024 by default."""

OTHER_FILES = 400
"""Files that are kept free for other things: the database's (40 connections with up to three files each), and several
times BACKLOG, since asyncio accepts connections faster than they are counted here."""

UNSENT_BYTES = 128 * 1024
"""How much of an answer the kernel buffers. By default it buffers megabytes, and accepts more only when a third of them
was read, so that a client that reads slowly would seem to read nothing."""

FILES_EACH = 2
"""Files that a connection needs: its socket, and the object that it sends or receives."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """Time limits for clients, and how many are served at once."""

    header_s: float = 10.0
    """From the connection, or the end of the previous answer, to the last line of the header."""

    stalled_s: float = 60.0
    """Without a byte of the request's body arriving, or of the answer being read."""

    listener_s: float = 10.0
    """For what was sent over a WebSocket to be read."""

    connections: int = 1000
    """Fewer where the system allows fewer files."""


@dataclass(slots=True)
class Crowd:
    """The connections of one server that wait for their clients, the longest wait first."""

    patience: Patience
    owing: dict["Connection", None] = field(default_factory=dict)


class Connection(H11Protocol):
    """uvicorn's connection with time limits. It waits for its client from the start, for a request."""

    def __init__(self, *, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self._crowd = crowd
        self._timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # bytes of answers that were unread when the timer was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._set_timer()
        if len(self.connections) > self._crowd.patience.connections:
            next(iter(self._crowd.owing)).abort()

    def data_received(self, data: bytes) -> None:
        was_waiting = self._waits_for_a_request()
        super().data_received(data)
        if not (was_waiting and self._waits_for_a_request()):  # a header in small pieces gains no time
            self._set_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._set_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._stop_timer()  # from here on, another class has the connection
        super().handle_websocket_upgrade(event)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: anybody may ask for any protocol, and the log would grow."""

    def abort(self) -> None:
        """Closes the connection at once. The application is told that its client has left."""
        self._stop_timer()
        self.transport.abort()

    def _limit_s(self) -> float | None:
        """The time limit for the client's next step; None while the server is working."""
        if self.transport.get_write_buffer_size():
            return self._crowd.patience.stalled_s
        if self._waits_for_a_request():
            return self._crowd.patience.header_s
        return self._crowd.patience.stalled_s if self.conn.their_state is h11.SEND_BODY else None

    def _waits_for_a_request(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _set_timer(self) -> None:
        self._stop_timer()
        self._unread_bytes = self.transport.get_write_buffer_size()
        limit_s = self._limit_s()
        if limit_s is not None:
            self._timer = self.loop.call_later(limit_s, self._time_is_up)
            self._crowd.owing[self] = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._crowd.owing.pop(self, None)

    def _time_is_up(self) -> None:
        reads = self.transport.get_write_buffer_size() < self._unread_bytes
        # While the application has paused reading, no byte can arrive, whatever the client sends. Nobody tells this
        # class when it resumes, so the client gets another full time limit.
        cannot_send = not self._waits_for_a_request() and self.flow.read_paused
        if reads or cannot_send:
            self._set_timer()
        else:
            self.abort()


class WebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, closed at once where its client does not read or does not answer pings."""

    def __init__(self, *, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self._patience = crowd.patience
        self._timer: asyncio.TimerHandle | None = None
        self.close_timeout = crowd.patience.listener_s  # uvicorn's: until the client answers that it closes, too

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Whatever the kernel does not take is unread, and sending waits until it does.
        self.transport.set_write_buffer_limits(high=0)
        # A request that this class cannot read, although Connection could, would keep the connection for ever.
        self._set_timer(self._patience.stalled_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_timer(self._patience.listener_s)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()

    def keepalive_timeout(self) -> None:
        self.transport.abort()  # closing it would wait until the client reads

    def _set_timer(self, limit_s: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(limit_s, self._time_is_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_is_up(self) -> None:
        if not self.handshake_complete or self.transport.get_write_buffer_size():
            self.transport.abort()


def affordable(wanted: int) -> int:
    """How many of the wanted connections this process can have open; raises its limit of open files if needed."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < WANTED_FILES:
        allowed = WANTED_FILES if most == resource.RLIM_INFINITY else min(WANTED_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    return max(1, min(wanted, (allowed - OTHER_FILES) // FILES_EACH))


def for_listeners(patience: Patience) -> int:
    """How many of a server's connections may follow events: they stay, so some are left for everybody else."""
    return max(1, affordable(patience.connections) * 3 // 4)


@contextmanager
def told_briefly() -> Iterator[None]:
    """While the block runs, connections that cannot be accepted are one log line a second.

    asyncio logs a traceback for each, up to BACKLOG of them before it pauses for a second.
    """
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    told_at = -1.0

    def tell(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal told_at
        error = context.get("exception")
        if not (isinstance(error, OSError) and str(context.get("message")).startswith("socket.accept()")):
            before(loop, context) if before else loop.default_exception_handler(context)
        elif loop.time() - told_at > 1:
            told_at = loop.time()
            log.error("connections cannot be accepted", reason=error.strerror)

    loop.set_exception_handler(tell)
    try:
        yield
    finally:
        loop.set_exception_handler(before)
