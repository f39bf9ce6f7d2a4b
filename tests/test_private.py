"""Nobody else on the machine reads what is kept here: whatever the umask, and what earlier versions left open."""

import os
import stat
from contextlib import contextmanager

import anyio
import httpx
import pytest

from inference import private
from inference.build.server import build_server_config
from inference.on_runpod.tick import alone
from inference.payments.records import SqliteRecords
from inference.settings import Settings
from tests.server.harness import app_client, jpeg, running_server


@contextmanager
def umask(mask):
    """For the length of a block, as processes are started with it."""
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_to_others(path):
    """What others can reach from here on: into a folder without rights for them nobody comes."""
    if not stat.S_IMODE(path.lstat().st_mode) & 0o077:
        return []
    return [path, *(each for child in (path.iterdir() if path.is_dir() else ()) for each in open_to_others(child))]


@pytest.fixture(params=["new", "left open"])
def folder(request, tmp_path):
    """Where something is kept: a new place, or one in which everybody may read and write what lies there."""
    return request.param, tmp_path / "kept"


def twice(folder, keep):
    """Keeps something in a new place; where an earlier version did so, opens it all up and goes on."""
    kind, path = folder
    with umask(0):
        keep(path)
        if kind == "left open":
            for each in (path, *path.rglob("*")):
                each.chmod(0o777 if each.is_dir() else 0o666)
            keep(path)
    return open_to_others(path)


def test_the_queue_and_its_photos(folder):
    """Rows, also those still in the write-ahead log, photos, and the key that signs."""

    def keep(path):
        settings = Settings.isolated(data_dir=path, api_key="k")
        with running_server(build_server_config(settings)) as url:
            files, headers = {"photo": ("a.jpg", jpeg(), "image/jpeg")}, {"authorization": "Worker k"}
            assert httpx.post(f"{url}/api/tasks", files=files, headers=headers).status_code == 201
            there = {each.name for each in path.iterdir()}
            assert {"queue.db", "queue.db-wal", "queue.db-shm", "signing.key", "objects"} <= there
            running.append(open_to_others(path))

    running = []
    assert twice(folder, keep) == []
    assert running[-1] == []


def test_what_was_paid_for(folder):
    """The ledger, and the lock of a dispatcher beside it."""

    def keep(path):
        anyio.run(SqliteRecords(path / "ledger.db").put, "a", "1")
        with alone(Settings.isolated(ledger_path=path / "ledger.db", runpod_endpoint_id="ep1")) as is_alone:
            assert is_alone

    assert twice(folder, keep) == []


def test_a_folder_that_holds_other_things_stays_open(tmp_path):
    """Somebody named it, and others may have to read what else is there; what is ours in it is closed."""
    tmp_path.chmod(0o755)
    (tmp_path / "index.html").touch(0o644)
    anyio.run(SqliteRecords(tmp_path / "ledger.db").put, "a", "1")
    with app_client(build_server_config(Settings.isolated(data_dir=tmp_path))) as client:
        assert client.get("/healthz").status_code == 200
    assert {path.name for path in open_to_others(tmp_path)} == {tmp_path.name, "index.html"}


def test_what_is_not_ours_is_left_alone(tmp_path):
    """A link leads somewhere else, and a folder with the sticky bit is there for all."""
    target = tmp_path / "target"
    target.touch()
    target.chmod(0o644)
    (tmp_path / "link").symlink_to(target)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    for path in (tmp_path / "link", shared, tmp_path / "gone"):
        private.close(path)
    private.make_folder(shared)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target, shared)] == [0o644, 0o1777]
    if os.geteuid() == 0:  # who alone can give a file away
        os.chown(target, 65534, -1)
        private.close(target)
        assert stat.S_IMODE(target.stat().st_mode) == 0o644
