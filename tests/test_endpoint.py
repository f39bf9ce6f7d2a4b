"""An endpoint's worker, with engines that fail in every way; the real SDK and the real engine are in test_runpod.py."""

import asyncio
import base64
import io

import anyio
import numpy as np
import pytest
from PIL import Image

from inference.endpoint import REPLACED, STOPPING, Endpoint
from inference.engines.base import run_in_thread
from inference.errors import EngineLost, InvalidRequest, SettingsError, WeightsError
from inference.media.video import VideoWriter
from inference.settings import Settings

pytestmark = pytest.mark.anyio


def photo_base64():
    """A small photo."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


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

    async def generate(self, request, photo, folder, job):  # noqa: ARG002
        self.runs += 1
        self.started.set()
        job.report("render", 0, 1)
        await self.go_on.wait()
        if self.stuck is not None:
            await run_in_thread(job, self.stuck.wait, stop_grace_s=0.05)
        if self.errors:
            raise self.errors.pop(0)
        with VideoWriter(folder / "out.mp4", width=64, height=64, fps=24) as writer:
            for _ in range(3):
                writer.write(np.zeros((64, 64, 3), np.uint8))
        return writer.video(seed=request.seed)


class Box:
    """An endpoint around a fake engine, and what its jobs said meanwhile."""

    def __init__(self, folder, **settings):
        self.engine = FakeEngine()
        self.settings = Settings.isolated(temp_dir=folder, **settings)
        self.endpoint = Endpoint(self.settings)
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
    import threading

    box = Box(tmp_path, attempt_limit_s=0.2)
    box.engine.stuck = threading.Event()
    answer = await box.run()
    assert answer["error"] == "the fake engine made no video within 0.2 s"
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
    ],
)
async def test_what_cannot_end_well_is_refused_before_the_engine(box, change, told):
    """No GPU second is spent on it."""
    answer = await box.run({"id": "j1", "input": {**JOB["input"], **change}})
    assert told in answer["error"]
    assert (answer["retryable"], box.engine.runs) == (False, 0)


@pytest.mark.parametrize("asked", [{"drain": 2}, {"task": {"item_id": "a"}}])
async def test_an_endpoint_without_a_queue_says_so(box, asked):
    """Naming the setting."""
    answer = await box.run({"id": "j1", "input": asked})
    assert "VERCEL_API_URL" in answer["error"] or "group_id" in answer["error"]


async def test_the_last_snapshot_comes_before_the_answer(box):
    """A platform would take a late one for the state of the job."""
    box.engine.go_on = anyio.Event()
    arrived = anyio.Event()

    async def slow_post(snapshot):
        arrived.set()
        box.engine.go_on.set()
        await anyio.lowlevel.checkpoint()
        box.posted.append(snapshot)

    await box.endpoint.run(JOB, slow_post)
    before = len(box.posted)
    await anyio.lowlevel.checkpoint()
    assert arrived.is_set()
    assert len(box.posted) == before >= 1


async def test_a_cancelled_job_ends_before_its_call_does(box):
    """The engine is free again when the platform believes so, whatever way the cancellation came."""
    box.engine.go_on = anyio.Event()
    call = asyncio.create_task(box.run())
    await box.engine.started.wait()
    call.cancel()  # as the SDK does it
    with pytest.raises(asyncio.CancelledError):
        await call
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
    assert answers == [{"error": STOPPING, "retryable": True}]
    assert (await box.run())["error"] == STOPPING
    assert box.engine.runs == 1


async def test_an_engine_that_cannot_be_loaded_is_an_answer_too(tmp_path):
    """Where no fitness check ran before: on a laptop, or in a test of one job."""
    endpoint = Endpoint(Settings.isolated(engine="wan", weights_dir=tmp_path, temp_dir=tmp_path))
    with pytest.raises(EngineLost, match="i2v weights fetch"):
        endpoint.load()
    answer = await endpoint.run(JOB, Box(tmp_path).post)
    assert "i2v weights fetch" in answer["error"]
    assert answer["retryable"]
    assert issubclass(WeightsError, EngineLost)


async def test_settings_that_no_worker_can_have():
    """Told when it starts, by name."""
    with pytest.raises(SettingsError, match="I2V_ENGINE"):
        Endpoint(Settings.isolated(engine="runway"))
    with pytest.raises(SettingsError, match="BUCKET_NAME, BUCKET_SECRET_ACCESS_KEY: not set"):
        Endpoint(Settings.isolated(bucket_url="https://s3.example.com", bucket_key_id="k"))
