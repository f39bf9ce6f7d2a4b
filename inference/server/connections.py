"""How long a connection waits for its client, and how many connections there may be.

uvicorn waits for ever for the rest of a request and takes any number of connections, so that a thousand half
requests of one stranger use up the files this process may open, and nobody else is answered. Here a client that
owes the server something (a whole header, more of a body, reading its answer) has a time limit for it, and where
there is no room for another connection, the one whose client has owed something for longest is closed.
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

BACKLOG = 64
"""Connections that the kernel holds until they are accepted; asyncio accepts as many in one go."""

WANTED_FILES = 4096
"""Files that this process asks to be allowed; 1024 is what many systems allow unasked."""

OTHER_FILES = 400
"""Files that are kept free for other things: the database's (40 connections with up to three files each), and several
times BACKLOG, since asyncio accepts connections faster than they are counted here."""

UNSENT_BYTES = 128 * 1024
"""How much of an answer the kernel buffers besides what is on its way. Its default is megabytes, of which a third has
to be read before it takes more: a client that reads slowly would seem to read nothing."""

FILES_EACH = 2
"""A connection, and the object it sends or receives."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long clients are waited for, and how many at once."""

    header_s: float = 10.0
    """From the connection, or the end of the answer before, to the last line of the header."""

    stalled_s: float = 60.0
    """Without a byte of a request's body, or without one of an answer being read."""

    connections: int = 1000
    """Fewer where the system allows fewer files."""


@dataclass(slots=True)
class Crowd:
    """The connections of one server whose clients owe it something, the one that has for longest first."""

    patience: Patience
    owing: dict["Connection", None] = field(default_factory=dict)


class Connection(H11Protocol):
    """uvicorn's, with limits. From its first moment on its client owes it a request."""

    def __init__(self, *, crowd: Crowd, **given: Any) -> None:
        super().__init__(**given)
        self._crowd = crowd
        self._timer: asyncio.TimerHandle | None = None
        self._unread_bytes = 0  # of answers, when the timer was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
        self._set_timer()
        if len(self.connections) > self._crowd.patience.connections:
            next(iter(self._crowd.owing)).abort()

    def data_received(self, data: bytes) -> None:
        was_waiting = self._waits_for_a_request()
        super().data_received(data)
        if not (was_waiting and self._waits_for_a_request()):  # a header that drips in gains no time
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

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: anybody may ask for a websocket, and uvicorn would advise to install what speaks it."""

    def abort(self) -> None:
        """Ends the connection, whatever it is in the middle of. The application hears that its client left."""
        self._stop_timer()
        self.transport.abort()

    def _limit_s(self) -> float | None:
        """How long the client may take for what it owes now; None where it is the server's turn."""
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


def affordable(wanted: int) -> int:
    """How many of the wanted connections this process can have open; asks the system for more files if need be."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < WANTED_FILES:
        allowed = WANTED_FILES if most == resource.RLIM_INFINITY else min(WANTED_FILES, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    return max(1, min(wanted, (allowed - OTHER_FILES) // FILES_EACH))


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
