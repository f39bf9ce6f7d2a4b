"""Requests that a page of somebody else could make a browser send, one by one, and what they are answered.

What a browser adds to them is given by the Fetch standard (fetch.spec.whatwg.org, "Origin header") and by Fetch
Metadata (w3c.github.io/webappsec-fetch-metadata): pages can neither leave these headers out nor change them. That real
browsers do send them is in `test_two_origins.py`.
"""

import pytest

from inference.server.config import ServerConfig
from tests.server.harness import app_client, config, jpeg

HERE = "http://127.0.0.1:8000"
KEY = "the key of these tests"

OURS = {"origin": HERE, "sec-fetch-site": "same-origin"}
OLD_BROWSER = {"origin": HERE}  # before 2020, or behind a proxy that removes what it does not know
NO_ORIGIN = {"sec-fetch-site": "same-origin"}

FORGED = {
    "another site": {"origin": "http://evil.example", "sec-fetch-site": "cross-site"},
    "another port of this machine": {"origin": "http://127.0.0.1:9000", "sec-fetch-site": "same-site"},
    "the same name over https": {"origin": "https://127.0.0.1:8000", "sec-fetch-site": "cross-site"},
    "the other name of this machine": {"origin": "http://localhost:8000", "sec-fetch-site": "cross-site"},
    "a sandboxed frame": {"origin": "null", "sec-fetch-site": "cross-site"},
    "a file on this machine": {"origin": "null"},
    "an origin that begins like ours": {"origin": f"{HERE}.evil.example"},
    "an origin that ends like ours": {"origin": "http://evil.example/127.0.0.1:8000"},
    "an old browser, from elsewhere": {"origin": "http://evil.example"},
    "a page whose origin is hidden": {"sec-fetch-site": "cross-site"},
    "a subdomain whose origin is hidden": {"sec-fetch-site": "same-site"},
}
"""Headers of requests from pages that are not ours."""


@pytest.fixture(scope="module")
def with_key(tmp_path_factory):
    """A client of a server that has a key, and a session of its page."""
    made: ServerConfig = config(tmp_path_factory.mktemp("keyed"), api_key=KEY)
    with app_client(made, HERE) as client:
        answer = client.post("/sign-in", data={"key": KEY}, headers=OURS)
        assert answer.status_code in (302, 303), answer.text
        cookie = answer.headers["set-cookie"].partition(";")[0]
        client.cookies.clear()
        yield client, cookie


@pytest.fixture(scope="module")
def without_key(tmp_path_factory):
    """A client of a server that has none."""
    with app_client(config(tmp_path_factory.mktemp("open"), api_key=None), HERE) as client:
        yield client


def add(client, **headers):
    """A task to do something to."""
    answer = client.post("/api/tasks", files={"photo": ("a.jpg", jpeg())}, data={"seconds": "1"}, headers=headers)
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]["items"][0]["id"]


def changes(item_id):
    """Every request that changes something, as (method, path, body)."""
    photo = {"files": {"photo": ("a.jpg", jpeg())}, "data": {"seconds": "1"}}
    return [
        ("POST", "/api/tasks", photo),
        ("POST", f"/api/tasks/{item_id}/cancel", {}),
        ("POST", f"/api/tasks/{item_id}/retry", {}),
        ("DELETE", f"/api/tasks/{item_id}", {}),
        ("POST", f"/page/tasks/{item_id}/cancel", {"data": {"x": "1"}}),
        ("POST", f"/page/tasks/{item_id}/retry", {"data": {"x": "1"}}),
        ("POST", f"/page/tasks/{item_id}/delete", {"data": {"x": "1"}}),
        ("POST", "/api/worker/next-task", {"content": '{"worker_id": "w"}', "headers": {"content-type": "text/plain"}}),
        ("POST", "/api/events-token", {"json": {"project_id": "queue"}}),
    ]


def send(client, method, path, body, **headers):
    """One request; redirects are not followed."""
    body = dict(body)
    given = body.pop("headers", {}) | headers
    return client.request(method, path, headers=given, follow_redirects=False, **body)


@pytest.mark.parametrize("origin", FORGED.values(), ids=FORGED.keys())
def test_a_session_does_not_count_for_other_pages(with_key, origin):
    """The cookie comes along, since the browser has it: nothing is changed all the same."""
    client, cookie = with_key
    key = {"authorization": f"Bearer {KEY}"}
    item_id = add(client, **key)
    for method, path, body in changes(item_id):
        answer = send(client, method, path, body, cookie=cookie, **origin)
        assert answer.status_code == 403, (method, path, answer.status_code, answer.text[:200])
        assert "access-control-allow-origin" not in answer.headers
    assert client.get(f"/api/tasks/{item_id}", headers=key).json()["data"]["status"] == "pending"


@pytest.mark.parametrize("origin", [OURS, OLD_BROWSER, NO_ORIGIN], ids=["ours", "old browser", "no origin"])
def test_a_session_counts_for_our_own_page(with_key, origin):
    """What the page itself sends."""
    client, cookie = with_key
    item_id = add(client, cookie=cookie, **origin)
    assert send(client, "POST", f"/api/tasks/{item_id}/cancel", {}, cookie=cookie, **origin).status_code == 200
    form = send(client, "POST", f"/page/tasks/{item_id}/retry", {"data": {"x": "1"}}, cookie=cookie, **origin)
    assert form.status_code == 303
    assert client.get("/", headers={"cookie": cookie} | origin).status_code == 200


