"""The queue over a table of jobs: what lies where in the bucket, what whoever pushes jobs is told, and whole runs."""

import base64

import anyio
import httpx
import psycopg
import pytest

from inference.build.engines import choose_engine
from inference.build.queues import migrate_jobs, open_queue
from inference.errors import (
    CancelRequested,
    EngineFailed,
    InvalidPhoto,
    InvalidRequest,
    InvalidTask,
    ItemMissing,
    LeaseLost,
    ObjectMissing,
    QueueRefused,
    SettingsError,
    StorageAway,
    StorageUnavailable,
)
from inference.leasing.retry import Policy
from inference.leasing.runner import Runner
from inference.progress.stages import Progress
from inference.queues.video_jobs.queue import VideoJobsQueue
from inference.queues.video_jobs.wire import TOLD
from inference.settings import Settings
from inference.task import Lease, Video
from inference.testing.memory_jobs import MemoryJobs
from inference.transfer.bucket import Bucket
from inference.transfer.storage import Storage
from tests.leasing.test_runner import SleepyEngine
from tests.queues.video_jobs.subjects import OURS, SqlSubject
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.anyio

STALE_S = 480.0
CLIP = b"frames"


@pytest.fixture(scope="module")
def s3():
    """One bucket for this module; each test has jobs of its own."""
    with S3Server() as running:
        yield running


@pytest.fixture
async def storage(s3):
    """Reaches the bucket."""
    async with Storage(trusted_origins=[s3.url]) as opened:
        yield opened


def bucket_of(s3):
    """The bucket, with its key."""
    return Bucket(s3.url, s3.bucket, s3.key_id, s3.secret)


class Bench:
    """A queue over a table in memory, whose clock is moved by hand."""

    def __init__(self, s3, storage, name):
        self.s3, self.now, self.name = s3, 1000.0, name
        self.jobs = MemoryJobs(lambda: self.now, stale_s=STALE_S)
        self.queue = VideoJobsQueue(self.jobs, worker_id="me", storage=storage, bucket=bucket_of(s3))

    def put(self, key, body):
        """An object in the bucket."""
        url = self.queue._bucket.upload_url(key, content_type="image/jpeg")
        httpx.put(url, content=body, headers={"Content-Type": "image/jpeg"}).raise_for_status()

    def add(self, **content):
        """A job that waits."""
        job_id = f"{self.name}-{len(self.jobs.rows) + 1}"
        self.jobs.add(job_id, content or {"photo": "a.jpg"})
        return job_id


@pytest.fixture
def bench(s3, storage, request):
    """An empty table."""
    return Bench(s3, storage, request.node.name.partition("[")[0])


