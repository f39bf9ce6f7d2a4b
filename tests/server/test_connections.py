"""Clients that owe the server something: how long they are waited for, and that they keep nobody else out."""

import json
import resource
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import httpx
import pytest
from anyio.from_thread import start_blocking_portal
from starlette.applications import Starlette
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect as websocket

from inference.server.answers import failure
from inference.server.connections import Patience
from inference.server.listening import listen, serve_app
from tests.server.harness import KEY, config, jpeg, running_server
from tests.support.processes import I2V, environment

HALF = b"POST /api/worker/next-task HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Part: "
"""A request whose header does not end."""

BODY = HALF + f"\r\nAuthorization: Worker {KEY}\r\nContent-Length: 100\r\n\r\n{{".encode()
"""A whole header, and one byte of a hundred."""

SOON = Patience(header_s=0.3, stalled_s=0.3)


def connect(url):
    """A connection to the server, without a word."""
    parsed = httpx.URL(url)
    return socket.create_connection((parsed.host, parsed.port), timeout=10)


def ends_within(connection, limit_s):
    """Whether the server ends the connection, unasked."""
    connection.settimeout(limit_s)
    try:
        return connection.recv(65_536) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


def is_answered(connection):
    """Whether a whole request gets its answer."""
    connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}}"):
        chunk = connection.recv(65_536)
        assert chunk
        answer += chunk
    return answer.startswith(b"HTTP/1.1 200")


@contextmanager
def serving(folder, files):
    """`i2v serve` as a process that may have so many files open; its URL, and what it logs."""
    room = f'ulimit -n {files}; exec "$0" serve'
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            ["bash", "-c", room, I2V], cwd=folder, env=environment(I2V_PORT=0, WORKER_API_KEY=KEY), stderr=stderr
        )
    try:
        until = time.monotonic() + 20
        while "the queue is open" not in log.read_text():
            assert process.poll() is None
            assert time.monotonic() < until
            threading.Event().wait(0.02)
        [port] = [line["port"] for line in map(json.loads, log.read_text().splitlines()) if "port" in line]
        yield f"http://127.0.0.1:{port}", log
    finally:
        process.terminate()
        process.wait(20)


