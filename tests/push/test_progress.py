"""Live progress beside pushed jobs: for whoever may ask for one, and for pages that hold a token."""

from itertools import count
from urllib.parse import quote

import httpx
import pytest
from starlette.applications import Starlette

from inference.on_modal.calls import application
from inference.on_modal.deployment import on_modal
from inference.payments.records import MemoryRecords
from inference.progress.hub import MemoryHub
from inference.progress.redis import RedisHub
from inference.progress.web.access import Access
from inference.push.app import create_app
from inference.push.auth import Auth, Verdict
from inference.push.progress import progress_routes
from inference.settings import Settings
from tests.progress.web.harness import WAYS, by_sse, serving, step, websocket_status
from tests.support.redis_server import redis_server

TOKEN = "the-push-token"
BEARER = {"authorization": f"Bearer {TOKEN}"}


class Accounts:
    """Knows one account by its token; for what it cannot check it asks to come again."""

    async def verdict(self, token):
        """See Tokens."""
        return {"a.b.c": None, "x.y.z": Verdict(403, "not listed")}.get(token, Verdict(503, "no certificates"))


def served(hub, secret=TOKEN, tokens=None):
    """The application of pushed jobs with progress beside it."""
    auth = Auth(secret, "X-Worker-Token", tokens)
    return serving(create_app(auth, deadline_s=600, beside=progress_routes(hub, auth, secret)), hub)


@pytest.mark.parametrize(
    "headers, token, status",
    [
        ({}, None, 401),
        (BEARER, None, 200),
        ({"x-worker-token": TOKEN}, None, 200),
        ({"authorization": "Bearer wrong"}, None, 401),
        ({"authorization": "Bearer a.b.c"}, None, 200),
        ({"authorization": "Bearer x.y.z"}, None, 403),
        ({"authorization": "Bearer 1.2.3"}, None, 503),
        ({}, lambda: Access(TOKEN, TOKEN).sign("film"), 200),
        ({"origin": "https://app.example"}, lambda: Access(TOKEN, TOKEN).sign("film"), 200),
        ({}, lambda: Access(TOKEN, TOKEN).sign("other"), 401),
        ({}, lambda: Access(TOKEN, TOKEN).sign("film", -1), 401),
        ({}, lambda: Access("", "guessed").sign("film"), 401),
        ({}, lambda: TOKEN, 401),
    ],
    ids=count(),
)
def test_who_may_ask_for_a_job_may_follow(headers, token, status):
    """Over both; and a page with a token for this project, wherever it is."""
    hub = MemoryHub()
    query = f"?token={quote(token())}" if token else ""
    with served(hub, tokens=Accounts()) as url:
        with httpx.stream("GET", f"{url}/events/film{query}", headers=headers) as response:
            assert response.status_code == status
        assert websocket_status(url, query=query, **headers) == (101 if status == 200 else 403)


@pytest.mark.parametrize("follow", WAYS.values(), ids=WAYS)
def test_a_page_gets_a_token(follow):
    """From an application that has the push token."""
    hub = MemoryHub()
    hub.publish(step("a", 10))
    with served(hub) as url:
        answer = httpx.post(f"{url}/events-token", json={"project_id": "film"}, headers=BEARER).json()
        assert answer["expires_in"] == 300
        with follow(url, query=f"?token={answer['token']}") as listener:
            assert listener.percents(1) == [("a", 10)]
        assert httpx.post(f"{url}/events-token", json={"project_id": "film"}).status_code == 401
        for body in (b"", b"[]", b"{", b'{"project_id": 7}', b'{"project_id": "a\\u0000"}', b"[" * 4000):
            wrong = httpx.post(f"{url}/events-token", content=body, headers=BEARER)
            assert (wrong.status_code, wrong.json()["outcome"]) == (400, "malformed")
        assert httpx.post(f"{url}/events-token", content=b" " * 5000, headers=BEARER).status_code == 413


def test_without_a_secret_nothing_signs_tokens():
    """Accounts follow with their own; a token in the query is none of ours."""
    hub = MemoryHub()
    with served(hub, None, Accounts()) as url:
        asked = {"project_id": "film"}
        assert (
            httpx.post(f"{url}/events-token", json=asked, headers={"authorization": "Bearer a.b.c"}).status_code == 404
        )
        assert httpx.get(f"{url}/events/film?token=a.b.c").status_code == 401


def endpoint(redis_url) -> Starlette:
    """What is served on Modal."""
    settings = Settings.load(push_token=TOKEN, redis_url=redis_url)
    return application(settings, on_modal(settings), MemoryRecords(), None, None)


def test_on_modal_with_a_redis(tmp_path):
    """A container publishes, and a page that follows over the endpoint hears of it."""
    with redis_server(tmp_path) as redis:
        elsewhere = RedisHub(redis.url, interval_s=0)
        with serving(endpoint(redis_url=redis.url), MemoryHub()) as url, by_sse(url, **BEARER) as listener:
            elsewhere.publish(step("a", 10))
            assert listener.percents(1) == [("a", 10)]
        elsewhere.close()


@pytest.mark.parametrize("redis_url", [None, "nonsense://"])
def test_on_modal_without_a_redis_there_is_nothing_to_follow(redis_url):
    """Also with one that cannot be: calls are taken all the same."""
    with serving(endpoint(redis_url=redis_url), MemoryHub()) as url:
        assert httpx.get(f"{url}/events/film", headers=BEARER).status_code == 404
        assert httpx.get(f"{url}/jobs/health").json() == {"status": "ok"}
