"""Nothing is left of what nobody needs: of a deleted task, a lost lease, an upload that was killed."""

import fcntl
import os
import subprocess
import sys
import time

import anyio
import pytest

from inference.errors import StorageUnavailable
from inference.server import tidy
from inference.server.objects import INCOMING, UNLOCKED_S, ObjectStore
from inference.server.rows.store import Store
from tests.server.harness import KEY, app_client, config, jpeg
from tests.support.processes import until


class Place:
    """A server in this process, and its folder."""

    def __init__(self, client, here):
        self.client, self.config = client, here
        self.store, self.objects = Store(here.database_url), ObjectStore(here.storage_dir)

    def submit(self, **form):
        """A new task."""
        answer = self.client.post("/api/tasks", data=form, files={"photo": ("a.jpg", jpeg(), "image/jpeg")})
        return answer.json()["data"]["items"][0]

    def lease(self, worker="w"):
        """The next task, held by a worker."""
        return self.ask("next-task", worker_id=worker)["item_id"]

    def ask(self, call, **body):
        """What a worker is answered."""
        return self.client.post(f"/api/worker/{call}", json=body).json()["data"]

    def url(self, item_id, extension="mp4"):
        """Where to store a video."""
        return self.ask("presign", operation="upload", video_item_id=item_id, file_extension=extension)["url"]

    def put(self, url):
        """Stores a video."""
        return self.client.put(url, content=b"video", headers={"content-type": "video/mp4"})

    def complete(self, item_id):
        """Makes the video of a task that w holds."""
        self.put(self.url(item_id))
        path = f"videos/{item_id}.mp4"
        self.ask("report", item_id=item_id, worker_id="w", status="completed", video_storage_path=path)

    def sweep(self, **options):
        """One round; how much it took away."""
        return sum(tidy.sweep(self.store, self.objects, self.config, **options))

    def files(self):
        """Every object."""
        folder = self.config.storage_dir
        return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def place(tmp_path):
    """An empty server."""
    here = config(tmp_path)
    with app_client(here, authorization=f"Worker {KEY}") as client:
        made = Place(client, here)
        yield made
        made.store.close()


def test_a_deleted_task_leaves_nothing(place):
    """Its row, its video, its photo and the folder of that are gone when the answer comes."""
    item = place.submit()
    place.complete(place.lease())
    assert place.files() == {item["photo_storage_path"], f"videos/{item['id']}.mp4"}
    answer = place.client.delete(f"/api/tasks/{item['id']}")
    assert (answer.status_code, answer.json()) == (200, {"success": True, "data": {"tasks": 1}})
    assert place.files() == set()
    assert not (place.config.storage_dir / item["group_id"]).exists()
    for call in (place.client.get, place.client.delete):
        assert call(f"/api/tasks/{item['id']}").status_code == 404


def test_the_photo_stays_for_the_other_tasks_of_it(place):
    """Until the last of them goes."""
    place.submit(count="2")
    second, first = place.client.get("/api/tasks").json()["data"]["items"]
    place.client.delete(f"/api/tasks/{second['id']}")
    assert place.files() == {first["photo_storage_path"]}
    place.client.delete(f"/api/tasks/{first['id']}")
    assert place.files() == set()


def test_a_deleted_group_leaves_nothing(place):
    """Whatever became of its tasks; another group is not touched."""
    other = place.submit()
    place.client.post(f"/api/tasks/{other['id']}/cancel")
    for _ in range(2):
        group = place.submit(group="Holiday")["group_id"]
    place.complete(place.lease())
    assert place.client.delete(f"/api/groups/{group}").json()["data"] == {"tasks": 2}
    assert place.files() == {other["photo_storage_path"]}
    assert place.client.get(f"/api/groups/{group}").status_code == 404
    assert place.client.delete(f"/api/groups/{group}").status_code == 404


