"""Signing in with the key, and who is kept out."""

import socket
from contextlib import ExitStack

import httpx
import pytest

from inference.server.page.attempts import FREE_TRIES
from inference.server.sessions import COOKIE
from tests.server.harness import KEY, app_client, config, jpeg, running_server
from tests.server.page.site import Page

ORIGIN = "http://127.0.0.1:8000"
OWN = {"origin": ORIGIN}


@pytest.fixture
def browser(tmp_path):
    """A browser without a key, at a server that has one."""
    with app_client(config(tmp_path)) as client:
        yield client


def send(browser, key, **headers):
    """Sends the form, as the page itself would."""
    return browser.post("/sign-in", data={"key": key}, headers={"origin": ORIGIN} | headers)


def test_in_and_out(browser):
    """Whoever has no session is sent to the form; with the right key everything is there, until signing out."""
    for address, way in (("/", "sign-in"), ("/?status=failed", "sign-in"), ("/page/list", "../sign-in")):
        answer = browser.get(address)
        assert (answer.status_code, answer.headers["location"]) == (303, way)
    form = Page(browser.get("/sign-in").text)
    assert form.one("form")["action"] == "sign-in"
    field = form.one("input", id="key")
    assert (field["type"], field["autocomplete"]) == ("password", "current-password")

    answer = send(browser, f" {KEY} ")
    assert (answer.status_code, answer.headers["location"]) == (303, "./")
    cookie = answer.headers["set-cookie"].lower()
    assert cookie.startswith(COOKIE)
    for part in ("httponly", "samesite=strict", "path=/", "max-age="):
        assert part in cookie
    assert "secure" not in cookie

    page = Page(browser.get("/").text)
    assert page.one("form", action="sign-out")
    assert page.one("body")["data-sign-in"] == "sign-in"
    assert browser.get("/sign-in").headers["location"] == "./"
    answer = browser.post("/sign-out", headers={"origin": ORIGIN})
    assert (answer.status_code, answer.headers["location"]) == (303, "sign-in")
    assert browser.get("/").status_code == 303


@pytest.mark.parametrize("forwarded, is_https", [("HTTPS, http", True), ("http,https", False)])
def test_over_https_the_cookie_is_kept_to_https(browser, forwarded, is_https):
    """A proxy in front says how the browser came; addresses in answers are for that, too."""
    answer = send(browser, KEY, **{"x-forwarded-proto": forwarded})
    assert ("Secure" in answer.headers["set-cookie"]) is is_https
    session = {"cookie": answer.headers["set-cookie"].partition(";")[0], "x-forwarded-proto": forwarded}
    added = browser.post("/api/tasks", files={"photo": ("a.jpg", jpeg(), "image/jpeg")}, headers=session | OWN)
    assert added.status_code == 201
    scheme = "https" if is_https else "http"
    assert (
        f"i2v work --url {scheme}://127.0.0.1:8000"
        in Page(browser.get("/", headers=session).text).one(id="summary").text
    )


@pytest.mark.parametrize("key", ["", "wrong", KEY[:-1], KEY + "x", "키", "\ud800", "x" * 50_000])
def test_a_wrong_key_is_told(browser, key):
    """And opens nothing."""
    answer = send(browser, key.encode("utf-8", "surrogatepass"))
    page = Page(answer.text)
    assert answer.status_code == 403
    assert page.one(id="key-error").text == "This is not the key."
    assert "key-error" in page.one(id="key")["aria-describedby"]
    assert "value" not in page.one(id="key")
    assert "set-cookie" not in answer.headers
    assert browser.get("/").status_code == 303


def test_guessing_takes_ever_longer(browser):
    """After several wrong keys even the right one has to wait."""
    for _ in range(FREE_TRIES):
        assert send(browser, "guess").status_code == 403
    answer = send(browser, KEY, **{"accept-language": "ko"})
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) >= 1
    assert "다시 시도해 주세요" in Page(answer.text).one(id="key-error").text
    assert browser.get("/").status_code == 303


