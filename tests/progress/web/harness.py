"""Applications served on loopback, and listeners that speak WebSocket and server-sent events to them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from anyio.from_thread import start_blocking_portal
from starlette.responses import PlainTextResponse
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect

from inference.progress.events import ProgressEvent
from inference.server.listening import listen, serve_app

LIMIT_S = 10


@contextmanager
def serving(app, hub, **options: Any) -> Iterator[str]:
    """The base URL of an application under the server that `i2v serve` has, in a thread."""
    options |= {"stopping": PlainTextResponse("stopping", 503), "closing": hub.close}

    async def serve(*, task_status):
        with listen("127.0.0.1", 0) as listener:
            await serve_app(app, listener, task_status=task_status, **options)

    with start_blocking_portal() as portal:
        stopped, (host, port) = portal.start_task(serve)
        try:
            yield f"http://{host}:{port}"
        finally:
            stopped.cancel()


def step(task: str, percent: int, project: str = "film", **metadata: Any) -> ProgressEvent:
    """Progress of a task."""
    return ProgressEvent(
        project_id=project,
        task_name=task,
        progress=percent / 100,
        progress_percent=percent,
        status="processing",
        metadata=metadata,
    )


class Listener:
    """What one listener hears, whatever it speaks: (id, event), one after another."""

    def __init__(self, events: Iterator[tuple[str | None, dict[str, Any]]]) -> None:
        self._events = events

    def next(self) -> tuple[str | None, dict[str, Any]]:
        """The next event. Raises StopIteration where the stream has ended."""
        return next(self._events)

    def percents(self, count: int) -> list[tuple[str, int]]:
        """Task and percent of so many events."""
        return [(event["task_name"], event["progress_percent"]) for _, event in (self.next() for _ in range(count))]

    def has_ended(self) -> bool:
        """Whether nothing more comes, since the server has ended the stream."""
        return next(self._events, None) is None


@contextmanager
def by_sse(url: str, project: str = "film", query: str = "", **headers: str) -> Iterator[Listener]:
    """Follows a project as an EventSource does."""
    address = f"{url}/events/{project}{query}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    with httpx.stream("GET", address, headers=named, timeout=LIMIT_S) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        yield Listener(_parsed(response.iter_lines()))


def _parsed(lines: Iterator[str]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    event_id = data = None
    for line in lines:
        name, _, value = line.partition(": ")
        if name == "id":
            event_id = value
        elif name == "data":
            data = value
        elif line == "" and data is not None:
            yield event_id, json.loads(data)
            event_id = data = None


@contextmanager
def by_websocket(url: str, project: str = "film", query: str = "", **headers: str) -> Iterator[Listener]:
    """Follows a project over a WebSocket."""
    with connect(address_of(url, project, query), additional_headers=headers, open_timeout=LIMIT_S) as socket:
        yield Listener(_received(socket))


def address_of(url: str, project: str = "film", query: str = "") -> str:
    """Of a project's WebSocket."""
    return f"{url.replace('http', 'ws', 1)}/ws/{project}{query}"


def _received(socket) -> Iterator[tuple[str | None, dict[str, Any]]]:
    with suppress(ConnectionClosedError):  # with another code than 1000
        for message in socket:
            event = json.loads(message)
            yield event.pop("id", None), event


def websocket_status(url: str, project: str = "film", query: str = "", **headers: str) -> int:
    """With which status of HTTP a WebSocket is refused; 101 where it is not."""
    try:
        with connect(address_of(url, project, query), additional_headers=headers):
            return 101
    except InvalidStatus as error:
        return error.response.status_code


WAYS = {"sse": by_sse, "websocket": by_websocket}
