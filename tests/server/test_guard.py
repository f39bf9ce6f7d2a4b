"""Who gets in with a session, or with a token for one project; and that no page of another site does."""

from base64 import urlsafe_b64encode
from itertools import count

import pytest

from inference.progress.web.access import Access
from inference.server.guard import Guard
from inference.server.sessions import COOKIE, LIFETIME_S, Sessions
from tests.server.harness import KEY, config

SECRET = "secret"  # of `config`
HOST = "queue.example:8000"
OWN = {"origin": f"http://{HOST}"}
FOREIGN = {"origin": "http://evil.example"}


async def answer_to(folder, path, headers=(), *, method="GET", kind="http", query="", **fields):
    """The status with which the guard refuses a request, and the answer's headers; 200 where it lets it in."""
    sent = []

    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": kind,
        "method": method,
        "scheme": "http",
        "path": path,
        "query_string": query.encode(),
        "headers": [
            (name.encode(), value.encode("utf-8", "surrogateescape"))
            for name, value in ({"host": HOST} | dict(headers)).items()
        ],
    }
    await Guard(app, config(folder, **fields))(scope, receive, send)
    if sent[0]["type"] == "websocket.close":
        return 403, {}
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def cookie(key=KEY, secret=SECRET, clock=lambda: 1e12):
    """A header with a session, by default one that has not ended yet."""
    return {"cookie": f"a=b; {COOKIE}={Sessions(secret, key, clock).open()}"}


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/api/tasks", "/", "/page/list", "/events/queue", "/nowhere", "/page/staticfile"])
async def test_a_session_opens_what_the_key_opens(tmp_path, path):
    """Every path but the open ones; without either, nothing is told."""
    assert (await answer_to(tmp_path, path, cookie()))[0] == 200
    assert (await answer_to(tmp_path, path))[0] in {401, 303}
    assert (await answer_to(tmp_path, path, kind="websocket"))[0] == 403
    assert (await answer_to(tmp_path, path, {"authorization": f"Bearer {KEY}"}))[0] == 200


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/sign-in", "/page/static/page.js", "/healthz", "/docs", "/docs/ui/x.css"])
async def test_what_a_browser_needs_for_signing_in_is_open(tmp_path, path):
    """And what was open before."""
    assert (await answer_to(tmp_path, path))[0] == 200


@pytest.mark.anyio
@pytest.mark.parametrize("path, place", [("/", "sign-in"), ("/page/a", "../sign-in"), ("/page/a/b", "../../sign-in")])
async def test_a_page_without_a_session_leads_to_the_sign_in(tmp_path, path, place):
    """By a relative address, since a proxy may have put the server under a path; only where a page is asked for."""
    status, headers = await answer_to(tmp_path, path)
    assert (status, headers["location"], headers["cache-control"]) == (303, place, "no-store")
    assert (await answer_to(tmp_path, path, OWN, method="POST"))[0] == 401


@pytest.mark.anyio
@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        ".",
        "999999999999.",
        f"999999999999.{urlsafe_b64encode(bytes(32)).decode().rstrip('=')}",
        "\udcff\udcfe",
        "9" * 100_000,
        Sessions(SECRET, KEY, lambda: 1e12).open() + "A",
        Sessions(SECRET, KEY, lambda: 1e12).open().replace("1", "2", 1),
        Sessions(SECRET, "the key of before", lambda: 1e12).open(),
        Sessions("another secret", KEY, lambda: 1e12).open(),
        Sessions(SECRET, KEY, lambda: 1000.0).open(),
        Access(KEY, SECRET, lambda: 1e12).sign(""),
    ],
    ids=count(),
)
async def test_a_forged_or_an_old_session_is_none(tmp_path, value):
    """Also one of an earlier key, of another secret, and a token for listeners in its place."""
    assert (await answer_to(tmp_path, "/api/tasks", {"cookie": f"{COOKIE}={value}"}))[0] == 401


def test_a_session_ends():
    """After thirty days, to the second."""
    value = Sessions(SECRET, KEY, lambda: 1000.0).open()
    assert Sessions(SECRET, KEY, lambda: 1000.0 + LIFETIME_S - 1).holds(value)
    assert not Sessions(SECRET, KEY, lambda: 1000.0 + LIFETIME_S).holds(value)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "method, kind, headers, status",
    [
        ("POST", "http", OWN, 200),
        ("POST", "http", {"sec-fetch-site": "same-origin"}, 200),
        # A proxy that passes another Host on: what the browser says of itself counts.
        ("POST", "http", {"sec-fetch-site": "same-origin", "origin": "https://outside.example"}, 200),
        ("POST", "http", {"origin": "https://public.example"}, 200),
        ("POST", "http", {}, 403),
        ("POST", "http", FOREIGN, 403),
        ("POST", "http", {"origin": "null"}, 403),
        ("POST", "http", {"origin": "null", "host": ""}, 403),
        ("POST", "http", {"origin": "http://queue.example:9000", "sec-fetch-site": "same-site"}, 403),
        ("DELETE", "http", {"sec-fetch-site": "cross-site"}, 403),
        ("GET", "http", {}, 200),
        ("GET", "http", {"sec-fetch-site": "none"}, 200),
        ("GET", "http", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ("GET", "http", {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ("GET", "http", FOREIGN, 403),
        ("GET", "websocket", OWN, 200),
        ("GET", "websocket", {}, 403),
        ("GET", "websocket", FOREIGN, 403),
    ],
)
async def test_a_cookie_counts_only_where_our_own_page_asks(tmp_path, method, kind, headers, status):
    """A browser sends cookies whoever makes it ask; what a program sends with the key is never forged."""
    asked = {"path": "/api/tasks", "method": method, "kind": kind, "public_url": "https://public.example"}
    assert (await answer_to(tmp_path, headers=cookie() | headers, **asked))[0] == status
    assert (await answer_to(tmp_path, headers=headers | {"authorization": f"Worker {KEY}"}, **asked))[0] == 200


@pytest.mark.anyio
async def test_nobody_signs_others_in_or_out(tmp_path):
    """A form on another site's page may not be sent here."""
    for path in ("/sign-in", "/sign-out"):
        assert (await answer_to(tmp_path, path, OWN, method="POST"))[0] == 200
        assert (await answer_to(tmp_path, path, FOREIGN, method="POST"))[0] == 403


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_a_token_opens_one_stream_and_nothing_else(tmp_path, kind):
    """To whoever has it, on a page of any site; not another project's stream, nor the API."""
    query = f"token={Access(KEY, SECRET).sign('film')}"
    for path in ("/events/film", "/ws/film"):
        assert (await answer_to(tmp_path, path, FOREIGN, kind=kind, query=query))[0] == 200
    for path in ("/events/films", "/events/", "/api/tasks", "/", "/page/events/film", "/events/film/.."):
        assert (await answer_to(tmp_path, path, kind=kind, query=query))[0] in {401, 303, 403}
    # A wrong token beside a session: the page is signed in.
    assert (await answer_to(tmp_path, "/ws/film", cookie() | OWN, kind=kind, query="token=x"))[0] == 200


@pytest.mark.anyio
async def test_without_a_key_a_forged_request_is_refused_as_ever(tmp_path):
    """No session is asked for, and none is of use."""
    here = {"host": "127.0.0.1:8000"}
    assert (await answer_to(tmp_path, "/", here, api_key=None))[0] == 200
    assert (await answer_to(tmp_path, "/", here | FOREIGN | cookie(), api_key=None))[0] == 403
    assert (await answer_to(tmp_path, "/events/queue", cookie(), api_key=None))[0] == 403
