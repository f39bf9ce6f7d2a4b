"""Live progress of the embedded queue: who may follow it, and what is heard of a task."""

import time
from contextlib import suppress

import httpx
import pytest

from inference.server.connections import Patience
from inference.server.sessions import COOKIE, Sessions
from tests.progress.web.harness import WAYS, Listener, websocket_status
from tests.server.harness import KEY, config, jpeg, running_server

KEYED = {"authorization": f"Worker {KEY}"}
AT_ONCE_S = 3


def told_until_the_end(listener: Listener, task: str) -> list[dict]:
    """What is told of a task, its end included."""
    told = []
    while not told or told[-1]["type"] == "progress":
        _, event = listener.next()
        if event["task_name"] == task:
            told.append(event)
    return told


@pytest.mark.parametrize("follow", WAYS.values(), ids=WAYS)
def test_a_task_is_followed_from_its_photo_to_its_end(tmp_path, follow):
    """Under its group and under the whole queue; by who comes late, in one event."""
    with running_server(config(tmp_path)) as url, httpx.Client(base_url=url, headers=KEYED) as client:
        made = client.post("/api/tasks", files={"photo": ("a.jpg", jpeg(), "image/jpeg")}).json()["data"]
        group, task = made["group_id"], made["items"][0]["id"]
        with follow(url, "queue", **KEYED) as all_of_it, follow(url, group, **KEYED) as its_group:
            assert all_of_it.next()[1]["status"] == its_group.next()[1]["status"] == "pending"
            lease = client.post("/api/worker/next-task", json={"worker_id": "w"}).json()["data"]
            end = {"worker_id": "w", "item_id": task, "lease_seq": lease["lease_seq"], "status": "failed"}
            client.post("/api/worker/report", json=end | {"error_message": "no"}).raise_for_status()
            for listener in (all_of_it, its_group):
                told = told_until_the_end(listener, task)
                assert [event.get("status", event["type"]) for event in told][-1] == "error"
                assert told[-1]["error"] == "no"
        with follow(url, group, **KEYED) as late:
            assert late.next()[1]["type"] == "error"


def test_a_page_gets_a_token_and_follows_with_it(tmp_path):
    """One project, from any site, without the key; not another one, and not for ever."""
    with running_server(config(tmp_path)) as url:
        asked = {"project_id": "film 1"}
        assert httpx.post(f"{url}/api/events-token", json=asked).status_code == 401
        answer = httpx.post(f"{url}/api/events-token", json=asked, headers=KEYED).json()["data"]
        assert 0 < answer["expires_in"] <= 300
        query = f"?token={answer['token']}"
        foreign = {"origin": "https://app.example"}
        with httpx.stream("GET", f"{url}/events/film%201{query}", headers=foreign) as response:
            assert response.headers["access-control-allow-origin"] == "*"
        assert websocket_status(url, "film%201", query, **foreign) == 101
        for path in ("/events/queue", "/ws/queue", "/api/tasks"):
            assert httpx.get(f"{url}{path}{query}").status_code == 401
        assert websocket_status(url, "queue", query) == 403
        for wrong in ({}, {"project_id": ""}, {"project_id": "x" * 201}, {"project_id": 7}, {"project_id": "a\n"}):
            assert httpx.post(f"{url}/api/events-token", json=wrong, headers=KEYED).status_code == 400


def test_a_browser_follows_with_its_session(tmp_path):
    """From our own page alone: a page of another site makes the browser send the cookie as well."""
    session = {"cookie": f"{COOKIE}={Sessions('secret', KEY).open()}"}
    with running_server(config(tmp_path)) as url:
        own, foreign = {"origin": url}, {"origin": "http://evil.example"}
        with httpx.stream("GET", f"{url}/events/queue", headers=session | own) as response:
            assert response.status_code == 200
            assert "access-control-allow-origin" not in response.headers
        assert websocket_status(url, "queue", **session, **own) == 101
        assert httpx.get(f"{url}/events/queue", headers=session | foreign).status_code == 403
        assert websocket_status(url, "queue", **session, **foreign) == 403


def test_a_listener_that_sends_without_end_is_let_go(tmp_path, caplog):
    """With a body, which nobody reads: its stream ends, and that is no error of the server."""
    with running_server(config(tmp_path), patience=Patience(header_s=0.5)) as url:
        body = iter(lambda: bytes(65_536), None)
        with suppress(httpx.WriteError, httpx.ReadError):
            ended = httpx.request("GET", f"{url}/events/queue", content=body, headers=KEYED)
            assert ended.text.startswith("retry:")
    assert not [record for record in caplog.records if record.levelname in {"ERROR", "CRITICAL"}]


def test_open_pages_do_not_keep_the_server(tmp_path):
    """It stops at once, and each stream ends in order."""
    with running_server(config(tmp_path)) as url:
        pages = [follow(url, "queue", **KEYED) for follow in WAYS.values()]
        listeners = [page.__enter__() for page in pages]
        began = time.monotonic()
    assert time.monotonic() - began < AT_ONCE_S
    assert all(listener.has_ended() for listener in listeners)
    for page in pages:
        page.__exit__(None, None, None)
