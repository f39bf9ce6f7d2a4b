"""An endpoint's worker, with engines that fail in every way; the real SDK and the real engine are in test_runpod.py."""

import asyncio
import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import anyio
import anyio.lowlevel
import numpy as np
import pytest
from PIL import Image

from inference.engines.base import run_in_thread
from inference.errors import DiskFull, EngineLost, InvalidRequest, SettingsError, WeightsError
from inference.leasing.executor import MAX_FAULTS_IN_A_ROW
from inference.media.video import VideoWriter
from inference.on_runpod.direct import SKEW
from inference.on_runpod.worker import REPLACED, STOPPING, RunPodWorker
from inference.settings import Settings
from inference.testing.memory_queue import MemoryQueue
from inference.testing.memory_store import MemoryStore
from tests.simulation.leases import PHOTO
from tests.support.redis_server import redis_server

pytestmark = pytest.mark.anyio


def photo_base64():
    """A small photo."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


TASK = {"item_id": "a1", "group_id": "g", "photo_id": "p", "photo_storage_path": "g/p.jpg"}
JOB = {"id": "j1", "input": {"photo_base64": photo_base64(), "prompt": "zoom in", "seconds": 1}}


class FakeEngine:
    """Makes a tiny video, or does what the test says."""

    name = "fake"

    def __init__(self):
        self.stages = {"render": 1.0}
        self.runs = 0
        self.errors = []
        self.started, self.go_on = anyio.Event(), anyio.Event()
        self.go_on.set()
        self.stuck = None
        self.stops_slowly = False
        self.before = anyio.lowlevel.checkpoint
        self.stopped = False

    async def check(self):
        """See Engine."""

    async def generate(self, request, inputs, folder, job):  # noqa: ARG002
        self.runs += 1
        self.started.set()
        await self.before()
        job.report("render", 0, 1)
        try:
            await self.go_on.wait()
        finally:
            if self.stops_slowly:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(0.05)
            self.stopped = True
        if self.stuck is not None:
            await run_in_thread(job, self.stuck.wait, stop_grace_s=0.05)
        if self.errors and (error := self.errors.pop(0)):
            raise error
        with VideoWriter(folder / "out.mp4", width=64, height=64, fps=24) as writer:
            for _ in range(3):
                writer.write(np.zeros((64, 64, 3), np.uint8))
        return writer.video(seed=request.seed)


class Box:
    """An endpoint around a fake engine, and what its jobs said meanwhile."""

    def __init__(self, folder, **settings):
        self.engine = FakeEngine()
        self.settings = Settings.isolated(temp_dir=folder, **settings)
        self.endpoint = RunPodWorker(self.settings)
        self.endpoint._engine = self.engine
        self.posted = []

    async def post(self, snapshot):
        self.posted.append(snapshot)

    async def run(self, job=JOB):
        """One job's answer."""
        return await self.endpoint.run(job, self.post)


@pytest.fixture
def box(tmp_path):
    """An endpoint without a queue."""
    return Box(tmp_path / "temp")


async def test_a_photo_becomes_a_video(box):
    """The answer has the mp4 and all that is known of it; nothing is left behind."""
    answer = await box.run()
    video = answer["video"]
    assert len(base64.b64decode(video["base64"])) == video["size_bytes"]
    assert (video["width"], video["height"], video["fps"], video["frames"], video["seconds"]) == (64, 64, 24, 3, 0.125)
    assert {"download", "wait", "render", "upload"} == answer["timings"].keys()
    assert list(box.settings.temp_dir.iterdir()) == []


async def test_an_engine_that_is_lost_takes_its_worker_along(box):
    """The job may be sent again, the platform is asked for another worker, and this one begins nothing more."""
    box.engine.errors = [EngineLost("the GPU does not work any more")]
    lost = {"error": "the GPU does not work any more", "retryable": True, "refresh_worker": True}
    assert await box.run() == lost
    assert await box.run() == {"error": REPLACED, "retryable": True, "refresh_worker": True}
    assert box.engine.runs == 1


