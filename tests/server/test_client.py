"""What apps do with the embedded queue, against the real one on loopback; each refusal is an error with its name."""

import http.server
import os
import threading

import anyio
import anyio.to_thread
import httpx
import pytest

from inference.errors import (
    DiskFull,
    InvalidPhoto,
    InvalidRequest,
    ItemMissing,
    QueueAuthError,
    QueueRefused,
    QueueUnavailable,
    StorageError,
    WrongState,
)
from inference.server.client import QueueClient
from tests.server.harness import KEY, complete, config, jpeg, running_server
from tests.support.disk import small_disk
from tests.support.proxy import Proxy, Record

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(tmp_path):
    """A queue server."""
    with running_server(config(tmp_path / "server")) as url:
        yield url


@pytest.fixture
def photo(tmp_path):
    """A photo on disk."""
    path = tmp_path / "휴가 [1].jpg"
    path.write_bytes(jpeg())
    return path


async def test_a_task_from_submitting_to_the_end(url, photo):
    """What was asked for is what the queue has; it can be cancelled and put back."""
    async with QueueClient(url, KEY) as client:
        first, second = await client.submit(photo, "천천히 줌인", seconds=3, count=2, group="trip")
        assert (first["prompt"], first["seconds"], first["status"]) == ("천천히 줌인", 3, "pending")
        assert first["group_id"] == second["group_id"]
        assert [task["id"] for task in await client.tasks()] == [second["id"], first["id"]]
        assert len(await client.tasks(limit=1)) == 1
        assert (await client.cancel(first["id"]))["status"] == "cancelled"
        assert [task["id"] for task in await client.tasks(status="cancelled")] == [first["id"]]
        assert (await client.retry(first["id"]))["status"] == "pending"


@pytest.mark.parametrize("suffix", ["", "/", "/api", "/api/"])
async def test_the_url_is_taken_with_and_without_api(url, suffix):
    """As deployments configure it."""
    async with QueueClient(url + suffix, KEY) as client:
        assert await client.tasks() == []


async def test_each_refusal_has_its_error(url, photo, tmp_path):
    """Each leads to a different line for the person at the terminal."""
    async with QueueClient(url, KEY) as client:
        [task] = await client.submit(photo)
        with pytest.raises(WrongState, match="only a failed or cancelled"):
            await client.retry(task["id"])
        with pytest.raises(WrongState, match="has no video"):
            await client.save_video(task["id"], tmp_path / "out.mp4")
        with pytest.raises(ItemMissing):
            await client.task("nobody")
        with pytest.raises(QueueRefused, match="seconds"):
            await client.submit(photo, seconds=1000)
        with pytest.raises(InvalidPhoto, match=r"gone\.jpg"):
            await client.submit(tmp_path / "gone.jpg")
        (tmp_path / "text.jpg").write_text("not a photo")
        with pytest.raises(InvalidPhoto, match=r"text\.jpg: the file is not a JPEG"):
            await client.submit(tmp_path / "text.jpg")
    for key in (None, "wrong"):
        async with QueueClient(url, key) as client:
            with pytest.raises(QueueAuthError, match="WORKER_API_KEY"):
                await client.tasks()
    async with QueueClient("http://127.0.0.1:1", KEY) as client:
        with pytest.raises(
            QueueUnavailable, match=r"no queue answers at http://127\.0\.0\.1:1.*start one with `i2v up`"
        ):
            await client.tasks()


async def test_bytes_that_are_no_text(url, photo):
    """A command line may hold any: a prompt of them is refused by name, a file may be called so, no task is."""
    no_text = os.fsdecode(b"\x9b\xff")
    renamed = photo.rename(photo.with_name(f"{no_text}.jpg"))
    async with QueueClient(url, KEY) as client:
        for field in ("prompt", "group"):
            with pytest.raises(InvalidRequest, match=f"{field}: not valid UTF-8"):
                await client.submit(renamed, **{field: no_text})
        assert len(await client.submit(renamed)) == 1
        with pytest.raises(ItemMissing):
            await client.delete(no_text)


