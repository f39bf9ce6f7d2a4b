"""What every TaskQueue does, whatever its wire: in memory, and the HTTP client against the embedded server."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import anyio
import pytest
from sqlalchemy import create_engine, text

from inference.errors import CancelRequested, InvalidPhoto, ItemMissing, LeaseLost, ObjectMissing
from inference.progress.tracker import Progress
from inference.queues.base import TaskQueue
from inference.queues.item import CRASHED, Item
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.server.rows.store import NewItem, NewPhoto, Store
from inference.task import Video
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from inference.transfer.storage import Storage
from tests.server import harness
from tests.support import postgres

pytestmark = pytest.mark.anyio


class Home(Protocol):
    """Where the tasks of a queue live, seen from behind."""

    def connect(self, worker_id: str = "worker", worker_type: str | None = None) -> TaskQueue: ...
    def add(self, photo: bytes, **fields: object) -> str: ...
    def item(self, item_id: str) -> Item: ...
    def expire(self, item_id: str) -> None: ...
    def cancel(self, item_id: str) -> None: ...
    def object(self, path: str) -> bytes | None: ...
    def put(self, path: str, body: bytes) -> None: ...
    def remove(self, path: str) -> None: ...


class MemoryHome:
    """The store in memory; its clock is moved by hand."""

    def __init__(self):
        self.now = 1000.0
        self.store = MemoryStore(lambda: self.now)

    def connect(self, worker_id="worker", worker_type=None):
        """See Home."""
        return MemoryQueue(self.store, worker_id=worker_id, worker_type=worker_type)

    def add(self, photo, **fields):
        """See Home."""
        return self.store.add(photo, **fields).id

    def item(self, item_id):
        """See Home."""
        return self.store.get(item_id)

    def expire(self, item_id):
        """See Home."""
        item = self.store.items[item_id]
        self.store.items[item_id] = item.model_copy(update={"leased_until": self.now - 1})

    def cancel(self, item_id):
        """See Home."""
        self.store.cancel(item_id)

    def object(self, path):
        """See Home."""
        return self.store.objects.get(path)

    def put(self, path, body):
        """See Home."""
        self.store.put(path, body)

    def remove(self, path):
        """See Home."""
        del self.store.objects[path]


class HttpHome:
    """The embedded server on loopback; looked at through its database and folder."""

    def __init__(self, url: str, database_url: str, folder: Path, storage: Storage):
        self.url, self.storage = url, storage
        self.store = Store(database_url)
        self.folder = folder
        self.admin = create_engine(self.store._database._url, isolation_level="AUTOCOMMIT")
        self.connections: list[LifeIsShortQueue] = []

    def connect(self, worker_id="worker", worker_type=None):
        """See Home."""
        queue = LifeIsShortQueue(
            self.url, harness.KEY, worker_id=worker_id, worker_type=worker_type, storage=self.storage
        )
        queue.CONFIRM_AFTER_S = 0.01  # no need to be patient with this server
        self.connections.append(queue)
        return queue

    def add(self, photo, **fields):
        """See Home."""
        new = NewPhoto(self.store.group(None), "")
        new = NewPhoto(new.group_id, f"{new.group_id}/{new.id}_original.jpg", id=new.id)
        self.put(new.storage_path, photo)
        return self.store.add(new, [NewItem(**fields)])[0].id

    def item(self, item_id):
        """See Home."""
        return self.store.get(item_id)

    def expire(self, item_id):
        """See Home."""
        with self.admin.connect() as connection:
            connection.execute(text("UPDATE video_items SET leased_until = 1 WHERE id = :id"), {"id": item_id})

    def cancel(self, item_id):
        """See Home."""
        self.store.cancel(item_id)

    def object(self, path):
        """See Home."""
        file = self.folder / path
        return file.read_bytes() if file.exists() else None

    def put(self, path, body):
        """See Home."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(body)

    def remove(self, path):
        """See Home."""
        (self.folder / path).unlink()

    async def close(self):
        """Closes every connection."""
        for queue in self.connections:
            await queue.__aexit__()
        self.store.close()
        self.admin.dispose()