def test_guessing_under_many_addresses_or_at_once_gains_nothing(tmp_path):
    """A proxy may pass on what a stranger says of the address; and a try counts when its key is compared."""
    with running_server(config(tmp_path)) as url, ExitStack() as stack:
        headers = {"origin": url, "x-forwarded-for": "203.0.113.1"}
        body = b"key=guess"
        parsed = httpx.URL(url)
        guesses = [stack.enter_context(socket.create_connection((parsed.host, parsed.port), 10)) for _ in range(20)]
        for number, guess in enumerate(guesses):
            head = f"POST /sign-in HTTP/1.1\r\nHost: {parsed.netloc.decode()}\r\nOrigin: {url}\r\nConnection: close\r\n"
            head += "Content-Type: application/x-www-form-urlencoded\r\nExpect: 100-continue\r\n"
            head += f"X-Forwarded-For: 203.0.113.{number}\r\nContent-Length: {len(body)}\r\n\r\n"
            guess.sendall(head.encode())
        # The server asks for the body when the application does, so by now all of them have been begun.
        assert all(guess.recv(100).startswith(b"HTTP/1.1 100") for guess in guesses)
        for guess in guesses:
            guess.sendall(body)
        statuses = [guess.recv(12)[-3:] for guess in guesses]
        assert statuses.count(b"403") == FREE_TRIES
        assert statuses.count(b"429") == len(guesses) - FREE_TRIES
        assert httpx.post(f"{url}/sign-in", data={"key": KEY}, headers=headers).status_code == 429


def test_no_other_site_signs_anybody_in_or_out(browser):
    """A forged form would sign a visitor in to somebody else's queue."""
    assert send(browser, KEY, origin="https://evil.example").status_code == 403
    assert send(browser, KEY, origin="null").status_code == 403
    send(browser, KEY)
    assert browser.post("/sign-out", headers={"origin": "https://evil.example"}).status_code == 403
    assert browser.get("/").status_code == 200


def test_no_other_site_acts_with_the_cookie(browser):
    """A browser sends it whoever asks, so it counts only where our own page did."""
    send(browser, KEY)
    asked = {"data": {"prompt": "x"}, "files": {"photo": ("a.jpg", b"no", "image/jpeg")}}
    for headers in ({"origin": "https://evil.example"}, {"origin": "null"}, {}, {"sec-fetch-site": "cross-site"}):
        for verb in ("cancel", "retry", "delete"):
            assert browser.post(f"/page/tasks/x/{verb}", headers=headers).status_code == 403
        assert browser.post("/api/tasks", headers=headers, **asked).status_code == 403
    own = {"origin": ORIGIN}
    assert browser.post("/page/tasks/x/cancel", headers=own).status_code == 404
    assert browser.post("/api/tasks", headers=own, **asked).status_code == 400


def test_a_form_that_is_no_form_is_a_wrong_key(browser):
    """Whatever is sent, the answer is the form."""
    for content, kind in (
        (b"{}", "application/json"),
        (b"", "text/plain"),
        (b"key=%ff%fe", "application/x-www-form-urlencoded"),
    ):
        answer = browser.post("/sign-in", content=content, headers={"origin": ORIGIN, "content-type": kind})
        assert answer.status_code == 403
    answer = browser.post("/sign-in", files={"key": ("key", KEY.encode())}, headers={"origin": ORIGIN})
    assert answer.status_code in (400, 403)


def test_without_a_key_there_is_nothing_to_sign_in_to(tmp_path):
    """The page is open to this machine, and to no other site."""
    with app_client(config(tmp_path, api_key=None)) as browser:
        page = Page(browser.get("/").text)
        assert not page.all("form", action="sign-out")
        assert "data-sign-in" not in page.one("body")
        assert browser.get("/sign-in").headers["location"] == "./"
        assert browser.get("/", headers={"host": "evil.example"}).status_code == 403
        assert browser.post("/page/tasks/x/delete", headers={"origin": "https://evil.example"}).status_code == 403
