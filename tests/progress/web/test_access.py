"""Who may follow progress, over either kind of stream."""

from itertools import count

import httpx
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from inference.progress.hub import MemoryHub
from inference.progress.web.access import TOKEN_LIFETIME_S, Access, Refusal
from inference.progress.web.app import progress_app
from inference.progress.web.seals import Seals
from tests.progress.web.harness import serving, websocket_status

KEY, SECRET = "the key", "a secret"
NOW = 1_000_000.0


def refusal(access, headers=(), query="", project="film"):
    """Whether somebody gets in: None, or the status."""
    pairs = [
        (name.encode(), value.encode("latin-1")) for name, value in ({"host": "queue.example"} | dict(headers)).items()
    ]
    found = access(HTTPConnection({"type": "http", "headers": pairs, "query_string": query.encode()}), project)
    return found and found.status


@pytest.mark.parametrize(
    "headers, query, status",
    [
        ({}, "", 401),
        ({"authorization": f"Worker {KEY}"}, "", None),
        ({"authorization": f"bearer {KEY} "}, "", None),
        ({"authorization": f"Basic {KEY}"}, "", 401),
        ({"authorization": "Worker \xff"}, "", 401),
        ({"authorization": KEY}, "", 401),
        ({}, f"token={KEY}", 401),
        ({}, f"key={KEY}", 401),
        ({}, "token=", 401),
        ({}, "token=1.2", 401),
        ({}, f"token=9{'0' * 5000}.x", 401),
        ({}, "token=%00%ff%f0%9f", 401),
        ({}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film')}", None),
        ({"origin": "https://app.example"}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film')}", None),
        # of another project, of another key, of another secret, for another purpose, altered, expired
        ({}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film2')}", 401),
        ({}, f"token={Access('old', SECRET, lambda: NOW).sign('film')}", 401),
        ({}, f"token={Access(KEY, 'other', lambda: NOW).sign('film')}", 401),
        ({}, f"token={Access(KEY, None, lambda: NOW).sign('film')}", 401),
        ({}, f"token={Seals(SECRET, 'session', KEY, lambda: NOW).make('film', 300)}", 401),
        ({}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film').replace('1000300', '1000900')}", 401),
        ({}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film')[:-1]}", 401),
        ({}, f"token={Access(KEY, SECRET, lambda: NOW - TOKEN_LIFETIME_S).sign('film')}", 401),
        ({}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film', -1)}", 401),
        ({"authorization": "Worker x"}, f"token={Access(KEY, SECRET, lambda: NOW).sign('film')}", 401),
    ],
    ids=count(),
)
def test_the_key_or_a_token_for_this_project(headers, query, status):
    """And nothing that looks like one."""
    assert refusal(Access(KEY, SECRET, lambda: NOW), headers, query) == status


def test_a_project_does_not_pass_for_another():
    """However its id is composed: what is signed tells the expiry and the id apart."""
    access = Access(KEY, SECRET, lambda: NOW)
    assert refusal(access, query=f"token={access.sign('film')}", project="other") == 401
    assert refusal(access, query=f"token={access.sign('other')}", project="other") is None
    expires, _, mac = access.sign("a").partition(".")
    for project, token in (("0a", f"{expires}.{mac}"), ("", f"{expires}\0a.{mac}"), ("a", f"0{expires}.{mac}")):
        assert refusal(access, query=f"token={token}", project=project) == 401


def test_an_empty_secret_signs_nothing():
    """Anybody could sign with it."""
    with pytest.raises(ValueError, match="secret"):
        Access(KEY, "")


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "queue.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "127.0.0.1:1", "origin": "http://127.0.0.1:2"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"x-forwarded-for": "203.0.113.1"}, 403),
        ({"forwarded": "for=203.0.113.1"}, 403),
    ],
)
def test_without_a_key_programs_and_pages_of_this_machine(headers, status):
    """That is the default of an application that is mounted without a thought. A token makes no difference."""
    hub = MemoryHub()
    with serving(progress_app(hub), hub) as url:
        for query in ("", "?token=x"):
            with httpx.stream("GET", f"{url}/events/film{query}", headers=headers) as response:
                assert response.status_code == status
            if "host" in headers:
                continue  # the client of websockets sends one of its own
            assert websocket_status(url, query=query, **headers) == (101 if status == 200 else 403)


def of_its_own(connection, project_id):
    """An application's check, which knows its users and whose project is whose."""
    if connection.headers.get("x-user") != "kim":
        return Refusal(401, "who are you?")
    return None if project_id == "film" else Refusal(403, "not yours")


async def later(connection, project_id):
    """The same, asking a database."""
    return of_its_own(connection, project_id)


async def raising(connection, project_id):
    """The same, as a dependency of FastAPI does it."""
    if found := of_its_own(connection, project_id):
        raise HTTPException(*found)


@pytest.mark.parametrize("access", [of_its_own, later, raising])
def test_an_application_decides_for_itself(access):
    """In a function, a coroutine, or by raising what its framework has for it."""
    hub = MemoryHub()
    with serving(progress_app(hub, access=access), hub) as url:
        kim = {"x-user": "kim"}
        for project, headers, status in (("film", {}, 401), ("film", kim, 200), ("other", kim, 403)):
            with httpx.stream("GET", f"{url}/events/{project}", headers=headers) as response:
                assert response.status_code == status
                assert status == 200 or "error" in response.read().decode()
                assert (response.headers.get("www-authenticate") == "Bearer") is (status == 401)
            assert websocket_status(url, project, **headers) == (101 if status == 200 else 403)
        # A token that was never checked lets no page of another site read what this browser may follow.
        with httpx.stream("GET", f"{url}/events/film?token=x", headers=kim) as response:
            assert "access-control-allow-origin" not in response.headers