@pytest.fixture(scope="module")
def postgres_server():
    """One PostgreSQL for this module."""
    with postgres.server() as url:
        yield url


@asynccontextmanager
async def http_home(folder: Path, database_url: str) -> AsyncIterator[HttpHome]:
    """A running server and everything to look behind it."""
    config = harness.config(folder, database_url)
    with harness.running_server(config) as url:
        async with Storage(trusted_origins=[url]) as storage:
            home = HttpHome(url, database_url, folder / "objects", storage)
            yield home
            await home.close()


@pytest.fixture(params=["memory", "http over sqlite", "http over postgresql"])
async def home(request, tmp_path):
    """Each queue there is."""
    if request.param == "memory":
        yield MemoryHome()
    elif request.param == "http over sqlite":
        async with http_home(tmp_path, f"sqlite:///{tmp_path / 'queue.db'}") as made:
            yield made
    else:
        with postgres.database(request.getfixturevalue("postgres_server")) as url:
            async with http_home(tmp_path, url) as made:
                yield made


@pytest.fixture
def video(tmp_path) -> Callable[[bytes], Video]:
    """Makes a video of some bytes."""

    def make(body: bytes = b"frames") -> Video:
        path = tmp_path / "clip.mp4"
        path.write_bytes(body)
        return Video(path=path, width=64, height=48, fps=24, frames=25, size_bytes=len(body))

    return make


async def test_an_empty_queue_has_nothing(home):
    """No task is not an error."""
    assert await home.connect().lease() is None


async def test_a_whole_life(home, photo_bytes, video, tmp_path):
    """Lease, beat, fetch, deliver, complete: the store has the video and knows whose it is."""
    item_id = home.add(photo_bytes, prompt="파도가 친다", frame_num=73)
    queue = home.connect("me")
    lease = await queue.lease()
    assert (lease.task.item_id, lease.task.prompt, lease.task.duration_s) == (item_id, "파도가 친다", 3.0)
    assert lease.worker_id.startswith("me.")
    await queue.heartbeat(lease)
    inputs = await queue.fetch_inputs(lease, tmp_path)
    assert list(inputs) == ["photo"]
    assert inputs["photo"].read_bytes() == photo_bytes
    path = await queue.deliver(lease, video(b"frames"))
    await queue.complete(lease, path, video(b"frames"))
    item = home.item(item_id)
    assert (item.status, item.video_storage_path, item.worker_id) == ("completed", path, lease.worker_id)
    assert home.object(path) == b"frames"
    assert await queue.lease() is None


async def test_oldest_first_and_each_lease_its_own_worker_id(home, photo_bytes):
    """Tasks come in the order they were added; the fencing token is never used twice."""
    added = [home.add(photo_bytes) for _ in range(3)]
    queue = home.connect()
    leases = [await queue.lease() for _ in range(3)]
    assert [lease.task.item_id for lease in leases] == added
    assert len({lease.worker_id for lease in leases}) == 3
    assert await queue.lease() is None


async def test_no_frame_num_means_five_seconds(home, photo_bytes):
    """No number, or null, is 121 frames at 24 fps."""
    home.add(photo_bytes)
    assert (await home.connect().lease()).task.duration_s == 5.0


async def test_a_look_at_a_queue_leases_nothing(home, photo_bytes):
    """It is there and takes the key; where its storage is, if that can be known without a task."""
    home.add(photo_bytes)
    queue = home.connect()
    await queue.check()
    assert await queue.check_storage() in (None, "127.0.0.1")
    assert await queue.lease() is not None


async def test_workers_ask_for_their_kind(home, photo_bytes):
    """worker_type hands out only tasks for that engine; no type takes any."""
    runway = home.add(photo_bytes, inference_provider="veo3.1")
    wan = home.add(photo_bytes, inference_provider="wan_local")
    lease = await home.connect(worker_type="wan").lease()
    assert (lease.task.item_id, lease.task.provider) == (wan, "wan_local")
    assert await home.connect(worker_type="wan").lease() is None
    assert (await home.connect().lease()).task.item_id == runway


