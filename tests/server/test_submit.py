"""A request for videos that is repeated under its Idempotency-Key makes nothing new."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import pillow_heif
import pytest
from fastapi import UploadFile
from PIL import Image

from inference.errors import QueueUnavailable
from inference.media import child_process
from inference.server.objects import ObjectStore
from inference.server.rows.store import NewItem, NewPhoto, Once, Store
from inference.server.submit_api import add_items, store_photo
from tests.server.harness import KEY, app_client, config, jpeg
from tests.support.disk import small_disk


@pytest.fixture
def client(tmp_path):
    """A client with the key."""
    with app_client(config(tmp_path), authorization=f"Worker {KEY}") as client:
        yield client


def submit(client, key, photo=None, **form):
    """Asks for videos under a key."""
    files = {"photo": ("a.jpg", photo or jpeg(), "image/jpeg")}
    return client.post("/api/tasks", data=form, files=files, headers={"idempotency-key": key} if key else {})


def everything(client, tmp_path):
    """What there is: tasks, groups, objects."""
    tasks = client.get("/api/tasks").json()["data"]["items"]
    groups = client.get("/api/groups").json()["data"]["groups"]
    objects = [file for file in (tmp_path / "objects").rglob("*") if file.is_file()]
    return len(tasks), len(groups), len(objects)


def test_the_same_request_makes_its_tasks_once(client, tmp_path):
    """A lost answer is asked for again: the same tasks, as they are now. Another key, or none, makes new ones."""
    first = submit(client, "key-1", prompt="waves", count="2").json()["data"]
    client.post(f"/api/tasks/{first['items'][0]['id']}/cancel")
    again = submit(client, "key-1", prompt="waves", count="2")
    assert again.status_code == 201
    again = again.json()["data"]
    assert (again["group_id"], again["photo_id"]) == (first["group_id"], first["photo_id"])
    assert [task["id"] for task in again["items"]] == [task["id"] for task in first["items"]]
    assert [task["status"] for task in again["items"]] == ["cancelled", "pending"]
    assert everything(client, tmp_path) == (2, 1, 1)
    for key in ("key-2", None, None):
        assert submit(client, key, prompt="waves", count="2").status_code == 201
    assert everything(client, tmp_path) == (8, 4, 4)


@pytest.mark.parametrize(
    "other", [{"prompt": "wind"}, {"seconds": "6"}, {"count": "2"}, {"group": "x"}, {"photo": jpeg(color="red")}]
)
def test_another_request_under_the_same_key_is_refused(client, tmp_path, other):
    """It is a mistake of the client's, and nothing is made of it."""
    submit(client, "key", prompt="waves")
    answer = submit(client, "key", **{"prompt": "waves"} | other)
    assert answer.status_code == 409
    assert "came with another request" in answer.json()["error"]
    assert everything(client, tmp_path) == (1, 1, 1)


def test_a_photo_that_finds_no_room_is_not_malformed(client, monkeypatch, tmp_path):
    """It waits in the temporary folder until all of it is there. Whose disk is full has to know, and try again."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        answer = submit(client, None, photo=bytes(3_000_000))
        assert (answer.status_code, answer.json()["success"]) == (500, False)
        assert answer.json()["error"] == "an upload cannot be stored: No space left on device; try again later"
    assert everything(client, tmp_path) == (0, 0, 0)


@pytest.fixture
def no_heic_reader(tmp_path, monkeypatch):
    """Processes that decode photos find a package that does not load, as one built for another system."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/pillow_heif.py").write_text("raise ImportError('libheif.so.1: wrong ELF class')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    child_process.stop()  # those that were started before
    yield
    child_process.stop()


@pytest.mark.usefixtures("no_heic_reader")
def test_a_server_without_a_reader_for_heic_is_at_fault(client, tmp_path):
    """A family reads the answer: nothing is wrong with their photo, and pip is no word for them."""
    photo = BytesIO()
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), "teal")).save(photo)
    answer = submit(client, "key", photo.getvalue())
    assert (answer.status_code, answer.json()["error"]) == (500, "this machine has no reader for HEIC photos")
    assert submit(client, "key").status_code == 201  # other photos are read
    assert everything(client, tmp_path) == (1, 1, 1)


def test_a_request_that_failed_does_not_use_its_key(client, tmp_path):
    """Corrected, it may be sent under the same."""
    assert submit(client, "key", photo=b"no photo").status_code == 400
    assert submit(client, "key").status_code == 201
    assert everything(client, tmp_path) == (1, 1, 1)


def test_a_commit_whose_answer_was_lost_keeps_its_photo(tmp_path):
    """The tasks may have been made: their photo goes only if it has no row."""
    here = config(tmp_path)
    store, objects = Store(here.database_url), ObjectStore(here.storage_dir)

    class Losing(Store):
        """A database whose answers are lost, after the commit or before it."""

        def add(self, *added):
            """See Store."""
            if commits:
                super().add(*added)
            raise QueueUnavailable("the connection was lost")

    for commits in (True, False):
        losing = Losing(here.database_url)
        photo = UploadFile(BytesIO(jpeg()), filename="a.jpg")
        stored = store_photo(photo, None, losing, objects, 100_000)
        with pytest.raises(QueueUnavailable):
            add_items(stored, [NewItem()], None, store=losing, objects=objects, config=here)
        assert objects.exists(stored.storage_path) == commits
        assert len(store.list_items()) == 1
        losing.close()
    store.close()


def test_what_was_deleted_since_is_not_made_again(client):
    """The answer that comes late says so."""
    item = submit(client, "key").json()["data"]["items"][0]["id"]
    client.delete(f"/api/tasks/{item}")
    answer = submit(client, "key")
    assert answer.status_code == 409
    assert "deleted since" in answer.json()["error"]


def test_requests_at_once_make_their_tasks_once(tmp_path):
    """Four at the same moment, as from an impatient client: one of them makes the tasks, all are told of them."""
    with app_client(config(tmp_path), authorization=f"Worker {KEY}") as client:
        with ThreadPoolExecutor(4) as pool:
            answers = [answer.json()["data"] for answer in pool.map(lambda _: submit(client, "key"), range(4))]
        assert len({answer["items"][0]["id"] for answer in answers}) == 1
        assert everything(client, tmp_path) == (1, 1, 1)


def test_a_key_is_taken_once_on_each_database(sql):
    """Whoever comes second waits for the first, and gets what it made; the key outlives the connection."""
    once = Once("key", "fingerprint")

    def add(number):
        return sql.store.add(NewPhoto(f"new-{number}", f"photo-{number}"), [NewItem(), NewItem()], once)

    with ThreadPoolExecutor(4) as pool:
        made = [[item.id for item in items] for items in pool.map(add, range(4))]
    assert len({tuple(ids) for ids in made}) == 1
    assert [item.id for item in sql.store.made_by(once)] == made[0]
    assert len(sql.store.list_items()) == 2
    assert len(sql.store.list_groups()) == 2  # one is the fixture's
    sql.store.forget_keys(60)
    assert sql.store.made_by(once)
    sql.store.forget_keys(-60)
    assert sql.store.made_by(once) == []