@pytest.fixture
def video(tmp_path):
    """A video of a few bytes."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(CLIP)
    return Video(path=path, width=64, height=48, fps=24, frames=25, size_bytes=len(CLIP))


async def test_a_lease_carries_its_attempt(bench):
    """As the last part of its worker_id; it survives the way to a container, and says how often to be heard of."""
    job_id = bench.add()
    lease = await bench.queue.lease()
    assert lease.worker_id == f"me.{bench.jobs.get(job_id).attempt_id}"
    assert (lease.length_s, lease.beat_interval_s) == (STALE_S, 10.0)
    assert Lease.model_validate_json(lease.model_dump_json()).token == bench.jobs.get(job_id).attempt_id


async def test_a_video_lies_under_its_job_and_attempt(bench, video):
    """A second upload of the same attempt is another object: the first may be there, and its answer lost."""
    job_id = bench.add()
    lease = await bench.queue.lease()
    folder = f"video-jobs/{job_id}/attempts/{lease.token}"
    assert await bench.queue.deliver(lease, video) == f"{folder}/final.mp4"
    video.path.write_bytes(b"other frames")
    assert await bench.queue.deliver(lease, video) == f"{folder}/final-2.mp4"
    assert bench.s3.object_bytes(f"{folder}/final.mp4") == CLIP
    await bench.queue.complete(lease, f"{folder}/final-2.mp4", video)
    assert bench.jobs.get(job_id).artifact_key == f"{folder}/final-2.mp4"
    assert bench.queue._deliveries == {}


async def test_photos_come_from_the_bucket_and_from_elsewhere(bench, photo_bytes, tmp_path):
    """A key, a URL and a data URI in one job; they keep the order of the job, and are verified."""
    bench.put("photos/one.jpg", photo_bytes)
    bench.put("photos/two.jpg", photo_bytes)
    url = bench.queue._bucket.download_url("photos/two.jpg")
    data = f"data:image/jpeg;base64,{base64.b64encode(photo_bytes).decode()}"
    bench.add(segments=[{"photo": url}, {"photo": "photos/one.jpg"}, {"photo": data}, {"photo": url}])
    lease = await bench.queue.lease()
    found = await bench.queue.fetch_inputs(lease, tmp_path)
    assert list(found) == ["photo-1", "photo-2", "photo-3"]
    assert len(set(found.values())) == 3
    assert all(path.read_bytes() == photo_bytes for path in found.values())


@pytest.mark.parametrize(
    "photo, error",
    [
        ("photos/gone.jpg", ObjectMissing),
        ("photos/page.jpg", InvalidPhoto),
        ("http://127.0.0.1:9/x.jpg", None),  # nobody there, and not allowed to look
        ("data:image/jpeg;base64,AAAA", InvalidPhoto),
    ],
)
async def test_a_photo_that_cannot_be_used(bench, tmp_path, photo, error):
    """Is the task's fault, and no outage of the bucket."""
    bench.put("photos/page.jpg", b"<html>")
    bench.add(photo=photo)
    with pytest.raises(error or Exception) as refused:
        await bench.queue.fetch_inputs(await bench.queue.lease(), tmp_path)
    assert not isinstance(refused.value, StorageAway)


async def test_a_bucket_that_is_away_is_an_outage(video, tmp_path):
    """Every other task would fail as well, so this one is handed back. A stranger's host is no such thing."""
    jobs = MemoryJobs()
    async with Storage(allow_private=True) as anywhere:
        nowhere = Bucket("http://127.0.0.1:9", "videos", "key", "secret")
        queue = VideoJobsQueue(jobs, worker_id="me", storage=anywhere, bucket=nowhere)
        jobs.add("a", {"photo": "a.jpg"})
        lease = await queue.lease()
        for work in (queue.fetch_inputs(lease, tmp_path), queue.deliver(lease, video)):
            with pytest.raises(StorageAway, match="cannot reach its bucket"):
                await work
        jobs.add("b", {"photo": "http://127.0.0.1:9/a.jpg"})
        with pytest.raises(StorageUnavailable) as refused:
            await queue.fetch_inputs(await queue.lease(), tmp_path)
        assert not isinstance(refused.value, StorageAway)


async def test_a_bucket_that_is_not_there_is_nobodys_fault(s3, storage, video):
    """Other attempts at an upload may find it."""
    jobs = MemoryJobs()
    wrong = Bucket(s3.url, "other", s3.key_id, s3.secret)
    queue = VideoJobsQueue(jobs, worker_id="me", storage=storage, bucket=wrong)
    jobs.add("a", {"photo": "a.jpg"})
    with pytest.raises(StorageUnavailable, match="nothing can be stored there"):
        await queue.deliver(await queue.lease(), video)


async def test_finished_segments_outlive_their_attempt(bench, video, tmp_path):
    """The next holder finds what the last one kept, under the same digest; another job does not."""
    bench.add()
    first = await bench.queue.lease()
    kept = bench.queue.segments(first)
    target = tmp_path / "segment.mp4"
    assert not await kept.find("digest", target)
    assert not target.exists()
    await kept.keep("digest", video.path)
    await bench.queue.release(first)
    second = await bench.queue.lease()
    assert second.task.item_id == first.task.item_id
    assert await bench.queue.segments(second).find("digest", target)
    assert target.read_bytes() == CLIP
    bench.add()
    assert not await bench.queue.segments(await bench.queue.lease()).find("digest", target)