async def test_a_given_task_and_no_other(home, photo_bytes):
    """It is leased out of its turn, once; the others keep theirs. That there is none of that name is said."""
    first, given, last = (home.add(photo_bytes) for _ in range(3))
    queue = home.connect("me")
    lease = await queue.lease(given)
    assert lease.task.item_id == given
    assert lease.worker_id.startswith("me.")
    await queue.heartbeat(lease)
    assert await queue.lease(given) is None
    with pytest.raises(ItemMissing, match="no task none"):
        await queue.lease("none")
    assert [(await queue.lease()).task.item_id for _ in range(2)] == [first, last]


async def test_a_given_task_that_may_not_be_leased(home, photo_bytes):
    """Held, failed, cancelled, given up, of another kind: the rules are those of any lease."""
    queue = home.connect(worker_type="wan")
    runway = home.add(photo_bytes, inference_provider="gen4_turbo")
    held, failed, cancelled, deadly = (home.add(photo_bytes) for _ in range(4))
    await queue.heartbeat(await queue.lease(held))
    await queue.fail(await queue.lease(failed), "no")
    home.cancel(cancelled)
    for _ in range(3):
        await queue.heartbeat(await queue.lease(deadly))
        home.expire(deadly)
    for item_id in (runway, held, failed, cancelled, deadly):
        assert await queue.lease(item_id) is None
    home.expire(held)
    assert (await queue.lease(held)).task.item_id == held
    assert home.item(held).crash_count == 1
    assert (await home.connect(worker_type="runway").lease(runway)).task.item_id == runway


async def test_the_backlog_is_what_could_be_leased(home, photo_bytes):
    """What waits and what ran out, of the connection's kind; not what is held, ended, or beyond leasing."""
    any_kind, wan, runway = (home.connect(worker_type=kind) for kind in (None, "wan", "runway"))
    assert [await queue.backlog() for queue in (any_kind, wan, runway)] == [0, 0, 0]
    home.add(photo_bytes, inference_provider="veo3.1")
    held, lapsed, cancelled, failed = (home.add(photo_bytes) for _ in range(4))
    assert [await queue.backlog() for queue in (any_kind, wan, runway)] == [5, 4, 1]
    leases = [await wan.lease(item_id) for item_id in (held, lapsed, cancelled, failed)]
    assert await wan.backlog() == 0
    home.expire(lapsed)
    home.cancel(cancelled)
    home.expire(cancelled)
    await wan.fail(leases[3], "no")
    assert [await queue.backlog() for queue in (any_kind, wan, runway)] == [2, 1, 1]
    for _ in range(3):
        await wan.heartbeat(await wan.lease(lapsed))
        home.expire(lapsed)
    assert await wan.backlog() == 0
    await wan.release(leases[0])
    assert await wan.backlog() == 1


async def test_an_expired_lease_goes_to_the_next_and_the_first_is_fenced(home, photo_bytes, video):
    """Whatever the overtaken worker tries, it learns that the task is not its own, and changes nothing."""
    item_id = home.add(photo_bytes)
    first, second = home.connect("first"), home.connect("second")
    old = await first.lease()
    await first.heartbeat(old)
    home.expire(item_id)
    new = await second.lease()
    assert new.task.item_id == item_id
    before = home.item(item_id)
    for late in (
        first.heartbeat(old),
        first.complete(old, "videos/old.mp4", video()),
        first.fail(old, "late"),
        first.release(old),
    ):
        with pytest.raises(LeaseLost):
            await late
    assert home.item(item_id) == before
    assert before.crash_count == 1
    await second.heartbeat(new)


async def test_completing_twice_is_completing_once(home, photo_bytes, video):
    """A report whose answer was lost can be repeated."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    path = await queue.deliver(lease, video())
    await queue.complete(lease, path, video())
    await queue.complete(lease, path, video())
    item = home.item(item_id)
    assert (item.status, item.retry_count) == ("completed", 0)


async def test_a_failure_is_reported_counted_and_over(home, photo_bytes):
    """retry_count goes up by one, the reason is kept, and the lease is gone."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    await queue.fail(lease, "the photo is broken")
    item = home.item(item_id)
    assert (item.status, item.retry_count, item.error_message) == ("failed", 1, "the photo is broken")
    with pytest.raises(LeaseLost):
        await queue.heartbeat(lease)
    assert await queue.lease() is None


