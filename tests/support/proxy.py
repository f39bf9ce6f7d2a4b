"""A proxy between one worker and the queue: keeps a record of what was said, and loses what it is told to lose."""

import hashlib
import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

Fault = Literal["drop request", "drop reply", "cut reply"]
UPSTREAM_TIMEOUT_S = 30
HOLD_LIMIT_S = 60
"""A request that nobody lets go is let go after this, so that a test that went wrong comes to its end."""


@dataclass
class Exchange:
    """One request as the queue answered it, whatever became of the answer."""

    sender: str  # whose proxy it came through
    method: str
    path: str  # without the query
    body: dict[str, Any] | None  # of a call
    digest: str  # of what was sent, for uploads
    status: int | None = None  # None: the queue gave no answer, or was not asked
    answer: dict[str, Any] | None = None
    fault: Fault | None = None

    @property
    def call(self) -> str:
        """`next-task`, `heartbeat`, `presign`, `report`; `upload`, `download` for objects."""
        if "/storage/" in self.path:
            return "upload" if self.method == "PUT" else "download"
        return self.path.rsplit("/", 1)[-1]

    @property
    def accepted(self) -> bool:
        """Whether the queue did what it was asked."""
        return self.status == 200


@dataclass
class Record:
    """Everything that went through the proxies of one site."""

    exchanges: list[Exchange] = field(default_factory=list)

    def of(self, call: str, sender: str | None = None) -> list[Exchange]:
        """The exchanges of a kind, of one sender or of all."""
        return [it for it in list(self.exchanges) if it.call == call and sender in (None, it.sender)]


class Hold:
    """Stops the first request of a kind, before the queue has seen it, until it is let go."""

    def __init__(self, call: str) -> None:
        self._call = call
        self._armed = threading.Lock()
        self.held = threading.Event()
        self._let_go = threading.Event()

    def __call__(self, exchange: Exchange) -> None:
        """Asked about every request."""
        if exchange.call == self._call and self._armed.acquire(blocking=False):
            self.held.set()
            self._let_go.wait(HOLD_LIMIT_S)

    def let_go(self) -> None:
        """The request goes on its way."""
        self._let_go.set()


class Weather:
    """Loses the first reply of each kind, then a share of requests and replies by the dice of a seed."""

    def __init__(self, seed: int, *, share: float, calls: tuple[str, ...]) -> None:
        self._dice = random.Random(seed)
        self._share, self._calls = share, calls
        self._lost = set()

    def __call__(self, exchange: Exchange) -> Fault | None:
        """What happens to this one."""
        if exchange.call not in self._calls:
            return None
        if exchange.call not in self._lost:
            self._lost.add(exchange.call)
            return "drop reply"
        if self._dice.random() >= self._share:
            return None
        # Lost replies are the worse of the two: the queue did what its caller does not know.
        return self._dice.choice(["drop reply", "drop reply", "cut reply", "drop request"])


class Proxy:
    """One worker's way to the queue, on a port of its own, so that what is said has a known sender."""

    def __init__(
        self, upstream_port: int, sender: str, record: Record, fault: Callable[[Exchange], Fault | None] | None = None
    ) -> None:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.upstream_port = upstream_port
        self._server.sender = sender
        self._server.record = record
        self._server.fault = fault or (lambda _: None)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    upstream_port: int
    sender: str
    record: Record
    fault: Callable[[Exchange], Fault | None]

    def handle_error(self, request, client_address) -> None:
        """A worker that was killed takes its connections with it."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = UPSTREAM_TIMEOUT_S

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        exchange = Exchange(
            sender=self.server.sender,
            method=self.command,
            path=self.path.partition("?")[0],
            body=_json(body) if "/storage/" not in self.path else None,
            digest=hashlib.sha256(body).hexdigest(),
        )
        exchange.fault = self.server.fault(exchange)
        if exchange.fault == "drop request":
            self.server.record.exchanges.append(exchange)
            return  # the connection closes, unanswered
        try:
            status, media_type, answer = self._ask_queue(body)
        except (OSError, HTTPException):
            self.server.record.exchanges.append(exchange)
            return
        exchange.status, exchange.answer = status, _json(answer)
        self.server.record.exchanges.append(exchange)
        if exchange.fault == "drop reply":
            return
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer[: len(answer) // 2] if exchange.fault == "cut reply" else answer)

    do_GET = do_POST = do_PUT = _pass_on  # noqa: N815 - the names in the base class

    def _ask_queue(self, body: bytes) -> tuple[int, str, bytes]:
        connection = HTTPConnection("127.0.0.1", self.server.upstream_port, timeout=UPSTREAM_TIMEOUT_S)
        try:
            # Host stays the proxy's, so that presigned URLs lead back through it.
            connection.request(self.command, self.path, body, dict(self.headers))
            response = connection.getresponse()
            return response.status, response.headers.get("Content-Type", ""), response.read()
        finally:
            connection.close()

    def log_message(self, format, *args) -> None:  # noqa: A002 - the name in the base class
        """Nothing on stderr."""


def _json(body: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(body)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