async def test_a_bug_in_the_engine_leaves_the_gpu_suspect(box):
    """Nobody knows what it did to the memory there."""
    box.engine.errors = [RuntimeError("device-side assert triggered")]
    answer = await box.run()
    assert answer["error"] == "internal error: RuntimeError: device-side assert triggered"
    assert answer["refresh_worker"]


async def test_an_engine_that_hangs_takes_its_worker_along(tmp_path):
    """Its thread holds the GPU for good."""
    box = Box(tmp_path, attempt_limit_s=0.2)
    box.engine.stuck = threading.Event()
    answer = await box.run()
    assert answer["error"] == "the fake engine made no video within 0.2 s, which is I2V_ATTEMPT_LIMIT"
    assert (answer["retryable"], answer["refresh_worker"]) == (False, True)
    box.engine.stuck.set()


async def test_a_refused_request_costs_nobody_a_worker(box):
    """The next job runs here."""
    box.engine.errors = [InvalidRequest("seconds: no")]
    assert await box.run() == {"error": "seconds: no", "retryable": False}
    assert "video" in await box.run()


@pytest.mark.parametrize(
    "change, told",
    [
        ({"seconds": 13}, "seconds: a video of 13 s may not fit into an answer, which holds 10 MB; give an upload_url"),
        ({"preset": "a14b-fast"}, "preset: this endpoint runs preview; a14b-fast needs an endpoint of its own"),
        ({"photo_base64": "aGVsbG8gd29ybGQ="}, "photo"),
        ({"photo_url": "http://127.0.0.1:9/x.jpg", "photo_base64": None}, "127.0.0.1"),
        ({"photo_url": "http://169.254.169.254/latest", "photo_base64": None}, "169.254.169.254"),
        ({"upload_url": "http://127.0.0.1:9/x.mp4?sig=hush"}, "127.0.0.1 is at 127.0.0.1: not a public address"),
        ({"upload_url": "http://10.0.0.1/x.mp4"}, "10.0.0.1: not a public address"),
        (
            {"upload_url": "https://1.1.1.1/x.mp4?X-Amz-Date=20260101T000000Z&X-Amz-Expires=60&X-Amz-Signature=hush"},
            "upload_url: it ended at 2026-01-01 00:01:00 UTC; sign a new one",
        ),
        (
            {"upload_url": "https://1.1.1.1/x.mp4?sv=2026-02-06&sr=b&sp=cw&se=2026-01-01T00%3A01%3A00Z&sig=hush"},
            "upload_url: it ended at 2026-01-01 00:01:00 UTC; sign a new one",
        ),
        (
            {"upload_url": "https://1.1.1.1/x.mp4?X-Amz-SignedHeaders=host%3Bx-amz-acl&X-Amz-Signature=hush"},
            "upload_url: it is signed for headers that are not sent (x-amz-acl); sign host and Content-Type alone",
        ),
        (
            {"upload_url": "https://1.1.1.1/x.mp4?x-amz-checksum-crc32=AAAAAA%3D%3D&X-Amz-Signature=hush"},
            "upload_url: it is signed with the checksum of another body; sign without one",
        ),
    ],
)
async def test_what_cannot_end_well_is_refused_before_the_engine(box, change, told):
    """No GPU second is spent on it."""
    answer = await box.run({"id": "j1", "input": {**JOB["input"], **change}})
    assert told in answer["error"]
    assert (answer["retryable"], box.engine.runs) == (False, 0)


@pytest.mark.parametrize("asked", [{"drain": 2}, {"task": TASK, "worker_id": "cron.1"}])
async def test_an_endpoint_without_a_queue_says_so(box, asked):
    """Naming the setting."""
    answer = await box.run({"id": "j1", "input": asked})
    assert "VERCEL_API_URL is not set on this endpoint" in answer["error"]


class Panic(BaseException):
    """What Rust extensions raise: no Exception."""