async def test_a_released_task_is_free_at_once_and_uncounted(home, photo_bytes):
    """Handing back is no failure and no crash."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    await queue.release(lease)
    again = await home.connect("other").lease()
    item = home.item(item_id)
    assert again.task.item_id == item_id
    assert (item.retry_count, item.crash_count) == (0, 0)
    with pytest.raises(LeaseLost):
        await queue.heartbeat(lease)


async def test_three_silent_workers_are_enough(home, photo_bytes):
    """A task that kills its workers is given up, with the reason."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    for _ in range(3):
        lease = await queue.lease()
        assert lease.task.item_id == item_id
        await queue.heartbeat(lease)
        home.expire(item_id)
    assert await queue.lease() is None
    item = home.item(item_id)
    assert (item.status, item.error_message, item.crash_count) == ("failed", CRASHED, 3)


async def test_a_lease_that_reached_nobody_is_no_silent_worker(home, photo_bytes):
    """However often it runs out before anybody renewed it, the task waits for somebody who does."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    for _ in range(4):
        assert (await queue.lease()).task.item_id == item_id
        home.expire(item_id)
    await queue.heartbeat(await queue.lease())
    assert home.item(item_id).crash_count == 0


async def test_nothing_is_ever_overwritten(home, photo_bytes, video):
    """What lies at the usual path may be of an earlier prompt: the new video goes beside it and is the one reported."""
    item_id = home.add(photo_bytes)
    home.put(f"videos/{item_id}.mp4", b"of an earlier prompt")
    queue = home.connect()
    lease = await queue.lease()
    paths = [await queue.deliver(lease, video(body)) for body in (b"one", b"two")]
    assert home.object(f"videos/{item_id}.mp4") == b"of an earlier prompt"
    assert [home.object(path) for path in paths] == [b"one", b"two"]


async def test_a_cancelled_task_tells_its_worker(home, photo_bytes, video):
    """The beat says so, a late completion is refused, and the task ends cancelled."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    home.cancel(item_id)
    with pytest.raises(CancelRequested):
        await queue.heartbeat(lease)
    path = await queue.deliver(lease, video())
    with pytest.raises(LeaseLost):
        await queue.complete(lease, path, video())
    assert home.item(item_id).status == "cancelled"


async def test_releasing_a_cancelled_task_ends_it(home, photo_bytes):
    """The holder lets go, and nobody gets it again."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    home.cancel(item_id)
    await queue.release(lease)
    assert home.item(item_id).status == "cancelled"
    assert await queue.lease() is None


async def test_progress_reaches_the_queue(home, photo_bytes):
    """Beats carry the last snapshot, so that people can see how far it is."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    await queue.heartbeat(lease)
    await queue.heartbeat(lease, Progress(stage="render", done=1, total=2, fraction=0.5))
    progress = home.item(item_id).progress
    assert (progress.stage, progress.fraction) == ("render", 0.5)


async def test_a_photo_that_is_none_is_refused(home, tmp_path):
    """Bytes that do not decode are not handed to an engine."""
    home.add(b"<html>not found</html>")
    queue = home.connect()
    lease = await queue.lease()
    with pytest.raises(InvalidPhoto):
        await queue.fetch_inputs(lease, tmp_path)


async def test_a_photo_that_is_gone_is_said_to_be(home, photo_bytes, tmp_path):
    """Nothing another try could cure."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    home.remove(home.item(item_id).photo_storage_path)
    with pytest.raises(ObjectMissing):
        await queue.fetch_inputs(lease, tmp_path)


async def test_many_ask_at_once_and_nobody_shares(home, photo_bytes):
    """Leasing is atomic: twelve workers, eight tasks, eight leases."""
    added = {home.add(photo_bytes) for _ in range(8)}
    leases = []

    async def ask(number):
        leases.append(await home.connect(f"w{number}").lease())

    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(ask, number)
    taken = [lease.task.item_id for lease in leases if lease]
    assert sorted(taken) == sorted(added)