async def test_a_cancelled_job_stops_at_every_boundary(bench, video, tmp_path):
    """At a beat, before a segment, and before the upload; whoever lost the job stops there, too."""
    job_id = bench.add()
    lease = await bench.queue.lease()
    bench.jobs.cancel(job_id)
    boundaries = (
        lambda: bench.queue.heartbeat(lease),
        lambda: bench.queue.segments(lease).find("digest", tmp_path / "segment.mp4"),
        lambda: bench.queue.deliver(lease, video),
    )
    for boundary in boundaries:
        with pytest.raises(CancelRequested):
            await boundary()
    stored = bench.s3.keys()
    assert not any(f"/{job_id}/" in key for key in stored)
    await bench.queue.release(lease)
    assert bench.jobs.get(job_id).status == "canceled"
    for boundary in boundaries:
        with pytest.raises(LeaseLost):
            await boundary()


@pytest.mark.parametrize("verb", ["complete", "fail"])
async def test_a_cancel_at_the_last_stage_is_told(bench, video, verb):
    """The end and the cancel were one statement; a repeated report hears the same."""
    job_id = bench.add()
    lease = await bench.queue.lease()
    path = await bench.queue.deliver(lease, video)
    bench.jobs.cancel(job_id)
    for _ in range(2):
        with pytest.raises(CancelRequested):
            await (bench.queue.complete(lease, path, video) if verb == "complete" else bench.queue.fail(lease, "no"))
    job = bench.jobs.get(job_id)
    assert (job.status, job.artifact_key, job.error) == ("canceled", None, None)
    await bench.queue.release(lease)  # as a runner does afterwards


async def test_a_malformed_job_fails_with_the_field(bench):
    """Whoever takes it next in line, or asks for it."""
    for ask in (bench.queue.lease, bench.queue.lease, bench.queue.acquire):
        job_id = bench.add(photo="a.jpg", seconds="five")
        with pytest.raises(InvalidTask, match="seconds: input should be a valid number") as refused:
            await (ask() if ask == bench.queue.lease else ask(job_id))
        assert refused.value.item_id == job_id
        job = bench.jobs.get(job_id)
        assert job.status == "failed"
        assert job.error == "malformed job: seconds: input should be a valid number"


async def test_whoever_asks_for_a_job_learns_where_it_stands(bench, video):
    """Taken, held by somebody alive, ended, not there: what the answers of a push application are made of."""
    job_id = bench.add()
    lease = await bench.queue.acquire(job_id)
    assert isinstance(lease, Lease)
    bench.now += 100
    held = await bench.queue.acquire(job_id)
    assert (held.job_status, held.is_held, held.has_ended) == ("processing", True, False)
    assert (held.attempt_id, held.retry_after_s) == (lease.token, STALE_S - 100)
    bench.now += STALE_S
    assert not (await bench.queue.standing(job_id)).is_held
    second = await bench.queue.acquire(job_id)
    assert second.token != lease.token
    await bench.queue.complete(second, await bench.queue.deliver(second, video), video)
    ended = await bench.queue.acquire(job_id)
    assert (ended.job_status, ended.is_held, ended.has_ended) == ("completed", False, True)
    assert (ended.attempt_id, ended.retry_after_s) == (second.token, None)
    for unknown in ("none", "", "a b", "x" * 201, "\x00", "파도"):
        with pytest.raises(ItemMissing, match="no task"):
            await bench.queue.acquire(unknown)
        with pytest.raises(ItemMissing, match="no task"):
            await bench.queue.standing(unknown)


async def test_sixteen_deliveries_in_one_process_are_one_attempt(bench):
    """The fence is the attempt, not the process."""
    job_id = bench.add()
    found = []

    async def ask():
        found.append(await bench.queue.acquire(job_id))

    async with anyio.create_task_group() as tasks:
        for _ in range(16):
            tasks.start_soon(ask)
    [lease] = [each for each in found if isinstance(each, Lease)]
    assert {each.attempt_id for each in found if each is not lease} == {lease.token}