@pytest.mark.parametrize("end", [Panic("index out of bounds"), SystemExit(3)])
async def test_an_engine_that_ends_like_nothing_else_takes_no_other_job_along(box, end):
    """The job is answered, the worker is to be replaced, and whoever comes until then is told so at once."""
    box.engine.errors = [end]
    answer = await box.run()
    assert answer["error"].startswith(f"the engine ended with {type(end).__name__}: {end}")
    assert (answer["retryable"], answer["refresh_worker"], box.endpoint.broken) == (True, True, True)
    assert await box.run() == {"error": REPLACED, "retryable": True, "refresh_worker": True}


async def test_a_job_that_waits_for_a_gpu_that_is_lost_does_not_get_it(box):
    """It would generate on what nobody trusts."""
    box.engine.go_on = anyio.Event()
    box.engine.errors = [EngineLost("the GPU does not work any more")]
    answers = []

    async def run():
        answers.append(await box.run())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        tasks.start_soon(run)
        await box.engine.started.wait()
        await anyio.wait_all_tasks_blocked()
        box.engine.go_on.set()
    assert box.engine.runs == 1
    assert all(answer["retryable"] and answer["refresh_worker"] for answer in answers)


async def test_a_disk_that_stays_full_ends_the_worker(box):
    """Three jobs in a row are enough to know: the next ones had better go elsewhere."""
    box.engine.errors = [DiskFull("there is no room left")] * 3
    answers = [await box.run() for _ in range(3)]
    assert ["refresh_worker" in answer for answer in answers] == [False, False, True]
    assert box.endpoint.broken


async def test_addresses_that_callers_name_end_no_worker(box):
    """A task of the queue whose address is refused shows wrong settings; here it is the job that is wrong."""
    for _ in range(MAX_FAULTS_IN_A_ROW + 1):
        answer = await box.run({"id": "j1", "input": {"photo_url": "http://10.0.0.1/x.jpg", "prompt": "pan left"}})
        assert "not a public address" in answer["error"]
        assert (answer["retryable"], "refresh_worker" in answer) == (False, False)
    assert "video" in await box.run()


async def test_a_fault_now_and_then_ends_nothing(box):
    """What comes between shows that it can work."""
    for error in (DiskFull("no room"), None) * 3:
        box.engine.errors = [error] if error else []
        await box.run()
    assert not box.endpoint.broken


async def test_the_last_snapshot_comes_before_the_answer(box):
    """A platform would take a late one for the state of the job."""
    box.engine.go_on = anyio.Event()
    arrived = anyio.Event()

    async def slow_post(snapshot):
        arrived.set()
        box.engine.go_on.set()
        await anyio.sleep(0.3)  # longer than all that is left to do
        box.posted.append(snapshot)

    await box.endpoint.run(JOB, slow_post)
    assert arrived.is_set()
    assert len(box.posted) == 1


async def test_a_cancelled_job_ends_before_its_call_does(box):
    """The engine is free again when the platform believes so, whatever way the cancellation came."""
    box.engine.go_on = anyio.Event()
    call = asyncio.create_task(box.run())
    await box.engine.started.wait()
    box.engine.stops_slowly = True
    call.cancel()  # as the SDK does it
    with pytest.raises(asyncio.CancelledError):
        await call
    assert box.engine.stopped
    assert list(box.settings.temp_dir.iterdir()) == []
    box.engine.go_on.set()
    assert "video" in await box.run()


async def test_a_stop_lets_a_job_finish_in_time(box):
    """Within the grace it is as if nothing had happened."""
    box.engine.go_on = anyio.Event()
    async with anyio.create_task_group() as tasks:
        answers = []

        async def run():
            answers.append(await box.run())

        tasks.start_soon(run)
        await box.engine.started.wait()
        tasks.start_soon(box.endpoint.close, 30)
        await anyio.lowlevel.checkpoint()
        box.engine.go_on.set()
    assert "video" in answers[0]


