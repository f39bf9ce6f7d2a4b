"""What every TaskQueue does, whatever its wire: in memory, the embedded server's, GmAnimato's, a table of jobs.

A test without `promise` is for all of them. The others say what they are about, and `NOT_PROMISED` which queue lacks it
and why.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from uuid import uuid4

import anyio
import httpx
import pytest
from sqlalchemy import create_engine, text

from inference.errors import CancelRequested, InvalidPhoto, ItemMissing, LeaseLost, ObjectMissing
from inference.progress.stages import Progress
from inference.queues.base import TaskQueue
from inference.queues.gmanimato import GmAnimatoQueue
from inference.queues.item import CRASHED, Item, ItemProgress
from inference.queues.lifeisshort import LifeIsShortQueue
from inference.server.rows.store import NewItem, NewPhoto, Store
from inference.task import Video
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage
from tests.queues.video_jobs.home import video_jobs_home
from tests.server import harness
from tests.support import next_app, postgres
from tests.support.gmanimato_app import GmAnimatoServer
from tests.support.s3_server import S3Server
from tests.support.supabase import Supabase

pytestmark = pytest.mark.anyio

HOMES = ["memory", "http over sqlite", "http over postgresql", "gmanimato", "video jobs", "next.js"]

NOT_PROMISED = {
    "gmanimato": {
        "lengths": "a job's length is in its workflow",
        "kinds": "every worker is handed every job",
        "given tasks": "jobs are handed out in their order alone",
        "backlog": "no route tells how many jobs wait",
        "fences": "the webhook knows a job by its id alone, so a lease is not told from another, nor ever lost to one",
        "taking back": "no status of the webhook puts a job back into the queue",
        "expiry": "a job that was handed out is never handed out again",
        "counters": "failures are not counted",
        "cancelling": "a person cannot cancel what a worker has",
        "stages": "its page shows percents, and nodes of the workflow",
    },
    "next.js": {
        "given tasks": "the worker API as documented hands out only the next",
        "backlog": "the worker API as documented does not tell how many wait",
    },
}
"""What a queue cannot do, by the name that its tests give it, and the reason."""

TESTED: set[str] = set()
"""The promises that tests are about."""


def promise(name: str) -> pytest.MarkDecorator:
    """For a test of what not every queue promises."""
    able = [home for home in HOMES if name not in NOT_PROMISED.get(home, {})]
    assert able != HOMES, f"{name}: all promise it"
    TESTED.add(name)
    return pytest.mark.parametrize("home", able, indirect=True)


class Home(Protocol):
    """Where the tasks of a queue live, seen from behind."""

    def connect(self, worker_id: str = "worker", worker_type: str | None = None) -> TaskQueue: ...
    def add(self, photo: bytes, **fields: object) -> str: ...
    def item(self, item_id: str) -> "Item | SeenJob": ...
    def expire(self, item_id: str) -> None: ...
    def cancel(self, item_id: str) -> None: ...
    def object(self, path: str) -> bytes | None: ...
    def put(self, path: str, body: bytes) -> None: ...
    def lose_photo(self, item_id: str) -> None: ...


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

    def lose_photo(self, item_id):
        """See Home."""
        del self.store.objects[self.item(item_id).photo_storage_path]


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

    def lose_photo(self, item_id):
        """See Home."""
        (self.folder / self.item(item_id).photo_storage_path).unlink()

    async def close(self):
        """Closes every connection."""
        for queue in self.connections:
            await queue.__aexit__()
        self.store.close()
        self.admin.dispose()


@dataclass
class SeenJob:
    """What can be seen of a GmAnimato job from behind; its names are those of Item."""

    status: str
    video_storage_path: str | None
    error_message: str | None
    progress: ItemProgress | None


class GmAnimatoHome:
    """GmAnimato's application on loopback, and a real bucket for its videos."""

    def __init__(self, app: GmAnimatoServer, s3: S3Server, storage: Storage):
        self.app, self.s3, self.storage = app, s3, storage
        self.bucket = Bucket(s3.url, s3.bucket, s3.key_id, s3.secret)
        self.connections: list[GmAnimatoQueue] = []

    def connect(self, worker_id="worker", worker_type=None):
        """See Home."""
        assert worker_type is None
        queue = GmAnimatoQueue(
            self.app.url, self.app.secret, worker_id=worker_id, storage=self.storage, bucket=self.bucket
        )
        self.connections.append(queue)
        return queue

    def add(self, photo, **fields):
        """See Home: a plain photo task is the flat form of a job."""
        return f"local-{self.app.add_flat(photo, **fields)}"

    def item(self, item_id):
        """See Home."""
        job = self.app.jobs[item_id.removeprefix("local-")]
        ends = self.app.finals(job.id)
        return SeenJob(
            job.status,
            job.final_url,
            ends[-1].body.get("error") if ends else None,
            None if job.percentage is None else ItemProgress(stage="", fraction=job.percentage / 100),
        )

    def object(self, path):
        """See Home: paths are URLs here."""
        return self.s3.object_bytes(path.removeprefix(f"{self.s3.url}/{self.s3.bucket}/"))

    def put(self, path, body):
        """See Home."""
        httpx.put(
            self.bucket.upload_url(path, content_type="video/mp4"), content=body, headers={"Content-Type": "video/mp4"}
        ).raise_for_status()

    def lose_photo(self, item_id):
        """See Home."""
        del item_id
        self.app.objects.clear()

    async def close(self):
        """Closes every connection."""
        for queue in self.connections:
            await queue.__aexit__()


