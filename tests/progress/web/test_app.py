"""Listeners over WebSocket and server-sent events hear the same, from where they were."""

import socket
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial
from urllib.parse import quote, urlencode

import anyio
import httpx
import pytest
from fastapi import FastAPI
from starlette.requests import HTTPConnection
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from inference.progress.events import CompletionEvent, ErrorEvent
from inference.progress.hub import MemoryHub
from inference.progress.web import sse
from inference.progress.web.app import progress_app
from inference.progress.web.follow import Bounds, last_seen
from inference.server.connections import Patience
from tests.progress.web.harness import LIMIT_S, WAYS, address_of, by_sse, by_websocket, serving, step, websocket_status


@pytest.fixture
def hub():
    """A hub that holds no event back."""
    return MemoryHub(interval_s=0)


@pytest.fixture
def url(hub):
    """Where it is served."""
    with serving(progress_app(hub), hub) as base:
        yield base


way = pytest.mark.parametrize("follow", WAYS.values(), ids=WAYS)


def until(is_so, limit_s=LIMIT_S):
    """Waits for something that another thread does."""
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end
        threading.Event().wait(0.005)


def listeners(hub, project="film"):
    """How many follow a project."""
    stream = hub._streams.get(project)
    return len(stream.listeners) if stream else 0


def test_the_same_events_on_both(hub, url):
    """In order, each with the id that the hub gave it, and in JSON the same."""
    with by_sse(url) as one, by_websocket(url) as other:
        until(lambda: listeners(hub) == 2)
        hub.publish(step("a", 10, stage="load 사진"))
        hub.publish(ErrorEvent(project_id="film", task_name="b", error="no\r\ndata: {}\n\nphoto\u2028"))
        hub.publish(CompletionEvent(project_id="film", task_name="a", result={"url": "x"}))
        heard = [one.next() for _ in range(3)]
        assert heard == [other.next() for _ in range(3)]
    assert [event["type"] for _, event in heard] == ["progress", "error", "completion"]
    assert heard[1][1]["error"] == "no\r\ndata: {}\n\nphoto\u2028"
    assert heard == sorted(heard, key=lambda pair: [int(part) for part in pair[0].split("-")])


@way
def test_who_comes_late_gets_the_newest_of_each_task_first(hub, url, follow):
    """Then what happens; and nothing of another project."""
    for event in (step("a", 10), step("b", 5), step("a", 20), step("x", 1, project="other")):
        hub.publish(event)
    with follow(url) as listener:
        assert listener.percents(2) == [("b", 5), ("a", 20)]
        hub.publish(step("b", 6))
        assert listener.percents(1) == [("b", 6)]


@way
def test_who_comes_back_gets_what_it_missed_once(hub, url, follow):
    """After the id that it names: no snapshot, nothing twice."""
    with follow(url) as listener:
        until(lambda: listeners(hub) == 1)
        for percent in (1, 2):
            hub.publish(step("a", percent))
        seen = [listener.next()[0] for _ in range(2)]
    for percent in (3, 4):
        hub.publish(step("a", percent))
    with follow(url, query=f"?after={seen[-1]}") as listener:
        assert listener.percents(2) == [("a", 3), ("a", 4)]
        hub.publish(step("a", 5))
        assert listener.percents(1) == [("a", 5)]
    with follow(url, query="?after=0-0") as listener:
        assert listener.percents(5) == [("a", percent) for percent in range(1, 6)]


def test_what_an_event_source_says_itself_counts_more_than_its_address(hub, url):
    """It repeats its address when it connects again, with the header beside it."""
    for percent in (1, 2, 3):
        hub.publish(step("a", percent))
    with by_sse(url, query="?after=0-0") as listener:
        ids = [listener.next()[0] for _ in range(3)]
    with by_sse(url, query="?after=0-0", Last_Event_ID=ids[1]) as listener:
        assert listener.percents(1) == [("a", 3)]


@way
@pytest.mark.parametrize("given", ["5-0", "x", "-", "1", "99999999999999999999-0", "1-1%0aid:%207", "9" * 5000, "%00"])
def test_an_id_that_nobody_knows_gets_the_snapshot(hub, url, follow, given):
    """Whatever it is."""
    for percent in (1, 2):
        hub.publish(step("a", percent))
    with follow(url, query=f"?after={given}") as listener:
        assert listener.percents(1) == [("a", 2)]


@pytest.mark.parametrize(
    "given, expected",
    [
        ("1764000000000-12", "1764000000000-12"),
        ("0-0", "0-0"),
        ("99999999999999999999-0", None),
        ("1-1\n", None),
        ("1", None),
        ("$", None),
        ("٣-٣", None),
    ],
)
def test_only_what_can_be_an_id_reaches_a_hub(given, expected):
    """Redis refuses other ids, and knows some with a meaning."""
    scope = {"type": "http", "headers": [], "query_string": urlencode({"after": given}).encode()}
    assert last_seen(HTTPConnection(scope)) == expected