async def test_a_stop_ends_what_takes_longer(box):
    """With an answer that says to ask again; and nothing begins after it."""
    box.engine.go_on = anyio.Event()
    answers = []

    async def run():
        answers.append(await box.run())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await box.engine.started.wait()
        await box.endpoint.close(0.05)
    assert answers == [{"error": STOPPING, "retryable": True, "machine_at_fault": False}]
    assert (await box.run())["error"] == STOPPING
    assert box.engine.runs == 1


async def test_an_engine_that_cannot_be_loaded_is_an_answer_too(tmp_path):
    """Where no fitness check ran before: on a laptop, or in a test of one job."""
    endpoint = RunPodWorker(Settings.isolated(engine="wan", weights_dir=tmp_path, temp_dir=tmp_path))
    with pytest.raises(EngineLost, match="i2v weights fetch"):
        endpoint.load()
    answer = await endpoint.run(JOB, Box(tmp_path).post)
    assert "i2v weights fetch" in answer["error"]
    assert answer["retryable"]
    assert issubclass(WeightsError, EngineLost)


async def test_settings_that_no_worker_can_have():
    """Told when it starts, by name."""
    with pytest.raises(SettingsError, match="I2V_ENGINE"):
        RunPodWorker(Settings.isolated(engine="runway"))
    with pytest.raises(SettingsError, match="I2V_ENGINE is not set"):  # its queue would get previews
        RunPodWorker(Settings.isolated(api_url="https://app.example.com"))
    with pytest.raises(SettingsError, match="BUCKET_NAME, BUCKET_SECRET_ACCESS_KEY: not set"):
        RunPodWorker(Settings.isolated(bucket_url="https://s3.example.com", bucket_key_id="k"))


class Served(Box):
    """The same with a queue, in memory, that has tasks."""

    def __init__(self, folder, tasks, **settings):
        super().__init__(folder, **settings)
        self.store = MemoryStore(clock=anyio.current_time)
        self.ids = [self.store.add(PHOTO).id for _ in range(tasks)]

    async def open(self):
        """Opens the endpoint, then puts the queue into its place; what the queue says of another worker."""
        await self.endpoint._opened()
        self.endpoint._queue = MemoryQueue(store=self.store, worker_id="box")
        self.elsewhere = MemoryQueue(store=self.store, worker_id="cron")

    def statuses(self):
        """Of the tasks, in order."""
        return [self.store.items[item_id].status for item_id in self.ids]

    async def run_task(self):
        """A job with a task that somebody else leased."""
        lease = await self.elsewhere.lease()
        return await self.run({"id": "j1", "input": lease.model_dump(mode="json")})

    async def drain(self, count):
        """A job that takes them itself."""
        return await self.run({"id": "j1", "input": {"drain": count}})


async def test_tasks_are_told_of_and_learnt_from(tmp_path):
    """One hub and one history for all jobs, though each has a runner of its own."""
    with redis_server(tmp_path) as server:
        box = Served(tmp_path / "temp", 4, redis_url=server.url, gpu_usd_per_hour=3.6)
        await box.open()
        for _ in range(4):
            assert "error" not in await box.run_task()
        box.endpoint._executor.stopping.set()
        await box.endpoint._executor.close()
        await box.endpoint._serving
        groups = [box.store.get(item_id).group_id for item_id in box.ids]
        told = [json.loads(server.events(group)[-1]) for group in groups]
    assert {event["type"] for event in told} == {"completion"}
    assert all(event["result"]["cost_usd"] > 0 for event in told)
    assert box.endpoint._history.medians("fake, 5 s")["render"] > 0


async def test_a_wrong_address_of_redis_keeps_no_task(tmp_path):
    """Nobody hears of it; a worker that could not begin would be replaced by another one like it for ever."""
    box = Served(tmp_path, 1, redis_url="redis.example.com")
    await box.open()
    assert "error" not in await box.run_task()