def test_a_worker_whose_task_was_deleted_is_told_and_leaves_nothing(place):
    """404 to its beat and its report; what it still stores through a URL that it has is swept."""
    item = place.submit()["id"]
    place.lease()
    url = place.url(item)
    place.client.delete(f"/api/tasks/{item}")
    holder = {"item_id": item, "worker_id": "w"}
    assert place.client.post("/api/worker/heartbeat", json=holder).status_code == 404
    end = holder | {"status": "completed", "video_storage_path": f"videos/{item}.mp4"}
    assert place.put(url).status_code == 200
    assert place.client.post("/api/worker/report", json=end).status_code == 404
    assert place.files() == {f"videos/{item}.mp4"}
    assert place.sweep() == 1
    assert place.files() == set()
    assert place.put(url).status_code == 200  # it still holds, and is still looked after
    assert place.sweep() == 1


def test_what_a_lost_lease_left_goes_when_its_task_ends(place):
    """Not before: until then its worker might return and report it. The video that was reported stays."""
    item = place.submit()
    place.lease("w1")
    place.put(place.url(item["id"]))
    place.ask("heartbeat", item_id=item["id"], worker_id="w1", extend_seconds=1)
    assert place.sweep() == 0
    place.lease("w")
    path = f"videos/{item['id']}.second.mp4"
    place.put(place.url(item["id"], "second.mp4"))
    assert place.sweep() == 0
    place.ask("report", item_id=item["id"], worker_id="w", status="completed", video_storage_path=path)
    assert place.sweep() == 1
    assert place.files() == {item["photo_storage_path"], path}
    assert place.sweep() == 0


def test_the_video_of_a_failed_or_cancelled_task_goes(place):
    """Nobody can come to need it: a task that is put back in the line gets a new one, at the same path."""
    for end in ("fail", "cancel"):
        item = place.submit()
        place.lease()
        place.put(place.url(item["id"]))
        if end == "cancel":
            place.client.post(f"/api/tasks/{item['id']}/cancel")
        place.client.post("/api/worker/report", json={"item_id": item["id"], "worker_id": "w", "status": "failed"})
        assert place.sweep() == 1
        place.client.post(f"/api/tasks/{item['id']}/retry")
        place.complete(place.lease())
        assert place.client.get(f"/api/tasks/{item['id']}").json()["data"]["video_url"]


def test_what_this_database_has_not_heard_of_stays(place):
    """The folder may hold the objects of another queue, or of this one before its database was lost."""
    for name in ("videos/somebody.mp4", "group/photo_original.jpg", "notes.txt"):
        file = place.config.storage_dir / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"kept")
    assert place.sweep(stale_s=-60) == 0
    assert len(place.files()) == 3


def test_what_an_earlier_version_left_goes(place):
    """It wrote nothing down; but its tasks are known, and which video completed each."""
    done, failed = place.submit(), place.submit()
    place.complete(place.lease())
    place.ask("report", item_id=place.lease(), worker_id="w", status="failed")
    place.sweep()
    folder = place.config.storage_dir / "videos"
    for name in (f"{done['id']}.lost.mp4", f"{failed['id']}.mp4", "somebody.mp4"):
        (folder / name).write_bytes(b"left")
    list(tidy.adopt(place.store, place.objects))
    assert place.sweep() == 2
    assert {file.name for file in folder.iterdir()} == {f"{done['id']}.mp4", "somebody.mp4"}
    assert list(tidy.adopt(place.store, ObjectStore(place.config.storage_dir.with_name("empty")))) == [0]


def test_a_photo_whose_request_was_killed_goes(place):
    """In place, and no row came: after a day, or when asked for, since no request is under way."""
    place.store.removal.expect("group/photo_original.jpg")
    with place.objects.incoming() as file:
        place.objects.place(file, "group/photo_original.jpg")
    assert place.sweep() == 0
    assert place.sweep(stale_s=-60) == 1
    assert place.files() == set()