class NextHome:
    """The example of a Next.js application, under Node; looked at through its Supabase."""

    def __init__(self, url: str, supabase: Supabase, storage: Storage):
        self.url, self.supabase, self.storage = url, supabase, storage
        self.connections: list[LifeIsShortQueue] = []

    def connect(self, worker_id="worker", worker_type=None):
        """See Home."""
        queue = LifeIsShortQueue(
            self.url, harness.KEY, worker_id=worker_id, worker_type=worker_type, storage=self.storage
        )
        queue.CONFIRM_AFTER_S = 0.01
        self.connections.append(queue)
        return queue

    def add(self, photo, **fields):
        """See Home: as the application's own route does it."""
        row = {"user_id": next(iter(self.supabase.users.values())), "group_id": str(uuid4()), **fields}
        row["photo_storage_path"] = f"{row['group_id']}/{uuid4()}_original.jpg"
        self.put(row["photo_storage_path"], photo)
        columns, values = ", ".join(row), ", ".join(["%s"] * len(row))
        text = f"insert into video_items ({columns}) values ({values}) returning id::text"
        [[item_id]] = self.supabase.sql(text, *row.values())
        return item_id

    def item(self, item_id):
        """See Home."""
        [[row]] = self.supabase.sql("select to_json(it) from video_items it where id = %s", item_id)
        times = {"created_at": 0, "updated_at": 0, "leased_until": None, "lease_seq": 0}
        progress = ItemProgress(stage=row["stage"], fraction=row["fraction"]) if row["stage"] else None
        shared = {name: row[name] for name in row.keys() & Item.model_fields.keys()}
        return Item(**shared | times, progress=progress)

    def expire(self, item_id):
        """See Home."""
        self.supabase.sql("update video_items set leased_until = now() - interval '1 s' where id = %s", item_id)

    def cancel(self, item_id):
        """See Home: what a page would have done for whoever presses the button."""
        self.supabase.sql("select cancel_video(%s)", item_id)

    def object(self, path):
        """See Home."""
        return self.supabase.objects.path(path).read_bytes()

    def put(self, path, body):
        """See Home."""
        self.supabase.put(path, body)

    def lose_photo(self, item_id):
        """See Home."""
        self.supabase.objects.remove(self.item(item_id).photo_storage_path)

    async def close(self):
        """Closes every connection."""
        for queue in self.connections:
            await queue.__aexit__()
        self.supabase.sql("truncate video_items")


@pytest.fixture(scope="module")
def next_server(postgres_server, tmp_path_factory):
    """One application for this module, and its Supabase."""
    with (
        postgres.database(postgres_server) as url,
        next_app.project(url, tmp_path_factory.mktemp("supabase")) as supabase,
        next_app.running(supabase) as address,
    ):
        supabase.sign_up("token")
        yield address, supabase


@asynccontextmanager
async def next_home(address: str, supabase: Supabase) -> AsyncIterator[NextHome]:
    """An empty table."""
    async with Storage(trusted_origins=[supabase.url]) as storage:
        home = NextHome(address, supabase, storage)
        yield home
        await home.close()


@asynccontextmanager
async def gmanimato_home(s3: S3Server) -> AsyncIterator[GmAnimatoHome]:
    """A running application."""
    with GmAnimatoServer() as app:
        async with Storage(trusted_origins=[app.url, s3.url]) as storage:
            home = GmAnimatoHome(app, s3, storage)
            yield home
            await home.close()


@pytest.fixture(scope="module")
def s3_server():
    """One bucket for this module."""
    with S3Server() as s3:
        yield s3


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


@pytest.fixture(params=HOMES)
async def home(request, tmp_path):
    """Each queue there is."""
    if request.param == "memory":
        yield MemoryHome()
    elif request.param == "http over sqlite":
        async with http_home(tmp_path, f"sqlite:///{tmp_path / 'queue.db'}") as made:
            yield made
    elif request.param == "gmanimato":
        async with gmanimato_home(request.getfixturevalue("s3_server")) as made:
            yield made
    elif request.param == "next.js":
        async with next_home(*request.getfixturevalue("next_server")) as made:
            yield made
    elif request.param == "video jobs":
        with postgres.database(request.getfixturevalue("postgres_server")) as url:
            async with video_jobs_home(url, request.getfixturevalue("s3_server")) as made:
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
    """Lease, beat, fetch, deliver, complete: the store has the video."""
    item_id = home.add(photo_bytes, prompt="파도가 친다")
    queue = home.connect("me")
    lease = await queue.lease()
    assert (lease.task.item_id, lease.task.prompt) == (item_id, "파도가 친다")
    assert lease.worker_id.startswith("me.")
    await queue.heartbeat(lease)
    inputs = await queue.fetch_inputs(lease, tmp_path)
    assert list(inputs) == ["photo"]
    assert inputs["photo"].read_bytes() == photo_bytes
    path = await queue.deliver(lease, video(b"frames"))
    await queue.complete(lease, path, video(b"frames"))
    item = home.item(item_id)
    assert (item.status, item.video_storage_path) == ("completed", path)
    assert home.object(path) == b"frames"
    assert await queue.lease() is None


