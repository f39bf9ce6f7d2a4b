"""The HTTP surface: the worker's contract to the letter, the client's half, who gets in."""

import json
import random
import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import httpx
import pytest

from inference.server.guard import Guard
from tests.server.harness import KEY, app_client, config, jpeg
from tests.support.processes import until

ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def client(tmp_path):
    """A client with the key."""
    with app_client(config(tmp_path, max_photo_bytes=100_000), authorization=f"Worker {KEY}") as client:
        yield client


def create(client, **form):
    """Asks for videos; returns the answer's data."""
    answer = client.post("/api/tasks", data=form, files={"photo": ("a b.jpg", jpeg(), "image/jpeg")})
    assert answer.status_code == 201, answer.text
    return answer.json()["data"]


def lease(client, **body):
    """Leases as worker w."""
    return client.post("/api/worker/next-task", json={"worker_id": "w"} | body).json()["data"]


def refused(answer, status, *words):
    """The answer refuses in the contract's shape."""
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body["success"] is False
    assert set(body) == {"success", "error"}
    for word in words:
        assert word in body["error"]


def test_a_task_from_photo_to_video(client):
    """Everything a worker does, by the contract, and what people see of it."""
    made = create(client, prompt="waves", seconds="3", count="2", group="Holiday")
    assert len(made["items"]) == 2
    answer = client.post("/api/worker/next-task", json={"worker_id": "w"})
    assert answer.status_code == 200
    assert set(answer.json()) == {"success", "data"}
    task = answer.json()["data"]
    assert set(task) == {
        "item_id",
        "group_id",
        "photo_id",
        "prompt",
        "photo_storage_path",
        "leased_until",
        "frame_num",
        "inference_provider",
        "lease_seq",
        "beat_interval_s",
        "takes",
    }
    assert (task["prompt"], task["frame_num"], task["item_id"]) == ("waves", 73, made["items"][0]["id"])
    assert task["photo_storage_path"] == f"{made['group_id']}/{made['photo_id']}_original.jpg"
    assert ISO.fullmatch(task["leased_until"])

    holder = {"item_id": task["item_id"], "worker_id": "w"}
    beat = client.post("/api/worker/heartbeat", json=holder | {"progress": {"stage": "denoise", "fraction": 0.5}})
    assert beat.json()["data"]["cancel_requested"] is False
    assert ISO.fullmatch(beat.json()["data"]["leased_until"])
    assert client.get(f"/api/tasks/{task['item_id']}").json()["data"]["progress"]["fraction"] == 0.5

    path = task["photo_storage_path"]
    signed = client.post("/api/worker/presign", json={"operation": "download", "storage_path": path}).json()["data"]
    assert set(signed) == {"url", "expires_in"}
    photo = httpx.URL(signed["url"])
    assert client.get(photo.raw_path.decode(), headers={"authorization": ""}).content == jpeg()

    asked = {"operation": "upload", "video_item_id": task["item_id"]}
    signed = client.post("/api/worker/presign", json=asked).json()["data"]
    assert signed["storage_path"] == f"videos/{task['item_id']}.mp4"
    put = client.put(signed["url"], content=b"mp4", headers={"content-type": "video/mp4"})
    assert put.json() == {"Key": f"group-photos/{signed['storage_path']}"}

    end = holder | {"status": "completed", "video_storage_path": signed["storage_path"], "runway_task_id": "r-1"}
    for _ in range(2):
        assert client.post("/api/worker/report", json=end).json()["data"]["status"] == "completed"
    seen = client.get(f"/api/tasks/{task['item_id']}").json()["data"]
    assert (seen["status"], seen["runway_task_id"], seen["seconds"]) == ("completed", "r-1", 3.0)
    assert client.get(seen["video_url"]).content == b"mp4"
    group = client.get(f"/api/groups/{made['group_id']}").json()["data"]
    assert (group["name"], group["status"], group["counts"]) == (
        "Holiday",
        "processing",
        {"completed": 1, "pending": 1},
    )