@way
def test_an_application_knows_more_than_the_hub(hub, follow):
    """Its snapshot comes first, once; who has all of it can go on from there."""

    async def rows(project_id):
        return [step("old", 99, project=project_id), step("a", 20, project=project_id)]

    hub.publish(step("a", 10))
    with serving(progress_app(hub, snapshot=rows), hub) as url:
        with follow(url) as listener:
            (first, old), (second, new) = listener.next(), listener.next()
            hub.publish(step("a", 30))
            assert listener.percents(1) == [("a", 30)]
        assert (old["task_name"], new["progress_percent"], first) == ("old", 20, None)
        with follow(url, query=f"?after={second}") as listener:
            assert listener.percents(1) == [("a", 30)]


@way
def test_a_snapshot_that_fails_is_a_line_in_the_log(hub, follow, capsys):
    """And the hub's own is told instead."""

    async def rows(_project_id):
        raise OSError("no database")

    hub.publish(step("a", 10))
    with serving(progress_app(hub, snapshot=rows), hub) as url, follow(url) as listener:
        assert listener.percents(1) == [("a", 10)]
    assert "no database" in capsys.readouterr().out


def test_a_hub_that_closes_ends_every_stream(hub, url):
    """In order: a browser comes again, and a WebSocket is told that this is a restart."""
    with by_sse(url) as listener, connect(address_of(url)) as talk:
        until(lambda: listeners(hub) == 2)
        hub.close()
        assert listener.has_ended()
        with pytest.raises(ConnectionClosed) as closed:
            talk.recv(LIMIT_S)
        assert closed.value.rcvd.code == 1012


class Frozen:
    """An application whose event loop can be held, so that its listeners fall behind."""

    def __init__(self, app, hub):
        self._app, self._hub = app, hub

    async def __call__(self, scope, receive, send):
        """As any ASGI application; `/burst` publishes more than may wait for a listener, without a pause."""
        if scope.get("path") == "/burst":
            for number in range(400):
                self._hub.publish(step(f"task {number}", 1))
        await self._app(scope, receive, send)


def test_a_listener_that_falls_behind_is_sent_away(hub):
    """With a code that says to come again; it then gets a snapshot."""
    with serving(Frozen(progress_app(hub), hub), hub) as url, by_sse(url) as listener, connect(address_of(url)) as talk:
        until(lambda: listeners(hub) == 2)
        httpx.get(f"{url}/burst")
        assert listener.has_ended()
        with pytest.raises(ConnectionClosed) as closed:
            talk.recv(LIMIT_S)
        assert closed.value.rcvd.code == 1013


def deaf(url, request):
    """A connection whose program has asked for a stream and reads none of it, with little room in the kernel."""
    parsed = httpx.URL(url)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
    connection.settimeout(LIMIT_S)
    connection.connect((parsed.host, parsed.port))
    connection.sendall(f"GET {request} HTTP/1.1\r\nHost: 127.0.0.1\r\n".encode())
    return connection


UPGRADE = b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: "
UPGRADE += b"AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"


def test_who_never_reads_is_let_go_and_does_no_harm(hub):
    """Over both; another listener hears everything meanwhile, and neither the hub nor the server waits."""
    big = "x" * 50_000
    bounds = Bounds(send_s=0.3)
    with ExitStack() as stack:
        url = stack.enter_context(serving(progress_app(hub, bounds=bounds), hub, patience=Patience(listener_s=1)))
        one, other = (stack.enter_context(deaf(url, path)) for path in ("/events/film", "/ws/film"))
        with by_websocket(url) as reader:
            one.sendall(b"Connection: close\r\n\r\n")
            other.sendall(UPGRADE)
            until(lambda: listeners(hub) == 3)
            for number in range(100):  # fewer than may wait in the hub, and more than the kernel buffers
                hub.publish(step("a", 1, number=number, big=big))
                assert reader.next()[1]["metadata"]["number"] == number
            until(lambda: listeners(hub) == 1)
            for connection in (one, other):
                with suppress(ConnectionResetError):
                    assert sum(map(len, iter(partial(connection.recv, 65_536), b""))) < 50 * len(big)


@way
def test_who_leaves_is_forgotten(hub, url, follow):
    """Without waiting for the next event."""
    with follow(url):
        until(lambda: listeners(hub) == 1)
    until(lambda: listeners(hub) == 0)


@way
def test_a_listener_stays_for_so_long_and_may_come_again(hub, follow):
    """Its permission is looked at again then."""
    with serving(progress_app(hub, bounds=Bounds(longest_s=0.1)), hub) as url:
        for _ in range(2):
            with follow(url) as listener:
                assert listener.has_ended()


def test_so_many_may_listen_and_no_more(hub):
    """Who leaves makes room."""
    with serving(progress_app(hub, bounds=Bounds(listeners=2)), hub) as url:
        with by_sse(url), by_websocket(url):
            until(lambda: listeners(hub) == 2)
            assert httpx.get(f"{url}/events/film").status_code == 503
        until(lambda: listeners(hub) == 0)
        with by_sse(url):
            until(lambda: listeners(hub) == 1)


