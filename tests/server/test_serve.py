"""The server as a task: it starts ready, stops in order, and is never open to strangers by accident."""

import json
import signal
import socket
import threading

import anyio
import httpx
import pytest

from inference.errors import SettingsError
from inference.server import listening
from inference.server.serve import serve
from tests.server.harness import KEY, config, jpeg, running_server


def test_it_is_ready_when_it_says_so(tmp_path):
    """On a port of its own, over real sockets."""
    with running_server(config(tmp_path)) as url:
        assert httpx.get(f"{url}/healthz").json()["success"]
        assert httpx.get(f"{url}/api/tasks").status_code == 401
        assert httpx.get(f"{url}/docs").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_it_keeps_what_it_has(tmp_path):
    """A server that is started again knows the tasks of the one before."""
    for expected in (1, 2):
        with running_server(config(tmp_path)) as url:
            headers = {"authorization": f"Worker {KEY}"}
            httpx.post(f"{url}/api/tasks", files={"photo": ("a.jpg", jpeg(), "image/jpeg")}, headers=headers)
            tasks = httpx.get(f"{url}/api/tasks", headers=headers).json()["data"]["items"]
            assert len(tasks) == expected


def test_signals_are_left_to_the_program(tmp_path):
    """The command line decides what SIGTERM means."""

    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def run():
        before = handlers()
        async with anyio.create_task_group() as tasks:
            await tasks.start(serve, config(tmp_path), "127.0.0.1", 0)
            assert handlers() == before
            tasks.cancel_scope.cancel()

    assert threading.current_thread() is threading.main_thread()  # elsewhere uvicorn would not touch them anyway
    anyio.run(run)


def test_a_stop_is_bounded(tmp_path, monkeypatch, caplog):
    """A client that never finishes its request does not keep the server; it is told to come again, and no bug is."""
    monkeypatch.setattr(listening, "GRACE_S", 0.2)
    with running_server(config(tmp_path)) as url:
        host, port = url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)))
        connection.sendall(
            f"POST /api/worker/next-task HTTP/1.1\r\nHost: {host}\r\nAuthorization: Worker {KEY}\r\n"
            "Content-Length: 100\r\n\r\n{".encode()
        )
        httpx.get(f"{url}/healthz")  # by then the request has begun
    with connection, connection.makefile("rb") as answer:
        status, _, rest = answer.read().partition(b"\r\n")
    assert status == b"HTTP/1.1 503 Service Unavailable"
    assert json.loads(rest.partition(b"\r\n\r\n")[2])["success"] is False
    assert not [record for record in caplog.records if record.exc_info]


def test_without_a_key_it_stays_on_loopback(tmp_path):
    """Anything else is refused, and the error names the setting."""
    with pytest.raises(SettingsError, match="WORKER_API_KEY"):
        anyio.run(serve, config(tmp_path, api_key=None), "0.0.0.0", 0)
    with running_server(config(tmp_path, api_key=None)) as url:
        assert httpx.get(f"{url}/api/tasks").status_code == 200


def test_a_port_that_is_taken_is_told(tmp_path):
    """As a setting to correct, not as a traceback of uvicorn."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1, port {port}"):
            anyio.run(serve, config(tmp_path), "127.0.0.1", port)


def test_an_answer_in_two_pieces_is_sent_at_once():
    """Otherwise the second waits until the client has acknowledged the first, which clients delay by 40 ms."""
    with listening.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