def test_what_this_queue_takes_beyond_the_contract(client):
    """It says so with the task: how often it wants to hear, and that it keeps progress and prices."""
    task = lease_of_new(client)
    assert (task["beat_interval_s"], task["takes"]) == (2.0, ["progress", "cost_usd"])
    holder = {"item_id": task["item_id"], "worker_id": "w"}
    for fraction in (0.5, 0.25):
        client.post("/api/worker/heartbeat", json=holder | {"progress": {"stage": "denoise", "fraction": fraction}})
    seen = client.get(f"/api/tasks/{task['item_id']}").json()["data"]
    assert seen["progress"] == {"stage": "denoise", "fraction": 0.5}
    assert (seen["photo_filename"], seen["ended_at"], seen["cost_usd"], seen["eta_s"]) == ("a b.jpg", None, None, None)
    assert ISO.fullmatch(seen["started_at"])
    end = holder | {"status": "completed", "video_storage_path": upload(client, task["item_id"]), "cost_usd": 0.25}
    for cost_usd in (-1, 100_001, "0.25", True):
        refused(client.post("/api/worker/report", json=end | {"cost_usd": cost_usd}), 400, "cost_usd")
    assert client.post("/api/worker/report", json=end).json()["data"]["status"] == "completed"
    seen = client.get(f"/api/tasks/{task['item_id']}").json()["data"]
    assert (seen["progress"], seen["cost_usd"]) == ({"stage": "done", "fraction": 1.0}, 0.25)
    assert ISO.fullmatch(seen["ended_at"])


def test_the_queue_in_a_few_numbers(client):
    """How many tasks there are, what they cost, and who works on them."""
    create(client, count="3")
    done = lease(client, worker_id="host-1.a")["item_id"]
    end = {"item_id": done, "worker_id": "host-1.a", "status": "completed", "cost_usd": 0.5}
    client.post("/api/worker/report", json=end | {"video_storage_path": upload(client, done)})
    held = lease(client, worker_id="host-1.b", worker_type="wan")["item_id"]
    client.post("/api/worker/next-task", json={"worker_id": "host-2.c", "worker_type": "runway"})
    seen = client.get("/api/overview").json()["data"]
    workers = seen.pop("workers")
    assert seen.pop("oldest_wait_s") == pytest.approx(0, abs=20)
    assert seen == {
        "counts": {"pending": 1, "processing": 1, "completed": 1, "failed": 0, "cancelled": 0},
        "completed_last_hour": 1,
        "spent_today_usd": 0.5,
        "unpriced_today": 0,
        "left_s": None,
    }
    assert [(it["name"], it["worker_type"], it["item_ids"]) for it in workers] == [
        ("host-2", "runway", []),
        ("host-1", "wan", [held]),
    ]
    client.post("/api/worker/heartbeat", json={"item_id": held, "worker_id": "host-1.b", "extend_seconds": 1})
    assert client.get("/api/overview").json()["data"]["workers"][0]["item_ids"] == []


def test_nothing_to_do_is_null(client):
    """An empty line is no error."""
    assert client.post("/api/worker/next-task", json={"worker_id": "w"}).json() == {"success": True, "data": None}


def test_a_worker_may_ask_for_one_task_and_for_the_backlog(client):
    """Two extensions: a task is null while it cannot be had, 404 where there is none; waiting ones are counted."""
    first, given = (item["id"] for item in create(client, count="2")["items"])
    for kind, waiting in (
        ({}, 2),
        ({"worker_type": None}, 2),
        ({"worker_type": "wan"}, 2),
        ({"worker_type": "runway"}, 0),
    ):
        answer = client.post("/api/worker/backlog", json=kind)
        assert (answer.status_code, answer.json()) == (200, {"success": True, "data": {"waiting": waiting}})
    assert lease(client, item_id=given, worker_type="runway") is None
    assert lease(client, item_id=given)["item_id"] == given
    assert lease(client, item_id=given) is None
    refused(client.post("/api/worker/next-task", json={"worker_id": "w", "item_id": "gone"}), 404, "no task gone")
    assert lease(client, item_id=None)["item_id"] == first


