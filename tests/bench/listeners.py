"""How soon listeners hear of progress: `python -m tests.bench.listeners`.

500 listeners, half over WebSocket and half over server-sent events, follow 20 projects in which something happens twice
a second, on a server that is a process of its own; one more of each kind never reads. With the hub in memory, with one
in a real Redis to which another process publishes, and beside them a broadcaster such as one writes first (`Peer`),
under the same load. The listeners are one process that takes the time when bytes arrive. Prints a line for each and
writes results/listeners.json.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from inference.process import settle
from inference.progress.events import ProgressEvent, as_json
from inference.progress.hub import KEPT, MemoryHub, ProgressHub
from inference.progress.redis import RedisHub
from inference.progress.web.app import progress_app
from inference.server.listening import listen, serve_app
from tests.support.redis_server import redis_server

RESULTS = Path(__file__).parent / "results" / "listeners.json"
LISTENERS, PROJECTS, WARM_UP_S = 500, 20, 3.0
PACE_S = 0.5
"""Between two events of a project. The hubs hold nothing back here: what they would, on purpose, is not a delay of the
transport."""

FILLING = KEPT * PROJECTS
"""Events with which the hubs are filled before anything is measured."""

TARGET_P99_MS = 250

SENT = re.compile(rb'"sent_at":([0-9.]+)[,}]')


class Listener(asyncio.Protocol):
    """Follows one project and notes how late each event is. One that is `deaf` never reads what it asked for."""

    def __init__(self, kind: str, project: str, late_ms: list[float], *, deaf: bool = False) -> None:
        self._kind, self._project, self._late_ms, self._deaf = kind, project, late_ms, deaf
        self._rest = b""
        self.is_over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asks for the stream."""
        upgrade = "Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        upgrade += "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
        path, more = ("ws", upgrade) if self._kind == "websocket" else ("events", "")
        self.transport = transport
        transport.write(f"GET /{path}/{self._project} HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}\r\n".encode())
        if self._deaf:
            transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        """Each event has the time at which it was published."""
        now = time.time()
        if (ping := data.find(b"\x89\x04")) >= 0 and self._kind == "websocket":  # its payload has four bytes
            self.transport.write(b"\x8a\x84\0\0\0\0" + data[ping + 2 : ping + 6])
        data = self._rest + data
        end = 0
        for found in SENT.finditer(data):
            self._late_ms.append((now - float(found[1])) * 1000)
            end = found.end()
        self._rest = data[max(end, len(data) - 200) :]

    def connection_lost(self, _error: Exception | None) -> None:
        """A listener that is sent away is a failure of the run."""
        self.is_over = True


class Peer:
    """A broadcaster in twenty lines: a queue for each listener, and JSON made for each of them."""

    def __init__(self) -> None:
        self.queues: dict[str, set[asyncio.Queue]] = {}

    def publish(self, event: ProgressEvent) -> None:
        """To all who listen now."""
        for queue in self.queues.get(event.project_id, ()):
            queue.put_nowait(event)

    async def _events(self, project: str) -> AsyncIterator[ProgressEvent]:
        queue: asyncio.Queue = asyncio.Queue()
        self.queues.setdefault(project, set()).add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self.queues[project].discard(queue)

    async def _sse(self, request: Any) -> StreamingResponse:
        events = self._events(request.path_params["project"])
        return StreamingResponse((f"data: {as_json(it)}\n\n" async for it in events), media_type="text/event-stream")

    async def _websocket(self, websocket: Any) -> None:
        await websocket.accept()
        async for event in self._events(websocket.path_params["project"]):
            await websocket.send_text(as_json(event))

    def app(self) -> Starlette:
        """Under the same paths."""
        return Starlette(
            routes=[Route("/events/{project}", self._sse), WebSocketRoute("/ws/{project}", self._websocket)]
        )


async def publish(hub: Any) -> None:
    """Something happens in each project, twice a second, at a time of its own.

    At first, quickly, as much as a hub keeps of a project: only then its memory is as large as it gets.
    """
    number, began = -FILLING, 0.0
    while True:
        if number < 0:
            await anyio.sleep(0.005 if number % PROJECTS == 0 else 0)
        else:
            began = began or time.monotonic()
            await anyio.sleep(max(0.0, began + number * PACE_S / PROJECTS - time.monotonic()))
        share = (number + FILLING) / 1e7
        metadata = {"stage": "denoise", "lease": 1, "eta_s": 42, "photo_id": "0" * 32, "sent_at": time.time()}
        hub.publish(
            ProgressEvent(
                project_id=f"p{number % PROJECTS}",
                task_name="0" * 32,
                progress=share,
                progress_percent=int(share * 100),
                status="processing",
                message="denoise",
                metadata=metadata,
            )
        )
        number += 1


async def publish_when_told(hub: Any) -> None:
    """Begins when this process gets SIGUSR1."""
    with anyio.open_signal_receiver(signal.SIGUSR1) as told:
        async for _ in told:
            break
    await publish(hub)