async def test_what_no_worker_could_take_is_not_added(bench):
    """Its field is named to whoever adds it. One that is there stays as it is."""
    with pytest.raises(InvalidTask, match="photo: is missing"):
        await bench.queue.insert({}, "a")
    with pytest.raises(QueueRefused, match="no id of a job"):
        await bench.queue.insert({"photo": "a.jpg"}, "a b")
    assert bench.jobs.rows == {}
    for photo in ("a.jpg", "b.jpg"):
        assert await bench.queue.insert({"photo": photo}, "a") == "a"
    assert bench.jobs.get("a").input == {"photo": "a.jpg"}


async def test_a_beat_tells_progress_in_the_contracts_words(bench):
    """And one without any keeps the last."""
    job_id = bench.add(segments=[{"photo": "a.jpg"}, {"photo": "b.jpg"}])
    lease = await bench.queue.lease()
    await bench.queue.heartbeat(lease, Progress(stage="render", done=1, total=2, fraction=0.5))
    await bench.queue.heartbeat(lease)
    said = bench.jobs.get(job_id).progress
    assert set(said) == {*TOLD, "fraction"}
    assert (said["stage"], said["fraction"], said["segments_total"]) == ("render", 0.5, 2)


async def test_a_run_from_the_line_to_the_bucket(bench, photo_bytes):
    """The runner of any queue, unchanged."""
    bench.put("photos/a.jpg", photo_bytes)
    job_id = bench.add(photo="photos/a.jpg")
    outcome = await Runner(bench.queue, SleepyEngine(seconds=0)).run(await bench.queue.acquire(job_id))
    job = bench.jobs.get(job_id)
    assert (outcome.status, job.status, job.artifact_key) == ("completed", "completed", outcome.storage_path)
    assert bench.s3.object_bytes(job.artifact_key) == CLIP


async def test_what_may_pass_is_tried_once_more(bench, photo_bytes):
    """The job waits again, as a caller who is answered 503 expects; the second failure is its end, with the reason."""
    bench.put("photos/a.jpg", photo_bytes)
    job_id = bench.add(photo="photos/a.jpg")
    ends = []
    for _ in range(2):
        engine = SleepyEngine(seconds=0, errors=[EngineFailed("the sampler broke down")])
        runner = Runner(bench.queue, engine, policy=Policy(attempts=1))
        outcome = await runner.run(await bench.queue.acquire(job_id))
        ends.append((outcome.status, bench.jobs.get(job_id).status))
    assert ends == [("released", "queued"), ("failed", "failed")]
    assert bench.jobs.get(job_id).error == "the sampler broke down"


async def test_what_is_the_jobs_own_fault_is_not(bench, photo_bytes):
    """Asked again, it would end the same way."""
    bench.put("photos/a.jpg", photo_bytes)
    job_id = bench.add(photo="photos/a.jpg")
    engine = SleepyEngine(seconds=0, errors=[InvalidRequest("seconds: too many")])
    outcome = await Runner(bench.queue, engine).run(await bench.queue.acquire(job_id))
    assert (outcome.status, bench.jobs.get(job_id).status) == ("failed", "failed")


@pytest.mark.parametrize("moment", ["generating", "delivered"])
async def test_a_run_that_is_cancelled_ends_so(bench, photo_bytes, moment):
    """While the engine works, and between the upload and the report."""
    bench.put("photos/a.jpg", photo_bytes)
    job_id = bench.add(photo="photos/a.jpg")
    queue = bench.queue
    if moment == "delivered":
        deliver = queue.deliver

        async def late(lease, video):
            path = await deliver(lease, video)
            bench.jobs.cancel(job_id)
            return path

        queue.deliver = late
    lease = (await queue.acquire(job_id)).model_copy(update={"beat_interval_s": 0.05})
    engine = SleepyEngine(seconds=0 if moment == "delivered" else 30)
    outcomes = []
    async with anyio.create_task_group() as tasks:

        async def run():
            outcomes.append(await Runner(queue, engine, policy=Policy(second_beat_s=0.05)).run(lease))

        tasks.start_soon(run)
        while not engine.runs:
            await anyio.sleep(0.01)
        if moment == "generating":
            bench.jobs.cancel(job_id)
    assert outcomes[0].status == "cancelled"
    assert bench.jobs.get(job_id).status == "canceled"