def test_a_worker_that_does_not_name_its_media_type_is_understood(client):
    """The real server reads JSON whatever the header says, and 600.0 is 600."""
    body = '{"worker_id": "w", "lease_duration_seconds": 600.0, "unknown": 1}'
    assert client.post("/api/worker/next-task", content=body).json()["success"]


def test_who_does_not_hold_is_told_as_the_contract_says(client):
    """A heartbeat gets 404, a report 403, either 404 for a task that is gone."""
    item = create(client)["items"][0]["id"]
    lease(client)
    other = {"item_id": item, "worker_id": "other"}
    refused(client.post("/api/worker/heartbeat", json=other), 404, "not held by other")
    refused(client.post("/api/worker/report", json=other | {"status": "failed", "error_message": "x"}), 403)
    gone = {"item_id": "gone", "worker_id": "w"}
    refused(client.post("/api/worker/heartbeat", json=gone), 404, "no task gone")
    refused(client.post("/api/worker/report", json=gone | {"status": "failed", "error_message": "x"}), 404)


def test_lease_seq_is_a_second_fence(client):
    """Who sends it is held to it."""
    task = lease_of_new(client)
    beat = {"item_id": task["item_id"], "worker_id": "w"}
    assert client.post("/api/worker/heartbeat", json=beat | {"lease_seq": task["lease_seq"]}).status_code == 200
    refused(client.post("/api/worker/heartbeat", json=beat | {"lease_seq": 9}), 404)
    refused(
        client.post("/api/worker/report", json=beat | {"lease_seq": 9, "status": "failed", "error_message": "x"}), 403
    )


def lease_of_new(client):
    """A new task in the hands of w."""
    create(client)
    return lease(client)


def test_cancel_and_retry(client):
    """A person stops a task, is told what cannot be done, and starts it over."""
    item = lease_of_new(client)["item_id"]
    refused(client.post(f"/api/tasks/{item}/retry"), 409, "the task is processing")
    assert client.post(f"/api/tasks/{item}/cancel").json()["data"]["cancel_requested"]
    beat = client.post("/api/worker/heartbeat", json={"item_id": item, "worker_id": "w", "extend_seconds": 1})
    assert beat.json()["data"]["cancel_requested"] is True
    assert client.get(f"/api/tasks/{item}").json()["data"]["status"] == "cancelled"
    assert client.post(f"/api/tasks/{item}/retry").json()["data"]["status"] == "pending"
    assert lease(client)["item_id"] == item
    failed = {"item_id": item, "worker_id": "w", "status": "failed", "error_message": "no"}
    assert client.post("/api/worker/report", json=failed).status_code == 200
    seen = client.get(f"/api/tasks/{item}").json()["data"]
    assert (seen["status"], seen["error_message"]) == ("failed", "no")
    refused(client.post(f"/api/tasks/{item}/cancel"), 409, "the task is failed")
    refused(client.get("/api/tasks/none"), 404)
    refused(client.get("/api/groups/none"), 404)