@promise("fences")
async def test_the_store_knows_whose_a_video_is(home, photo_bytes, video):
    """Of the lease that ended the task."""
    item_id = home.add(photo_bytes)
    queue = home.connect("me")
    lease = await queue.lease()
    await queue.complete(lease, await queue.deliver(lease, video()), video())
    assert home.item(item_id).worker_id == lease.worker_id


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


@promise("lengths")
async def test_frames_are_seconds(home, photo_bytes):
    """At 24 a second, and one more."""
    home.add(photo_bytes, frame_num=73)
    assert (await home.connect().lease()).task.duration_s == 3.0


async def test_a_look_at_a_queue_leases_nothing(home, photo_bytes):
    """It is there and takes the key; where its storage is, if that can be known without a task."""
    home.add(photo_bytes)
    queue = home.connect()
    await queue.check()
    assert await queue.check_storage() in (None, "127.0.0.1")
    assert await queue.lease() is not None


@promise("kinds")
async def test_workers_ask_for_their_kind(home, photo_bytes):
    """worker_type hands out only tasks for that engine; no type takes any."""
    runway = home.add(photo_bytes, inference_provider="veo3.1")
    wan = home.add(photo_bytes, inference_provider="wan_local")
    lease = await home.connect(worker_type="wan").lease()
    assert (lease.task.item_id, lease.task.provider) == (wan, "wan_local")
    assert await home.connect(worker_type="wan").lease() is None
    assert (await home.connect().lease()).task.item_id == runway


@promise("given tasks")
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


@promise("given tasks")
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


@promise("backlog")
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


@promise("fences")
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
    assert home.item(item_id).status == "completed"


async def test_a_failure_is_reported_and_over(home, photo_bytes):
    """The reason is kept, and nobody gets the task again."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    await queue.fail(await queue.lease(), "the photo is broken")
    item = home.item(item_id)
    assert (item.status, item.error_message) == ("failed", "the photo is broken")
    assert await queue.lease() is None


@promise("fences")
async def test_a_failure_ends_the_lease(home, photo_bytes):
    """Whoever reported it holds nothing any more."""
    home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    await queue.fail(lease, "the photo is broken")
    with pytest.raises(LeaseLost):
        await queue.heartbeat(lease)


@promise("counters")
async def test_failures_are_counted(home, photo_bytes, video):
    """retry_count goes up by one; a completion, also a repeated one, is no failure."""
    failed, completed = home.add(photo_bytes), home.add(photo_bytes)
    queue = home.connect()
    await queue.fail(await queue.lease(), "the photo is broken")
    lease = await queue.lease()
    path = await queue.deliver(lease, video())
    for _ in range(2):
        await queue.complete(lease, path, video())
    assert [home.item(item_id).retry_count for item_id in (failed, completed)] == [1, 0]


async def test_releasing_is_handing_back_or_the_end(home, photo_bytes):
    """A queue that takes nothing back says so, and its task fails with the reason: it must not be left in silence."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    await queue.release(await queue.lease(), "the worker was stopped")
    item = home.item(item_id)
    if queue.hands_back:
        assert (await queue.lease()).task.item_id == item_id
    else:
        assert item.status == "failed"
        assert "the worker was stopped" in item.error_message
        assert await queue.lease() is None


@promise("taking back")
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


@promise("expiry")
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


@promise("expiry")
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


@promise("cancelling")
async def test_a_cancelled_task_tells_its_worker(home, photo_bytes, video):
    """The beat says so, a late completion is refused, and the task ends cancelled."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    home.cancel(item_id)
    with pytest.raises(CancelRequested):
        await queue.heartbeat(lease)
    path = "videos/late.mp4"
    with suppress(CancelRequested):  # a queue may look before it uploads
        path = await queue.deliver(lease, video())
    with pytest.raises((LeaseLost, CancelRequested)):
        await queue.complete(lease, path, video())
    assert home.item(item_id).status == "cancelled"


@promise("cancelling")
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
    assert home.item(item_id).progress.fraction == 0.5


@promise("stages")
async def test_progress_names_its_stage(home, photo_bytes):
    """As the engine calls it."""
    item_id = home.add(photo_bytes)
    queue = home.connect()
    lease = await queue.lease()
    await queue.heartbeat(lease)
    await queue.heartbeat(lease, Progress(stage="render", done=1, total=2, fraction=0.5))
    assert home.item(item_id).progress.stage == "render"


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
    home.lose_photo(item_id)
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


def test_what_is_not_promised_is_what_tests_are_about():
    """A reason without a test would excuse nothing."""
    assert {name for gaps in NOT_PROMISED.values() for name in gaps} == TESTED