async def serve(kind: str, port: int, redis_url: str) -> None:
    """The process of the server. With Redis, what it serves is published elsewhere."""
    settle()  # as `i2v serve` does
    if kind == "peer":
        peer = Peer()
        # On the same event loop and parser as ours, where faster ones are installed, too.
        options = {"loop": "asyncio", "http": "h11", "ws": "websockets-sansio", "ws_per_message_deflate": False}
        config = uvicorn.Config(peer.app(), port=port, log_level="critical", access_log=False, **options)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish_when_told, peer)
            await uvicorn.Server(config).serve()
    hub: ProgressHub = RedisHub(redis_url, interval_s=0) if kind == "redis" else MemoryHub(interval_s=0)
    async with anyio.create_task_group() as tasks:
        if kind == "memory":
            tasks.start_soon(publish_when_told, hub)
        stopping = PlainTextResponse("", 503)
        await serve_app(progress_app(hub), listen("127.0.0.1", port), stopping=stopping, closing=hub.close)


def usage(pid: int) -> tuple[float, float]:
    """MiB in memory, and seconds of CPU, of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, sum(map(int, ticks)) / 100


async def follow(port: int, pid: int, seconds: float, go: Callable[[], None]) -> dict[str, Any]:
    """All listeners, for so long. `go` makes something happen."""
    loop = asyncio.get_running_loop()
    late: dict[str, list[float]] = {"websocket": [], "sse": []}

    async def begin(number: int, *, deaf: bool) -> Listener:
        kind = ("websocket", "sse")[number % 2]
        made = Listener(kind, f"p{number // 2 % PROJECTS}", [] if deaf else late[kind], deaf=deaf)
        _, protocol = await loop.create_connection(lambda: made, "127.0.0.1", port)
        return protocol

    # One of each project, now of one kind and then of the other.
    all_of_them = [await begin(2 * number + number % 2, deaf=False) for number in range(PROJECTS)]
    await asyncio.sleep(1)  # until all of them are followed
    go()
    while sum(map(len, late.values())) < FILLING:
        await asyncio.sleep(0.1)
        assert not any(listener.is_over for listener in all_of_them)
    deaf = [await begin(number, deaf=True) for number in range(2)]
    all_of_them += [await begin(number, deaf=False) for number in range(len(all_of_them), LISTENERS)]
    await asyncio.sleep(WARM_UP_S)
    for times in late.values():
        times.clear()
    began_mib, began_cpu_s = usage(pid)
    await asyncio.sleep(seconds)
    ended_mib, ended_cpu_s = usage(pid)
    heard = sorted(late["websocket"] + late["sse"])
    expected = LISTENERS * seconds / PACE_S
    lost = sum(listener.is_over for listener in all_of_them)
    for listener in [*deaf, *all_of_them]:
        listener.transport.abort()
    return {
        "p50_ms": round(statistics.median(heard), 2),
        "p99_ms": round(heard[int(len(heard) * 0.99)], 2),
        "worst_ms": round(heard[-1], 1),
        "websocket_p99_ms": round(sorted(late["websocket"])[int(len(late["websocket"]) * 0.99)], 2),
        "sse_p99_ms": round(sorted(late["sse"])[int(len(late["sse"]) * 0.99)], 2),
        "heard_of_expected": round(len(heard) / expected, 3),
        "listeners_lost": lost,
        "server_cpu_share": round((ended_cpu_s - began_cpu_s) / seconds, 3),
        "server_mib_at_begin": round(began_mib, 1),
        "server_mib_at_end": round(ended_mib, 1),
    }


@asynccontextmanager
async def server_of(kind: str, redis_url: str) -> AsyncIterator[tuple[int, int]]:
    """Its port and its process."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tests.bench.listeners", "--serve", kind, "--port", str(port), "--redis", redis_url]
    process = subprocess.Popen(words)  # noqa: ASYNC220 - at once
    try:
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                break
            except OSError:
                await asyncio.sleep(0.1)
        yield port, process.pid
    finally:
        process.kill()
        process.wait()


async def measure(kind: str, seconds: float, redis_url: str) -> dict[str, Any]:
    """One kind of server under the load."""
    elsewhere: list[subprocess.Popen] = []

    def go() -> None:
        if kind == "redis":
            words = [sys.executable, "-m", "tests.bench.listeners", "--publish", "--redis", redis_url]
            elsewhere.append(subprocess.Popen(words))
        else:
            os.kill(pid, signal.SIGUSR1)

    try:
        async with server_of(kind, redis_url) as (port, pid):
            return await follow(port, pid, seconds, go)
    finally:
        for process in elsewhere:
            process.kill()
            process.wait()


def main() -> None:
    """Serves, publishes, or measures all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--publish", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--redis", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve, given.port, given.redis))
        return
    if given.publish:
        asyncio.run(publish(RedisHub(given.redis, in_background=True, interval_s=0)))
        return
    results = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(redis_server(folder))
        for kind in ("memory", "redis", "peer"):
            results[kind] = asyncio.run(measure(kind, given.seconds, redis.url))
            print(kind, json.dumps(results[kind]))
    p99 = max(results[kind]["p99_ms"] for kind in ("memory", "redis"))
    print(f"p99 {p99} ms, target {TARGET_P99_MS} ms; peer's p99 {results['peer']['p99_ms']} ms")
    machine = {"processor": platform.machine(), "python": platform.python_version()}
    RESULTS.write_text(json.dumps({"machine": machine, "seconds": given.seconds, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