async def test_a_task_and_what_there_is(tmp_path):
    """A lease is run where it came, a drain takes the rest, and both say what the queue knows."""
    box, told = Served(tmp_path, 4), anyio.Event()
    await box.open()

    async def post(snapshot):
        if snapshot["stage"] == "drain":
            told.set()

    async def before():
        if box.engine.runs == 3:  # the drain's second: by then its first has ended, and somebody is to hear of it
            await told.wait()

    box.post, box.engine.before = post, before
    answer = await box.run_task()
    assert (answer["item_id"], answer["status"], answer["video"]["frames"]) == (box.ids[0], "completed", 3)
    drained = await box.drain(9)
    assert (drained["completed"], [it["item_id"] for it in drained["tasks"]]) == (3, box.ids[1:])
    assert box.statuses() == ["completed"] * 4


async def test_a_task_that_comes_too_late_is_handed_back(tmp_path):
    """A worker that is being replaced, or stopped, gives it to the next one at once."""
    box = Served(tmp_path, 2)
    await box.open()
    box.engine.errors = [EngineLost("the GPU does not work any more")]
    assert (await box.run())["refresh_worker"]
    answer = await box.run_task()
    assert (answer["error"], answer["retryable"]) == (REPLACED, True)
    assert (await box.drain(2))["error"] == REPLACED
    assert box.engine.runs == 1
    assert box.statuses() == ["pending", "pending"]


async def test_a_drain_ends_with_its_gpu(tmp_path):
    """What it holds goes back uncounted; it takes no more, and tells what was done before."""
    box = Served(tmp_path, 6)
    await box.open()
    box.engine.errors = [None, EngineLost("the GPU does not work any more")]
    answer = await box.drain(6)
    assert answer["completed"] == 1
    assert len(answer["tasks"]) <= 3  # what it held when the GPU went
    assert answer["refresh_worker"]
    assert {it["status"] for it in answer["tasks"]} == {"completed", "released"}
    assert box.statuses().count("completed") == 1
    assert "failed" not in box.statuses()
    assert box.engine.runs == 2


async def test_a_stopped_drain_says_what_it_did(tmp_path):
    """The rest goes back to the queue."""
    box = Served(tmp_path, 3, shutdown_grace_s=0.05, concurrency=1)
    await box.open()
    answers = []

    async def run():
        answers.append(await box.drain(3))

    second = anyio.Event()

    async def hold():
        if box.engine.runs == 2:
            box.engine.go_on = anyio.Event()
            second.set()

    box.engine.before = hold
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await second.wait()
        await box.endpoint.close(0.05)
    [answer] = answers
    assert (answer["completed"], answer["tasks"][0]["item_id"]) == (1, box.ids[0])
    assert box.statuses()[0] == "completed"
    assert box.engine.runs == 2


async def test_the_wrong_holder_is_told_what_to_give(tmp_path):
    """A job that does not say who leased its task cannot be right by chance."""
    box = Served(tmp_path, 1)
    await box.open()
    lease = await box.elsewhere.lease()
    task = {"item_id": lease.task.item_id, "group_id": "g", "photo_id": "p", "photo_storage_path": "g/p.jpg"}
    answer = await box.run({"id": "j1", "input": {"task": task}})
    assert answer["error"].endswith("give the worker_id that it was leased under")
    assert (answer["status"], answer["retryable"], box.engine.runs) == ("lease_lost", False, 0)