@pytest.mark.anyio
async def test_many_who_come_at_once_are_no_more(hub):
    """An application may ask a database who they are, and all of them wait for it together."""
    come, gate = [], anyio.Event()

    async def access(_connection, project_id):
        come.append(project_id)
        if len(come) == 5:
            gate.set()
        await gate.wait()

    statuses = []

    async def listen(url):
        async with httpx.AsyncClient(timeout=LIMIT_S) as client, client.stream("GET", f"{url}/events/film") as response:
            statuses.append(response.status_code)
            if len(statuses) == 5:
                hub.close()
            await response.aread()

    with serving(progress_app(hub, access=access, bounds=Bounds(listeners=2)), hub) as url:
        async with anyio.create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(listen, url)
    assert sorted(statuses) == [200, 200, 503, 503, 503]


def test_a_silent_stream_says_that_it_lives(url, monkeypatch):
    """And how soon a browser is to come again."""
    monkeypatch.setattr(sse, "KEEPALIVE_S", 0.05)
    with httpx.stream("GET", f"{url}/events/film", timeout=LIMIT_S) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(6)] == ["retry: 2000", "", ":", "", ":", ""]
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["x-accel-buffering"] == "no"
        assert "access-control-allow-origin" not in response.headers
    assert httpx.head(f"{url}/events/film", timeout=LIMIT_S).headers["content-type"].startswith("text/event-stream")
    assert httpx.post(f"{url}/events/film").status_code == 405


def test_who_talks_too_much_is_closed(hub, url):
    """Many messages, or one long one; a little is ignored."""
    with connect(address_of(url)) as talk:
        for _ in range(50):
            talk.send("hello")
        until(lambda: listeners(hub) == 1)
        hub.publish(step("a", 1))
        assert '"progress_percent":1' in talk.recv(LIMIT_S)
    for messages, code in ((["x"] * 100, 1008), (["x" * 5000], 1009)):
        with connect(address_of(url)) as talk, pytest.raises(ConnectionClosed) as closed:  # noqa: PT012
            for message in messages:
                talk.send(message)
            list(talk)
        assert closed.value.rcvd.code == code


def test_a_stop_does_not_wait_for_streams(hub, caplog):
    """Open pages of both kinds, and one that does not read: all end at once, and nothing is an error."""
    server = serving(progress_app(hub), hub)
    url = server.__enter__()
    with ExitStack() as stack:
        pages = [stack.enter_context(by_sse(url)), stack.enter_context(by_websocket(url))]
        unread = stack.enter_context(deaf(url, "/events/film"))
        unread.sendall(b"\r\n")
        until(lambda: listeners(hub) == 3)
        began = time.monotonic()
        server.__exit__(None, None, None)
        assert time.monotonic() - began < 2
        assert all(page.has_ended() for page in pages)
    assert not [record for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}]


@pytest.mark.parametrize("prefix", ["", "/progress", "/a/b"])
def test_it_can_be_mounted_anywhere(hub, prefix):
    """Into an application of FastAPI, whose own routes stay."""
    app = FastAPI()

    @app.get("/hello")
    def hello():
        return "hello"

    app.mount(prefix, progress_app(hub))
    hub.publish(step("a", 10))
    with serving(app, hub) as url:
        for follow in WAYS.values():
            with follow(url + prefix) as listener:
                assert listener.percents(1) == [("a", 10)]
        assert httpx.get(f"{url}/hello").json() == "hello"


@way
@pytest.mark.parametrize("project", ["film 1", "영화", "a:b.c-d_e", "%", "x" * 200])
def test_a_project_may_be_called_anything_that_can_be_read(hub, url, follow, project):
    """In any script."""
    hub.publish(step("a", 10, project=project))
    with follow(url, project=quote(project)) as listener:
        assert listener.next()[1]["project_id"] == project


@pytest.mark.parametrize("project", ["x" * 201, "%00", "a%0d%0ab", "%1b[31m", "%e2%80%ae", "%ff%0a"])
def test_other_ids_are_refused_in_words(hub, url, project):
    """And make no stream in the hub."""
    answer = httpx.get(f"{url}/events/{project}")
    assert (answer.status_code, "project_id" in answer.json()["error"]) == (400, True)
    assert websocket_status(url, project) == 403
    assert not hub._streams


def test_an_endless_address_is_refused(hub, url):
    """Ten megabytes of it, for either kind of stream: the connection ends, and others are served."""
    for request in (b"GET /events/", b"GET /ws/"):
        parsed = httpx.URL(url)
        with socket.create_connection((parsed.host, parsed.port), LIMIT_S) as connection:
            with suppress(OSError):
                connection.sendall(request + b"x" * 10_000_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + UPGRADE)
            with suppress(ConnectionResetError):
                assert connection.recv(65_536)[:12] in {b"", b"HTTP/1.1 400"}
    assert not hub._streams
    assert httpx.head(f"{url}/events/film", timeout=LIMIT_S).status_code == 200