async def test_a_full_disk_is_told_with_the_file(url, photo, tmp_path):
    """The name that the person gave, not the address the video came from."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        async with QueueClient(url, KEY) as client:
            [task] = await client.submit(photo)
            await anyio.to_thread.run_sync(complete, url, task["id"], bytes(200_000))
            with pytest.raises(DiskFull, match=r"disk/out\.mp4 cannot be written: there is no room left"):
                await client.save_video(task["id"], disk / "out.mp4")
            assert list(disk.iterdir()) == []


async def test_ids_cannot_leave_their_place_in_the_url(url):
    """An id comes from a command line: one with slashes or dots asks for no other resource."""
    async with QueueClient(url, KEY) as client:
        for item_id in ("../groups", "x/cancel", "?status=failed", "", "%2e%2e/groups"):
            with pytest.raises((ItemMissing, QueueRefused)):
                await client.task(item_id)


async def test_a_lost_object_is_said(url, photo, tmp_path):
    """The task is completed and its video is gone from the storage."""
    async with QueueClient(url, KEY) as client:
        [task] = await client.submit(photo)
        leased = await client._ask("POST", "worker/next-task", json={"worker_id": "w"})
        assert leased["item_id"] == task["id"]
        path = f"videos/{task['id']}.mp4"
        stored = tmp_path / "server" / "objects" / path
        stored.parent.mkdir()
        stored.write_bytes(b"mp4")
        report = {"item_id": task["id"], "worker_id": "w", "status": "completed", "video_storage_path": path}
        await client._ask("POST", "worker/report", json=report)
        stored.unlink()
        with pytest.raises((WrongState, StorageError), match="has no video"):
            await client.save_video(task["id"], tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("fault", ["drop reply", "cut reply", "drop request"])
async def test_an_answer_that_was_lost_makes_no_second_task(url, photo, fault, monkeypatch):
    """The request is repeated under its key, and the queue names the tasks it made the first time."""
    monkeypatch.setattr("inference.server.client.SUBMIT_PAUSES_S", (0, 0))
    faults = [fault]
    record = Record()
    with Proxy(httpx.URL(url).port, "client", record, lambda _: faults.pop() if faults else None) as proxy:
        async with QueueClient(proxy.url, KEY) as client:
            made = await client.submit(photo, count=2)
            assert [exchange.fault for exchange in record.of("tasks")] == [fault, None]
            assert [task["id"] for task in await client.tasks()] == [task["id"] for task in reversed(made)]
            assert len(made) == 2
            faults += ["drop request"] * 3
            with pytest.raises(QueueUnavailable):
                await client.submit(photo)
            assert faults == []


async def test_deleting(url, photo):
    """What is gone is gone, and said to be when it is asked for again."""
    async with QueueClient(url, KEY) as client:
        [task] = await client.submit(photo)
        await client.delete(task["id"])
        assert await client.tasks() == []
        with pytest.raises(ItemMissing, match="no task"):
            await client.delete(task["id"])


async def test_waiting_outlasts_a_server_that_is_started_again(url, photo, monkeypatch):
    """A task is followed to its end through questions that nobody answered."""
    monkeypatch.setattr("inference.server.client.POLL_S", 0.01)
    async with QueueClient(url, KEY) as client:
        [task] = await client.submit(photo)
        away = [QueueUnavailable("away")] * 5
        ask = client.task

        async def sometimes(item_id):
            if away:
                raise away.pop()
            await client.cancel(item_id)
            return await ask(item_id)

        client.task = sometimes
        assert [[it["status"] for it in look] async for look in client.follow([task])] == [["cancelled"]]
        away += [QueueUnavailable("away")] * 200
        with pytest.raises(QueueUnavailable):
            await anext(client.follow([task]))


async def test_many_are_followed_together(url, photo, monkeypatch):
    """In the order in which they were given, over pages of a group that has others; one that is deleted has ended."""
    monkeypatch.setattr("inference.server.client.POLL_S", 0.01)
    monkeypatch.setattr("inference.server.client.PAGE", 2)
    async with QueueClient(url, KEY) as client:
        await client.submit(photo, count=3, group="trip")
        tasks = await client.submit(photo, count=5, group="trip")
        [alone] = await client.submit(photo)
        group = tasks[0]["group_id"]
        assert [task["id"] for task in (await client.of_group(group))[:5]] == [task["id"] for task in tasks[::-1]]
        assert (len(await client.of_group(group)), await client.of_group("nobody")) == (8, [])
        looks = client.follow([*tasks, alone])
        assert {task["status"] for task in await anext(looks)} == {"pending"}
        await client.delete(tasks[0]["id"])
        for task in (*tasks[1:], alone):
            await client.cancel(task["id"])
        last = [look async for look in looks][-1]
    assert [task["id"] for task in last] == [task["id"] for task in (*tasks, alone)]
    assert [task["status"] for task in last] == ["deleted"] + ["cancelled"] * 5


class Application(http.server.BaseHTTPRequestHandler):
    """Answers every path as Next.js does one that it does not have: 404, and a page."""

    def do_GET(self):
        """See the class."""
        body = b"<!DOCTYPE html><html><body>404: This page could not be found.</body></html>"
        self.send_response(404)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, *_):
        """Nothing."""


async def test_a_queue_of_another_kind_is_told_from_ours(photo):
    """An application's has none of these routes: what they are for, and where that is, is all that helps."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Application) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        async with QueueClient(f"http://127.0.0.1:{server.server_port}", KEY) as client:
            for ask in (client.tasks(), client.submit(photo), client.task("1"), client.overview()):
                with pytest.raises(QueueRefused, match=r"is no queue of `i2v up` or `i2v serve`.*--url.*i2v doctor"):
                    await ask
        server.shutdown()


async def test_a_key_that_no_header_can_carry_is_not_told(url):
    """The words of whoever refuses it would be `Illegal header value b'Worker sekret '`."""
    async with QueueClient(url, "sekret ") as client:
        with pytest.raises(QueueUnavailable, match="LocalProtocolError") as caught:
            await client.tasks()
    assert "sekret" not in str(caught.value)