def test_a_thousand_half_requests_keep_nobody_out(tmp_path):
    """More than the server may have open: whole requests are answered beside them, and the log stays short."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(most, 4096), most))
    with serving(tmp_path, files=1024) as (url, log), ExitStack() as stack:
        for number in range(1100):
            connection = stack.enter_context(connect(url))
            connection.sendall(HALF)
            if number % 275 == 274:
                answer = httpx.get(f"{url}/api/tasks", headers={"authorization": f"Worker {KEY}"}, timeout=5)
                assert answer.json()["success"]
        said = log.read_text()
    assert "Traceback" not in said
    assert len(said) < 10_000


def test_a_header_has_to_come_in_time(tmp_path):
    """Also one that drips in byte by byte; and a connection that says nothing at all."""
    with running_server(config(tmp_path), patience=SOON) as url, connect(url) as silent, connect(url) as dripping:
        dripping.sendall(HALF)
        began = time.monotonic()
        with pytest.raises(OSError, match=r"reset|Broken pipe"):  # noqa: PT012 - whichever byte it is
            while time.monotonic() < began + 5:
                dripping.sendall(b"x")
                threading.Event().wait(0.02)
        assert 0.2 < time.monotonic() - began < 3
        assert ends_within(silent, 3)


def test_a_body_may_take_its_time_but_not_stand_still(tmp_path):
    """Longer than the limit in pieces is fine; a client that stops is let go."""
    with running_server(config(tmp_path), patience=SOON) as url, connect(url) as stuck:
        stuck.sendall(BODY)

        def slowly():
            for byte in b'{"worker_id": "w"}':
                threading.Event().wait(0.05)
                yield bytes([byte])

        headers = {"authorization": f"Worker {KEY}"}
        answer = httpx.post(f"{url}/api/worker/next-task", content=slowly(), headers=headers)
        assert answer.json() == {"success": True, "data": None}
        assert ends_within(stuck, 3)


def test_an_answer_that_is_not_read_is_let_go_and_a_slow_reader_is_not(tmp_path):
    """The same 6 MB for both: one takes nothing of it, the other a little at a time."""
    with running_server(config(tmp_path), patience=SOON) as url:
        headers = {"authorization": f"Worker {KEY}"}
        with httpx.Client(base_url=url, headers=headers) as client:
            client.post("/api/tasks", files={"photo": ("a.jpg", jpeg(), "image/jpeg")})
            item_id = client.post("/api/worker/next-task", json={"worker_id": "w"}).json()["data"]["item_id"]
            asked = {"operation": "upload", "video_item_id": item_id}
            signed = client.post("/api/worker/presign", json=asked).json()["data"]
            client.put(signed["url"], content=bytes(6_000_000), headers={"content-type": "video/mp4"})
            asked = {"operation": "download", "storage_path": signed["storage_path"]}
            signed = client.post("/api/worker/presign", json=asked).json()["data"]
        path = httpx.URL(signed["url"]).raw_path.decode()
        request = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()

        with connect(url) as deaf, connect(url) as slow:
            for connection in (deaf, slow):
                connection.sendall(request)
            received = 0
            while received < 6_000_000:
                threading.Event().wait(0.01)
                chunk = slow.recv(65_536)
                assert chunk
                received += len(chunk)
            assert sum(map(len, iter(partial(deaf.recv, 65_536), b""))) < 6_000_000


def test_who_has_owed_for_longest_makes_room(tmp_path):
    """Not the newest, and not one that is being answered."""
    with running_server(config(tmp_path), patience=Patience(connections=3)) as url, ExitStack() as stack:
        oldest, second, third, fourth = (stack.enter_context(connect(url)) for _ in range(4))
        assert ends_within(oldest, 5)
        assert is_answered(third)
        fifth = stack.enter_context(connect(url))
        assert ends_within(second, 5)
        assert all(map(is_answered, (third, fourth, fifth)))


@pytest.mark.parametrize(
    "asks, path, status",
    [
        ({}, "/ws/queue", 403),
        ({}, "/nowhere", 403),
        ({"sec-websocket-key": "a"}, "/ws/queue", 400),
        ({}, f"/ws/{'x' * 20_000}", None),  # longer than a line may be
        ({"upgrade": "h2c"}, "/api/tasks", 401),
    ],
)
def test_a_websocket_that_is_refused_is_no_news(tmp_path, caplog, asks, path, status):
    """Anybody may ask for one, without the key: the connection ends, and the log does not grow."""
    asks = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA==",
    } | asks
    with running_server(config(tmp_path), patience=SOON) as url:
        if status is None:
            with pytest.raises(httpx.RemoteProtocolError):
                httpx.get(f"{url}{path}", headers=asks)
        else:
            assert httpx.get(f"{url}{path}", headers=asks).status_code == status
    assert not [record for record in caplog.records if record.levelname not in {"DEBUG", "INFO"}]


def test_listeners_leave_room_for_everybody_else(tmp_path):
    """However many follow events: workers and people still get answers."""
    with running_server(config(tmp_path), patience=Patience(connections=8)) as url, ExitStack() as stack:
        address = url.replace("http", "ws", 1) + "/ws/queue"
        key = {"authorization": f"Worker {KEY}"}
        for _ in range(6):
            stack.enter_context(websocket(address, additional_headers=key))
        with pytest.raises(InvalidStatus):
            websocket(address, additional_headers=key)
        assert httpx.get(f"{url}/events/queue", headers=key).status_code == 503
        assert httpx.get(f"{url}/api/tasks", headers=key).status_code == 200


def test_a_websocket_stays_where_it_is_read(tmp_path):
    """It owes nothing: no limit of a request ends it, and it makes no room for others."""
    patience = Patience(header_s=0.1, stalled_s=0.1, listener_s=0.1, connections=2)
    key = {"authorization": f"Worker {KEY}"}
    with running_server(config(tmp_path), patience=patience) as url, ExitStack() as stack:
        address = url.replace("http", "ws", 1) + "/ws/queue"
        talk = stack.enter_context(websocket(address, additional_headers=key))
        assert httpx.get(f"{url}/api/tasks", headers=key).status_code == 200
        silent = [stack.enter_context(connect(url)) for _ in range(3)]
        assert all(ends_within(connection, 5) for connection in silent)
        talk.ping().wait(5)
        httpx.post(f"{url}/api/tasks", files={"photo": ("a.jpg", jpeg(), "image/jpeg")}, headers=key)
        assert json.loads(talk.recv(5))["status"] == "pending"


def test_a_websocket_that_is_not_read_is_let_go():
    """The application that sends is told that its client has left, and waits no longer."""
    ended = threading.Event()

    async def endless(scope, receive, send):
        if scope["type"] == "lifespan":
            await Starlette()(scope, receive, send)
            return
        await receive()
        await send({"type": "websocket.accept"})
        with suppress(OSError):
            while True:
                await send({"type": "websocket.send", "bytes": bytes(50_000)})
        ended.set()

    async def serve(*, task_status):
        with listen("127.0.0.1", 0) as listener:
            options = {"stopping": failure(503, "stopping"), "patience": Patience(listener_s=0.3)}
            await serve_app(endless, listener, task_status=task_status, **options)

    with start_blocking_portal() as portal:
        stopped, (host, port) = portal.start_task(serve)
        with connect(f"http://{host}:{port}") as deaf:
            deaf.sendall(
                b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
            )
            assert ended.wait(5)
        stopped.cancel()