def test_retention_takes_tasks_that_ended_with_all_they_have(tmp_path):
    """Off unless set; then photo and video go with the task, and a task that has not ended stays."""
    here = config(tmp_path, retention_days=1)
    with app_client(here, authorization=f"Worker {KEY}") as client:
        place = Place(client, here)
        done, waiting = place.submit(), place.submit()
        place.complete(place.lease())
        assert place.sweep() == 0
        with place.store._database._connection() as connection:
            connection.execute("UPDATE video_items SET updated_at = updated_at - 90000")
        assert place.sweep() == 3  # a task, its video, its photo
        assert place.files() == {waiting["photo_storage_path"]}
        assert client.get(f"/api/tasks/{done['id']}").status_code == 404
        place.store.close()


WRITER = """
import sys
from inference.server.objects import ObjectStore
from pathlib import Path
with ObjectStore(Path(sys.argv[1])).incoming() as file:
    file.write(b"half of a video")
    file.flush()
    print(file.name, flush=True)
    sys.stdin.read()
"""


def test_a_body_that_a_kill_cut_off_goes_while_the_server_runs(tmp_path):
    """A minute later, not a day: its writer's lock ended with it. One that is still written to stays, however old."""
    objects = ObjectStore(tmp_path)
    command = [sys.executable, "-c", WRITER, tmp_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        left = tmp_path / INCOMING / os.path.basename(writer.stdout.readline().strip())  # noqa: PTH119
        assert left.exists()
        os.utime(left, (time.time(), time.time() - UNLOCKED_S - 1))
        assert objects.clear_incoming() == 0
        writer.kill()
        writer.wait()
        assert objects.clear_incoming() == 1
    assert not left.exists()
    recent, old = (tmp_path / INCOMING / name for name in ("recent", "old"))
    recent.write_bytes(b"x")
    assert objects.clear_incoming() == 0
    with old.open("wb") as file:  # nobody uploads for a day: a lock says nothing there
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(old, (0, 0))
        assert objects.clear_incoming() == 1
    assert recent.exists()


def test_a_server_sweeps_when_it_starts(tmp_path):
    """And from then on; what it cannot do now it does later."""
    here = config(tmp_path)
    with app_client(here, authorization=f"Worker {KEY}") as client:
        place = Place(client, here)
        item = place.submit()["id"]
        url = place.url(item)
        client.delete(f"/api/tasks/{item}")
        place.put(url)
    with app_client(here):
        until(lambda: not place.files(), 10, "the server has swept")
    place.store.close()


def test_trouble_does_not_end_the_sweeping(place, monkeypatch):
    """The disk fails once; the round after that goes through."""
    monkeypatch.setattr(tidy, "PAUSE_S", 0)
    item = place.submit()["id"]
    url = place.url(item)
    place.store.removal.delete(item)
    place.put(url)

    class Failing(ObjectStore):
        """A disk with a fault."""

        faults = 1

        def remove(self, name):
            """See ObjectStore."""
            if self.faults:
                self.faults -= 1
                raise StorageUnavailable("the disk is away")
            super().remove(name)

    async def until_swept():
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(tidy.keep_tidy, place.store, Failing(place.config.storage_dir), place.config)
            with anyio.fail_after(10):
                while place.files():
                    await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()

    anyio.run(until_swept)


def test_an_object_that_cannot_be_removed_now_goes_later(place):
    """The rows are gone, so the answer is yes; the next round sees to the rest."""
    item = place.submit()
    folder = place.config.storage_dir / item["group_id"]
    hidden = folder.rename(folder.with_name("elsewhere"))
    folder.write_bytes(b"")  # no folder any more: the disk gives trouble
    assert place.client.delete(f"/api/tasks/{item['id']}").status_code == 200
    folder.unlink()
    hidden.rename(folder)
    assert place.files() == {item["photo_storage_path"]}
    assert place.sweep() == 1
    assert place.files() == set()