def test_a_session_that_nobody_opened_counts_for_nothing(with_key):
    """Altered, cut, empty, of another key: as without one."""
    client, cookie = with_key
    name, _, value = cookie.partition("=")
    flipped = value[:-1] + ("A" if value[-1] != "A" else "B")
    for forged in ("", "x", value[:-1], value + "x", flipped, "9999999999." + value.partition(".")[2], value.upper()):
        headers = OURS | {"cookie": f"{name}={forged}"}
        assert client.get("/api/tasks", headers=headers).status_code == 401, forged
        assert client.get("/", headers=headers, follow_redirects=False).status_code in (302, 303, 307), forged
        assert client.get("/events/queue", headers=headers).status_code == 401, forged
        assert send(client, "POST", "/api/worker/backlog", {"json": {}}, **headers).status_code == 401, forged


def test_without_a_session_the_page_asks_for_the_key(with_key):
    """By a redirect to a relative address; changes are refused and not redirected."""
    client, _ = with_key
    for path in ("/", "/page/tasks/some-id"):
        answer = client.get(path, follow_redirects=False)
        assert answer.status_code in (302, 303, 307)
        assert "sign-in" in answer.headers["location"]
        assert "://" not in answer.headers["location"]
        assert not answer.headers["location"].startswith("//")
    for method, path, body in changes("some-id"):
        assert send(client, method, path, body, **OURS).status_code in (401, 403), path


@pytest.mark.parametrize("origin", FORGED.values(), ids=FORGED.keys())
def test_nobody_is_signed_in_by_another_page(with_key, origin):
    """With the right key, too: a page could else sign its visitor in to a queue that it watches."""
    client, _ = with_key
    answer = client.post("/sign-in", data={"key": KEY}, headers=origin, follow_redirects=False)
    assert "set-cookie" not in answer.headers, answer.status_code


def test_the_cookie_is_kept_from_scripts_and_other_sites(with_key):
    """HttpOnly, SameSite=Strict, for every path; it does not say the key."""
    client, _ = with_key
    answer = client.post("/sign-in", data={"key": KEY}, headers=OURS, follow_redirects=False)
    client.cookies.clear()
    cookie = answer.headers["set-cookie"]
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", "path=/"} <= attributes
    assert KEY not in cookie
    assert "://" not in answer.headers["location"]


@pytest.mark.parametrize("origin", FORGED.values(), ids=FORGED.keys())
def test_without_a_key_other_pages_change_nothing(without_key, origin):
    """Loopback is reachable for every page that this machine's browser shows."""
    item_id = add(without_key)
    for method, path, body in changes(item_id):
        answer = send(without_key, method, path, body, **origin)
        assert answer.status_code == 403, (method, path, answer.status_code, answer.text[:200])
    assert without_key.get(f"/api/tasks/{item_id}").json()["data"]["status"] == "pending"


def test_without_a_key_a_name_that_leads_here_opens_nothing(without_key):
    """DNS rebinding: the page's own name resolves to loopback, so that its origin and its host agree."""
    headers = {"host": "evil.example:8000", "origin": "http://evil.example:8000", "sec-fetch-site": "same-origin"}
    for path in ("/", "/page/tasks/x", "/events/queue", "/api/tasks", "/page/photos/x.jpg", "/page/clips/x.mp4"):
        assert without_key.get(path, headers=headers).status_code == 403, path


def test_nothing_of_ours_can_be_framed_or_run_in(with_key, without_key):
    """Every page says so."""
    for client, path in ((without_key, "/"), (without_key, "/page/tasks/nobody"), (with_key[0], "/sign-in")):
        headers = client.get(path).headers
        rules = {rule.split()[0]: rule.split()[1:] for rule in headers["content-security-policy"].split(";") if rule}
        assert rules["default-src"] == ["'none'"]
        assert rules["frame-ancestors"] == ["'none'"]
        assert rules["base-uri"] == ["'none'"]
        assert rules["form-action"] == ["'self'"]
        assert rules["script-src"] == ["'self'"]
        assert rules["style-src"] == ["'self'"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"


def test_pictures_are_for_our_own_page(without_key):
    """Another page could else show them, as small as a pixel or as large as life, and learn how large they are.

    A link that somebody follows from elsewhere leads to the page, and videos behind signed URLs may be shown anywhere.
    """
    item_id = add(without_key)
    photo_id = without_key.get(f"/api/tasks/{item_id}").json()["data"]["photo_id"]
    embedded = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}
    for site in ("cross-site", "same-site"):
        assert (
            without_key.get(f"/page/photos/{photo_id}.jpg", headers=embedded | {"sec-fetch-site": site}).status_code
            == 403
        )
    followed = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert without_key.get("/", headers=followed).status_code == 200
    ours = without_key.get(f"/page/photos/{photo_id}.jpg", headers=embedded | {"sec-fetch-site": "same-origin"})
    assert ours.status_code == 200
    # It is kept by the browser, which asks no more.
    assert ours.headers["cross-origin-resource-policy"] == "same-origin"
    asked = {
        "operation": "download",
        "storage_path": without_key.get(f"/api/tasks/{item_id}").json()["data"]["photo_storage_path"],
    }
    url = without_key.post("/api/worker/presign", json=asked).json()["data"]["url"]
    assert without_key.get(url, headers=embedded).status_code == 200