def test_pages(client):
    """The cursor leads through all of them, newest first."""
    made = [item["id"] for item in create(client, count="5")["items"]]
    seen, cursor = [], None
    while True:
        query = {"limit": 2} | ({"cursor": cursor} if cursor else {})
        page = client.get("/api/tasks", params=query).json()["data"]
        seen += [item["id"] for item in page["items"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert seen == made[::-1]
    assert len(client.get("/api/groups").json()["data"]["groups"]) == 1


@pytest.mark.parametrize(
    "path,body,words",
    [
        ("next-task", {}, ["worker_id"]),
        ("next-task", {"worker_id": ""}, ["worker_id"]),
        ("next-task", {"worker_id": "a\x00b"}, ["worker_id"]),
        ("next-task", {"worker_id": "w", "lease_duration_seconds": 0}, ["lease_duration_seconds"]),
        ("next-task", {"worker_id": "w", "lease_duration_seconds": 10**30}, ["lease_duration_seconds"]),
        ("next-task", {"worker_id": "w", "lease_duration_seconds": True}, ["lease_duration_seconds"]),
        ("next-task", {"worker_id": "w", "lease_duration_seconds": "soon"}, ["lease_duration_seconds"]),
        ("next-task", {"worker_id": "w", "lease_duration_seconds": "nan"}, ["lease_duration_seconds"]),
        ("next-task", {"worker_id": None}, ["worker_id"]),
        ("next-task", {"worker_id": True}, ["worker_id"]),
        ("next-task", {"worker_id": "w", "worker_type": "cpu"}, ["worker_type"]),
        ("next-task", {"worker_id": "w", "item_id": ""}, ["item_id"]),
        ("next-task", {"worker_id": "w", "item_id": 7}, ["item_id"]),
        ("backlog", {"worker_type": "cpu"}, ["worker_type"]),
        ("backlog", [], ["body"]),
        ("heartbeat", {"item_id": "i", "worker_id": "w", "extend_seconds": -1}, ["extend_seconds"]),
        ("heartbeat", {"item_id": "i", "worker_id": "w", "lease_seq": 2**31}, ["lease_seq"]),
        ("heartbeat", {"item_id": "i", "worker_id": "w", "progress": {"stage": "s", "fraction": 2}}, ["fraction"]),
        ("presign", {"operation": "delete"}, ["operation"]),
        ("presign", {"operation": "download"}, ["storage_path"]),
        ("presign", {"operation": "upload", "video_item_id": "i", "file_extension": "exe"}, ["file_extension"]),
        ("presign", {"operation": "upload", "video_item_id": "i", "file_extension": "a..mp4"}, ["file_extension"]),
        ("presign", {"operation": "upload", "video_item_id": "i", "file_extension": "/../x.mp4"}, ["file_extension"]),
        ("report", {"item_id": "i", "worker_id": "w", "status": "done"}, ["status"]),
        ("report", {"item_id": "i", "worker_id": "w", "status": "completed"}, ["video_storage_path"]),
        ("report", [], ["body"]),
    ],
)
def test_a_malformed_body_is_400_and_names_the_field(client, path, body, words):
    """Never 422: the contract knows no such status."""
    refused(client.post(f"/api/worker/{path}", json=body), 400, *words)


@pytest.mark.parametrize("body", [b"{", b"\xff\xfe", b'{"worker_id": "\\ud800"}', b"[" * 100_000, b"9" * 5000])
def test_what_is_not_json_is_400(client, body):
    """Broken text, lone surrogates, nesting without end."""
    refused(client.post("/api/worker/next-task", content=body), 400)


@pytest.mark.parametrize(
    "form,photo,status,word",
    [
        ({}, b"not a photo", 400, "photo"),
        ({}, b"", 400, "photo"),
        ({}, None, 400, "photo"),
        ({}, b"x" * 100_001, 413, "photo"),
        ({}, b"x" * 2_000_000, 413, "body"),
        ({"seconds": "nan"}, jpeg(), 400, "seconds"),
        ({"seconds": "61"}, jpeg(), 400, "seconds"),
        ({"count": "21"}, jpeg(), 400, "count"),
        ({"prompt": "x" * 4001}, jpeg(), 400, "prompt"),
        ({"prompt": "a\x00"}, jpeg(), 400, "prompt"),
        ({"group": "\x00"}, jpeg(), 400, "group"),
    ],
)
def test_a_bad_form_is_told_by_field(client, form, photo, status, word):
    """Nothing is stored for it."""
    files = {"photo": ("a.jpg", photo, "image/jpeg")} if photo is not None else None
    refused(client.post("/api/tasks", data=form, files=files), status, word)
    assert client.get("/api/tasks").json()["data"]["items"] == []


def test_a_chunked_body_over_the_limit_is_413(client):
    """A body that does not say how long it is is counted."""
    refused(client.post("/api/worker/next-task", content=(b"x" * 100_000 for _ in range(60))), 413)


def test_every_answer_has_the_shape(client):
    """Unknown routes and methods too."""
    refused(client.get("/nowhere"), 404)
    refused(client.put("/api/tasks"), 405)
    refused(client.get("/api/worker/next-task"), 405)


def test_presigning_what_is_not_there_fails(client):
    """In the real server's words, which do not say why; and no path leads out of the folder."""
    for path in ("videos/none.mp4", "../queue.db", "/etc/passwd", "a/../../queue.db", "..\\x", "%2e%2e/queue.db", "."):
        body = {"operation": "download", "storage_path": path}
        answer = client.post("/api/worker/presign", json=body)
        assert (answer.status_code, answer.json()) == failed("Failed to generate download URL")
    refused(client.post("/api/worker/presign", json={"operation": "upload", "video_item_id": "none"}), 404, "no task")


def failed(words):
    """What the real server answers when its storage refuses, whatever the reason."""
    return 500, {"success": False, "error": words}


def test_no_upload_is_signed_to_a_path_that_is_taken(client):
    """As the real storage refuses, in the real server's words; beside it, under another extension, there is room."""
    item = lease_of_new(client)["item_id"]
    asked = {"operation": "upload", "video_item_id": item}
    for extension in ("mp4", "3f2a.mp4", "webm"):
        upload(client, item, file_extension=extension)
        answer = client.post("/api/worker/presign", json=asked | {"file_extension": extension})
        assert (answer.status_code, answer.json()) == failed("Failed to generate upload URL")
    assert client.post("/api/worker/presign", json=asked | {"file_extension": "9c1d.mp4"}).status_code == 200


def upload(client, item, **presign):
    """Stores a video of the item as a worker does; returns the path to report."""
    asked = {"operation": "upload", "video_item_id": item} | presign
    signed = client.post("/api/worker/presign", json=asked).json()["data"]
    put = client.put(signed["url"], content=b"video", headers={"content-type": "video/mp4"})
    assert put.status_code == 200, put.text
    return signed["storage_path"]


def test_only_a_video_of_the_task_that_is_in_storage_completes_it(client):
    """Nothing that is absent, lies elsewhere, or belongs to another task, be it there or not."""
    task = lease_of_new(client)
    other = upload(client, lease_of_new(client)["item_id"])
    item = task["item_id"]
    end = {"item_id": item, "worker_id": "w", "status": "completed"}
    for path in (
        f"videos/{item}.mp4",
        f"videos/{item}.3f2a.mp4",
        "../queue.db",
        "/etc/passwd",
        "",
        "/",
        other,
        task["photo_storage_path"],
    ):
        answer = client.post("/api/worker/report", json=end | {"video_storage_path": path})
        if path.strip("/"):
            assert (answer.status_code, answer.json()) == failed("Failed to generate video URL")
        else:
            refused(answer, 400, "video_storage_path")
        assert client.get(f"/api/tasks/{item}").json()["data"]["status"] == "processing"
    # Who does not hold the task is told so, whatever is in storage: its worker stops, and does not try again.
    absent = {"video_storage_path": f"videos/{item}.mp4"}
    refused(client.post("/api/worker/report", json=end | absent | {"worker_id": "other"}), 403)
    refused(client.post("/api/worker/report", json=end | absent | {"lease_seq": 7}), 403)
    refused(client.post("/api/worker/report", json=end | absent | {"item_id": "none"}), 404)
    path = upload(client, item)
    assert client.post("/api/worker/report", json=end | {"video_storage_path": f"/{path}"}).status_code == 200
    assert client.get(f"/api/tasks/{item}").json()["data"]["video_storage_path"] == path


@pytest.mark.parametrize("media_type", ["text/plain;charset=UTF-8", "application/x-www-form-urlencoded", "nonsense"])
def test_json_is_read_whatever_its_media_type_says(client, media_type):
    """As the real server reads it: `fetch` with a string says text/plain, curl says that it sends a form."""
    answer = client.post("/api/worker/next-task", content='{"worker_id": "w"}', headers={"content-type": media_type})
    assert answer.json() == {"success": True, "data": None}


@pytest.mark.parametrize("seconds", ["600", "600.5", 600.5, None])
def test_numbers_arrive_in_many_shapes(client, seconds):
    """As strings, with a fraction, as null for the default: the lease is as long as was meant."""
    create(client)
    task = lease(client, worker_id=7.0, lease_duration_seconds=seconds)
    holder = {"item_id": task["item_id"], "worker_id": "7"}
    until = [task["leased_until"]]
    beat = client.post("/api/worker/heartbeat", json=holder | {"extend_seconds": seconds})
    until.append(beat.json()["data"]["leased_until"])
    for moment, default_s in zip(until, (600, 300), strict=True):
        left_s = (datetime.fromisoformat(moment) - datetime.now(UTC)).total_seconds()
        assert left_s == pytest.approx(default_s if seconds is None else float(seconds), abs=20)


@pytest.mark.parametrize(
    "said,kept",
    [
        ({}, "Unknown error"),
        ({"error_message": None}, "Unknown error"),
        ({"error_message": ""}, "Unknown error"),
        ({"error_message": 137}, "137"),
        ({"error_message": {"code": 137}}, '{"code": 137}'),
        ({"error_message": "a\x00b\ud83d"}, "a\N{REPLACEMENT CHARACTER}b?"),
        ({"error_message": "frame 1\n" * 300_000 + "CUDA out of memory"}, "CUDA out of memory"),
    ],
)
def test_a_failure_is_taken_whatever_it_says(client, said, kept):
    """Nothing at all, or a whole stderr: of that the end is kept."""
    item = lease_of_new(client)["item_id"]
    body = json.dumps({"item_id": item, "worker_id": "w", "status": "failed"} | said)
    answer = client.post("/api/worker/report", content=body)
    assert answer.json()["data"]["status"] == "failed"
    message = client.get(f"/api/tasks/{item}").json()["data"]["error_message"]
    assert message.endswith(kept)
    assert len(message) <= 10_000


@pytest.mark.parametrize("extension,stored", [("webm", "webm"), ("MP4", "MP4"), (".mp4", "mp4"), (None, "mp4")])
def test_a_video_may_be_called_otherwise(client, extension, stored):
    """Its path is told as presign made it, and that path completes the task."""
    item = lease_of_new(client)["item_id"]
    path = upload(client, item, file_extension=extension)
    assert path == f"videos/{item}.{stored}"
    end = {"item_id": item, "worker_id": "w", "status": "completed", "video_storage_path": path}
    assert client.post("/api/worker/report", json=end).status_code == 200


def test_a_path_may_begin_with_a_slash(client):
    """Supabase's client takes it away."""
    path = lease_of_new(client)["photo_storage_path"]
    body = {"operation": "download", "storage_path": f"/{path}"}
    assert client.post("/api/worker/presign", json=body).status_code == 200


@pytest.mark.parametrize(
    "header", [None, "", "Worker", "Worker wrong", "Basic test-key", b"Worker \xff\xfe", "test-key"]
)
def test_without_the_key_nobody_gets_in(client, header):
    """401 in the contract's shape, before the body is read; a header that is not ASCII is no crash."""
    client.headers.pop("authorization")
    headers = {} if header is None else {"authorization": header}
    for path in ("/api/worker/next-task", "/api/tasks", "/api/nowhere"):
        refused(client.post(path, headers=headers, content=b"x" * 10_000), 401, "key")
    assert client.get("/healthz").json() == {"success": True, "data": {"database": "ok", "storage": "ok"}}


def test_bearer_is_accepted_too(client):
    """One document says so."""
    assert client.get("/api/tasks", headers={"authorization": f"Bearer {KEY}"}).status_code == 200


def test_without_a_key_only_this_machine_and_no_web_page(tmp_path):
    """A name that resolves to loopback, and a page of another site, are refused; programs are not."""
    with app_client(config(tmp_path, api_key=None)) as client:
        assert client.get("/api/tasks").status_code == 200
        assert client.get("/api/tasks", headers={"host": "localhost:8000"}).status_code == 200
        assert client.get("/api/tasks", headers={"host": "[::1]:8000"}).status_code == 200
        assert client.get("/api/tasks", headers={"origin": "http://127.0.0.1:8000"}).status_code == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil", "", "[", "0.0.0.0"):
            refused(client.get("/api/tasks", headers={"host": host}), 403, "loopback")
        for origin in ("http://evil.example", "null", "http://127.0.0.1:9000"):
            refused(client.post("/api/worker/next-task", json={"worker_id": "w"}, headers={"origin": origin}), 403)


def test_a_database_that_is_gone_is_500_and_unhealthy(client, tmp_path):
    """The contract's 500 says to try again; the health check says what is wrong."""
    with closing(sqlite3.connect(tmp_path / "queue.db")) as connection:
        connection.execute("ALTER TABLE video_items RENAME TO elsewhere")
    refused(client.post("/api/worker/next-task", json={"worker_id": "w"}), 500, "try again")
    refused(client.get("/healthz"), 503)


@pytest.mark.parametrize(
    "key, headers, is_let_in",
    [
        (KEY, {}, False),
        (KEY, {"authorization": "Worker wrong"}, False),
        (KEY, {"authorization": f"Worker {KEY}"}, True),
        (None, {"host": "evil.example"}, False),
        (None, {"host": "127.0.0.1:8000", "origin": "http://evil.example"}, False),
        (None, {"host": "127.0.0.1:8000"}, True),
    ],
)
@pytest.mark.anyio
async def test_a_websocket_needs_what_any_request_needs(tmp_path, key, headers, is_let_in):
    """Whatever its path; browsers let pages of any site open one."""
    reached, sent = [], []

    async def app(scope, _receive, _send):
        reached.append(scope["type"])

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    scope = {
        "type": "websocket",
        "path": "/events",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await Guard(app, config(tmp_path, api_key=key))(scope, receive, send)
    assert (reached, sent) == ((["websocket"], []) if is_let_in else ([], ["websocket.close"]))


def test_the_docs_come_whole_from_here(client):
    """No address of another site, no script within the page, everything it names is answered; nobody may frame it."""
    client.headers.pop("authorization")
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "//" not in page.text
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=", page.text)
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(named) == 4
    for address in named:
        assert client.get(httpx.URL("http://127.0.0.1/docs").join(address).path).status_code == 200
    assert "openapi.json" in client.get("/docs/start.js").text
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "script-src" not in policy
    assert (page.headers["x-frame-options"], page.headers["x-content-type-options"]) == ("DENY", "nosniff")
    for other in (client.get("/nowhere"), client.get("/api/tasks"), client.get("/healthz")):
        assert "frame-ancestors 'none'" in other.headers["content-security-policy"]


@pytest.mark.parametrize("first_byte", [0, 4096])
def test_a_garbled_database_is_unhealthy(client, tmp_path, first_byte):
    """Also where only rows are, which nothing reads until somebody asks for them."""
    for _ in range(3):
        create(client, count="20", prompt="x" * 4000)
    assert client.get("/healthz").json()["success"]
    file = tmp_path / "queue.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with file.open("r+b") as garbled:
        garbled.seek(first_byte)
        garbled.write(random.Random(0).randbytes(file.stat().st_size - first_byte))
    answer = until(lambda: _unsound(client.get("/healthz")), 20, "it is noticed")  # what was found holds for a while
    refused(answer, 503, "the database is")


def _unsound(answer):
    return answer if answer.status_code != 200 else None


def test_secrets_do_not_show(tmp_path):
    """Not in a printed configuration."""
    shown = repr(config(tmp_path, database_url="postgresql://me:hidden@db/x", signing_secret="sealed"))
    assert not {word for word in (KEY, "hidden", "sealed") if word in shown}