async def test_a_beat_that_gets_no_answer_holds_nobody_up(database_url, s3, storage):
    """The keeper gives up on it in time, although a call to a database cannot be cancelled."""
    SqlSubject.prepare(database_url, OURS)
    subject = SqlSubject(database_url)
    queue = VideoJobsQueue(subject.store, worker_id="me", storage=storage, bucket=bucket_of(s3))
    subject.store.add("a", {"photo": "a.jpg"})
    lease = await queue.lease()
    with psycopg.connect(database_url) as other:
        other.execute("SELECT * FROM video_jobs FOR UPDATE")
        with pytest.raises(TimeoutError):
            with anyio.fail_after(0.2):
                await queue.heartbeat(lease)
    await queue.heartbeat(lease)
    subject.close()


def settings_for(s3, url, **more):
    """Of a worker on this table."""
    return Settings.isolated(
        queue="video_jobs",
        jobs_database_url=url,
        bucket_url=s3.url,
        bucket_name=s3.bucket,
        bucket_key_id=s3.key_id,
        bucket_secret=s3.secret,
        worker_id="me",
        **more,
    )


async def test_it_is_opened_from_settings(database_url, s3):
    """Under the names that an application has."""
    names = '{"input": "payload", "status": "state"}'
    settings = settings_for(s3, database_url, jobs_table="films", jobs_columns=names, jobs_stale_s=90)
    with pytest.raises(SettingsError, match="no table films: run `i2v push migrate`"):
        async with open_queue(settings):
            pass
    assert migrate_jobs(settings) == ["table films"]
    async with open_queue(settings) as queue:
        await queue.check()
        assert await queue.check_storage() == "127.0.0.1"
        await queue.insert({"photo": "a.jpg"}, "a")
        assert await queue.backlog() == 1
        lease = await queue.lease()
        assert (lease.length_s, lease.task.item_id) == (90, "a")
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT state, payload FROM films").fetchall() == [("processing", {"photo": "a.jpg"})]


async def test_there_is_no_queue_without_a_database_or_a_bucket(s3, database_url):
    """Debug or not: nothing else would do."""
    with pytest.raises(SettingsError, match="I2V_JOBS_DATABASE_URL is not set"):
        async with open_queue(settings_for(s3, None)):
            pass
    bare = Settings.isolated(queue="video_jobs", jobs_database_url=database_url)
    with pytest.raises(SettingsError, match="BUCKET_ENDPOINT_URL is not set"):
        async with open_queue(bare):
            pass
    with pytest.raises(SettingsError, match="I2V_JOBS_DATABASE_URL is not set"):
        migrate_jobs(settings_for(s3, None))


@pytest.mark.parametrize("names", ["payload", '["input"]', '{"input": 7}'])
def test_names_of_columns_are_json(s3, names):
    """Or it is said what they should be."""
    with pytest.raises(SettingsError, match="I2V_JOBS_COLUMNS: has to be a JSON object of names"):
        settings_for(s3, "postgresql://host/db", jobs_columns=names)


@pytest.mark.parametrize(
    "url, shown",
    [
        ("postgresql://me:secret@db.example:6543/app?sslmode=require", "postgresql://db.example:6543/app"),
        ("postgres://me:sec/ret@db.example/app", "postgresql://(hidden)"),
        ("postgresql+psycopg://db.example", "postgresql+psycopg://db.example"),
        ("postgresql://me:sec@ret@db.example/app", "postgresql://(hidden)"),
        ("postgresql://me:@/app?host=/tmp&password=secret", "postgresql:///app"),
    ],
)
def test_the_address_that_people_see_has_no_password(s3, url, shown):
    """In logs and errors."""
    settings = settings_for(s3, url)
    assert settings.queue_url == shown
    with pytest.raises(SettingsError) as refused:
        choose_engine(settings)
    assert "ret" not in str(refused.value)
    assert "ret@" not in repr(settings)