@pytest.fixture
def storage():
    """Takes what is PUT; loses the answers that a test says, and refuses to overwrite."""

    class Handler(BaseHTTPRequestHandler):
        stored: ClassVar[dict[str, bytes]] = {}
        lost = 0

        def do_PUT(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path in self.stored:
                self.answer(
                    409, b'{"statusCode": "409", "error": "Duplicate", "message": "The resource already exists"}'
                )
                return
            self.stored[self.path] = body
            if type(self).lost:
                type(self).lost -= 1
                self.close_connection = True
                return
            self.answer(200, b"{}")

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


async def test_a_video_whose_upload_was_not_answered_is_there(tmp_path, storage):
    """The second try finds it: that is no failure, and no reason to generate again. The answer has the whole URL."""
    handler, url = storage
    handler.lost = 1
    box = Box(tmp_path, allow_private_addresses=True)
    put = f"{url}/{'long/' * 60}a.mp4"
    answer = await box.run({**JOB, "input": {**JOB["input"], "upload_url": f"{put}?token=hush"}})
    assert answer["video"]["url"] == put
    assert len(handler.stored[put.removeprefix(url) + "?token=hush"]) == answer["video"]["size_bytes"]
    again = await box.run({**JOB, "input": {**JOB["input"], "upload_url": f"{put}?token=hush"}})
    assert "Duplicate" in again["error"]
    assert not again["retryable"]


async def test_a_place_that_ended_by_this_clock_alone_is_tried(tmp_path, storage):
    """A worker's clock may be fast; who signed knows."""
    _, url = storage
    box = Box(tmp_path, allow_private_addresses=True)
    for end in (int(time.time()) - 1800, 253402300799):
        assert "video" in await box.run({**JOB, "input": {**JOB["input"], "upload_url": f"{url}/{end}?Expires={end}"}})


async def test_a_place_that_ended_while_a_job_waited_costs_nothing(tmp_path, storage):
    """Its turn comes, and is left to the next."""
    _, url = storage
    box = Box(tmp_path, allow_private_addresses=True)
    box.engine.go_on, answers = anyio.Event(), []
    end = time.time() + 0.3
    late_by_any_clock = end - SKEW.total_seconds()
    claims = base64.urlsafe_b64encode(json.dumps({"exp": late_by_any_clock}).encode()).decode().rstrip("=")

    async def late():
        answers.append(await box.run({**JOB, "input": {**JOB["input"], "upload_url": f"{url}/a?token=e30.{claims}.c"}}))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(box.run)
        await box.engine.started.wait()
        tasks.start_soon(late)
        while time.time() < end:
            await anyio.sleep(0.01)
        box.engine.go_on.set()
    assert answers[0]["error"].startswith("upload_url: it ended at ")
    assert (answers[0]["retryable"], box.engine.runs) == (False, 1)


async def test_strangers_gain_nothing_by_what_the_operator_trusts(tmp_path, storage):
    """The bucket's host may be anywhere for the operator's own uploads; a caller's URLs may not lead there."""
    handler, url = storage
    own = {"bucket_url": url, "bucket_name": "b", "bucket_key_id": "k", "bucket_secret": "s", "api_url": url}
    box = Box(tmp_path, **own)
    assert (await box.run())["video"]["url"].startswith(f"{url}/b/j1.mp4?")
    stored = len(handler.stored)
    for asked in ({"upload_url": f"{url}/evil.mp4"}, {"photo_url": f"{url}/b/j1.mp4", "photo_base64": None}):
        answer = await box.run({"id": "j2", "input": {**JOB["input"], **asked}})
        assert "not a public address" in answer["error"]
    brought = {"accessId": "k", "accessSecret": "s", "bucketName": "b", "endpointUrl": url}
    assert "not a public address" in (await box.run({**JOB, "id": "j3", "s3Config": brought}))["error"]
    assert (len(handler.stored), box.engine.runs) == (stored, 1)


async def test_an_odd_job_id_makes_a_plain_key(tmp_path, storage):
    """It never leaves the bucket."""
    handler, url = storage
    box = Box(tmp_path, bucket_url=url, bucket_name="b", bucket_key_id="k", bucket_secret="s")
    await box.run({**JOB, "id": "../../etc/x y"})
    assert "X-Amz-Expires=86400" in [*handler.stored][-1]  # as long as a job may wait for the engine, and work
    assert [path.partition("?")[0] for path in handler.stored][-1] == "/b/______etc_x_y.mp4"
