"""The RunPod worker as RunPod runs it: a real process, the real SDK and its job loop, the real engine (`tiny`, CPU).

The platform is `tests/support/runpod_cloud.py`, the queue an `i2v serve`, the storage an S3 that checks signatures.
"""

import base64
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from inference.media.video import probe
from inference.on_runpod.wire import INLINE_BYTES
from inference.transfer.bucket import Bucket
from tests.support.processes import KEY, Site, environment, jpeg, until
from tests.support.runpod_cloud import STAND_INS, RunPodCloud
from tests.support.s3_server import S3Server

ROOT = Path(__file__).parents[2]
ODD = ROOT / "tests" / "support" / "odd_worker.py"
PHOTO = base64.b64encode(jpeg()).decode()
DIRECT = {"photo_base64": PHOTO, "prompt": "zoom in", "seconds": 1, "seed": 7}
PATIENCE_S = 90  # for a worker that imports torch on a busy machine

pytestmark = pytest.mark.timeout(240)


class House:
    """An endpoint with its platform, its queue and its storage; workers move in as tests ask for them."""

    def __init__(self, folder, cloud, site, s3):
        self.folder, self.cloud, self.site, self.s3 = folder, cloud, site, s3

    def worker(self, pod_id="pod1", script=ROOT / "runpod_handler.py", **settings):
        """A worker of this endpoint, started and not waited for. Its temporary files are in `temp`."""
        own = {
            "VERCEL_API_URL": self.site.url,
            "WORKER_API_KEY": KEY,
            "TEMP_DIR": self.folder / "temp",
            "I2V_WEIGHTS_DIR": self.folder / "weights",
            "I2V_ALLOW_PRIVATE_ADDRESSES": "true",
            "I2V_ENGINE": "preview",
            "I2V_SHUTDOWN_GRACE": "0.2",
        }
        env = {name: str(value) for name, value in (own | settings).items()}
        return self.cloud.worker(self.folder / pod_id, script=script, pod_id=pod_id, env=env)

    def answer(self, payload, **top):
        """The finished job of an input."""
        return self.cloud.wait(self.cloud.run(payload, **top), PATIENCE_S)

    def lease(self, holder="cron.1", length_s=60):
        """The next task, leased by somebody else than the worker."""
        asked = {"worker_id": holder, "lease_duration_seconds": length_s}
        return self.site.ask("POST", "worker/next-task", json=asked)

    def until_stage(self, worker, name, stage):
        """Until a worker is at a stage of a job or a task."""
        line = re.compile(rf'"item_id": "{re.escape(name)}", "stage": "{stage}"')
        until(lambda: line.search(worker.log()), PATIENCE_S, f"{name} is at {stage}")

    def mp4(self, video):
        """What a video in an answer or a storage is."""
        path = self.folder / "some.mp4"
        path.write_bytes(video)
        return probe(path)

    @property
    def bucket(self):
        """The storage, as somebody with its key sees it."""
        return Bucket(self.s3.url, self.s3.bucket, self.s3.key_id, self.s3.secret)

    @property
    def s3_config(self):
        """The same as a job brings it."""
        names = {"accessId": self.s3.key_id, "accessSecret": self.s3.secret}
        return names | {"bucketName": self.s3.bucket, "endpointUrl": self.s3.url}


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """A queue and a storage, which nobody harms."""
    with Site(tmp_path_factory.mktemp("site")) as site, S3Server() as s3:
        yield site, s3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, surroundings):
    """A house where a worker with the Wan engine lives, and the worker."""
    with RunPodCloud() as cloud:
        house = House(tmp_path_factory.mktemp("runpod"), cloud, *surroundings)
        yield house, house.worker(I2V_ENGINE="wan", I2V_WAN_PRESET="tiny")


@pytest.fixture
def house(tmp_path, surroundings):
    """A house of one's own, for tests in which workers come and go."""
    with RunPodCloud() as cloud:
        yield House(tmp_path, cloud, *surroundings)


def test_a_photo_becomes_a_video(tiny):
    """In the answer, playable; the same seed makes the same. Snapshots grow, and none comes after the result."""
    house, _ = tiny
    job = house.answer(DIRECT)
    video = job.output["video"]
    mp4 = base64.b64decode(video["base64"])
    info = house.mp4(mp4)
    assert job.status == "COMPLETED"
    assert (info.width, info.height, info.frames) == (video["width"], video["height"], video["frames"])
    assert (video["size_bytes"], video["seconds"], job.output["seed"]) == (len(mp4), pytest.approx(1, abs=0.1), 7)
    assert {"download", "encode", "denoise", "decode", "upload"} <= job.output["timings"].keys()
    assert [post.is_progress for post in job.posts] == [True] * (len(job.posts) - 1) + [False]
    fractions = [snapshot["fraction"] for snapshot in job.progress]
    assert fractions == sorted(fractions)
    assert 1 <= len(fractions) <= 2 + job.posts[-1].at - job.posts[0].at
    assert house.answer(DIRECT).output["video"]["base64"] == video["base64"]


def test_a_video_goes_where_the_job_says(tiny):
    """By a presigned PUT, or into a bucket whose key came along; photos come by URL, too. No credential is logged."""
    house, worker = tiny
    put = house.bucket.upload_url("clips/1.mp4", content_type="video/mp4")
    job = house.answer({**DIRECT, "upload_url": put})
    assert job.output["video"]["url"] == f"{house.s3.url}/{house.s3.bucket}/clips/1.mp4"
    assert len(house.s3.object_bytes("clips/1.mp4")) == job.output["video"]["size_bytes"]

    photo_put = house.bucket.upload_url("photo.jpg", content_type="image/jpeg")
    assert httpx.put(photo_put, content=jpeg(), headers={"Content-Type": "image/jpeg"}).is_success
    asked = {"photo_url": house.bucket.download_url("photo.jpg"), "prompt": "", "seconds": 1}
    job = house.answer(asked, s3Config=house.s3_config)
    answer = httpx.get(job.output["video"]["url"])
    assert (answer.status_code, house.mp4(answer.content).frames) == (200, job.output["video"]["frames"])
    assert house.s3.object_bytes(f"{job.id}.mp4") == answer.content

    log = worker.log()
    assert "X-Amz-Signature" not in log
    assert house.s3.secret not in log
    assert PHOTO[:200] not in log


def test_an_upload_that_is_refused(tiny):
    """Says whose fault it was, without the credential; a worker is not thrown away for it."""
    house, _ = tiny
    wrong = house.s3_config | {"accessSecret": "guessed"}
    job = house.answer(DIRECT, s3Config=wrong)
    assert job.status == "FAILED"
    assert f"{house.s3.bucket}/{job.id}.mp4" in job.error
    assert "X-Amz" not in job.error
    assert job.output == {"retryable": False}
    assert not job.stop_pod


@pytest.mark.parametrize(
    "payload, told",
    [
        ({"prompt": "zoom in"}, "input: nothing to do; give one of task, drain, photo_url and photo_base64"),
        ({**DIRECT, "seconds": "5"}, "seconds: input should be a valid number"),
        ({**DIRECT, "seconds": 30}, "seconds: a video of 30 s may not fit into an answer, which holds 10 MB"),
        ({**DIRECT, "preset": "5b"}, "preset: this endpoint runs tiny; 5b needs an endpoint of its own"),
        ({**DIRECT, "seconds": 0.1}, "seconds is 0.1; preset tiny makes"),
        ({**DIRECT, "photo_base64": "aGVsbG8gd29ybGQ="}, "photo"),
        ({**DIRECT, "photo_base64": "%%%"}, "photo_base64: not base64"),
        ({"task": {"item_id": "x"}, "worker_id": "w"}, "task: malformed task: photo_storage_path: field required"),
        ({"drain": -1}, "drain: input should be greater than or equal to 1"),
        ("zoom in", "input: has to be an object"),
    ],
)
def test_bad_input_is_told_in_one_line(tiny, payload, told):
    """In the job's error, where people look for it, before anything is spent."""
    house, _ = tiny
    job = house.answer(payload)
    assert job.status == "FAILED"
    assert told in job.error
    assert "\n" not in job.error
    assert "Traceback" not in job.error


def test_a_photo_that_is_not_there(tiny):
    """The storage's own answer, once, with nothing of the credential."""
    house, _ = tiny
    job = house.answer({"photo_url": house.bucket.download_url("none.jpg"), "prompt": ""})
    assert f"{house.s3.bucket}/none.jpg" in job.error
    assert "X-Amz" not in job.error
    assert job.output == {"retryable": False}


def test_bad_s3_config_is_told(tiny):
    """By its field, and without its values."""
    house, _ = tiny
    job = house.answer(DIRECT, s3Config={"accessId": "me", "accessSecret": "hush"})
    assert "s3Config: bucketName: field required" in job.error
    assert "hush" not in job.error


def test_a_cancelled_generation_leaves_the_worker_as_good_as_new(tiny):
    """Nothing is posted for it, nothing lies around, and the next job gets what it would have got."""
    house, worker = tiny
    first = house.answer(DIRECT).output["video"]["base64"]
    job_id = house.cloud.run({**DIRECT, "seconds": 3})
    house.until_stage(worker, job_id, "decode")
    house.cloud.cancel(job_id)
    assert house.answer(DIRECT).output["video"]["base64"] == first
    job = house.cloud.job(job_id)
    assert job.status == "CANCELLED"
    assert all(post.is_progress for post in job.posts)
    until(lambda: not list((house.folder / "temp").iterdir()), 10, "temporary files are gone")


def test_a_result_that_does_not_arrive_at_once(tiny):
    """It is posted again after a refusal, and after a connection that broke; the answer is the same one."""
    house, _ = tiny
    house.cloud.fail_results(1)
    house.cloud.drop_results(1)
    job = house.answer(DIRECT)
    results = [post for post in job.posts if not post.is_progress]
    assert [post.answered for post in results] == [500, None, 200]
    assert len({post.body["output"]["video"]["base64"] for post in results}) == 1
    assert job.output["seed"] == 7


def test_a_task_that_somebody_else_leased(tiny):
    """It is renewed under the name it was leased by, and reported to the queue."""
    house, _ = tiny
    [item_id] = house.site.submit(seconds=1)
    job = house.answer({"task": house.lease("cron.7"), "worker_id": "cron.7"})
    task = house.site.task(item_id)
    assert (job.output["status"], task["status"]) == ("completed", "completed")
    assert job.output["video"]["storage_path"] == task["video_storage_path"]
    assert job.output["item_id"] == item_id


def test_a_lost_lease_spends_nothing(tiny):
    """The first beat finds out, before the photo is fetched."""
    house, worker = tiny
    [item_id] = house.site.submit(seconds=1)
    task = house.lease("cron.8", length_s=1)
    until(lambda: house.lease("somebody.else", length_s=600), 10, "the lease has run out")
    job = house.answer({"task": task, "worker_id": "cron.8"})
    assert job.status == "FAILED"
    assert job.output == {"retryable": False, "item_id": item_id, "status": "lease_lost", "machine_at_fault": False}
    assert f'"item_id": "{item_id}", "stage"' not in worker.log()
    assert house.site.task(item_id)["status"] == "processing"
    house.site.ask("POST", f"tasks/{item_id}/cancel")


def test_a_drain_takes_what_there_is(tiny):
    """As many as asked for, two at a time, and no more than there are."""
    house, worker = tiny
    ids = house.site.submit(count=3, seconds=1)
    first = house.answer({"drain": 2}).output
    assert (first["completed"], len(first["tasks"])) == (2, 2)
    rest = house.answer({"drain": 10}).output
    assert {it["item_id"] for it in first["tasks"] + rest["tasks"]} == set(ids)
    assert {house.site.task(item_id)["status"] for item_id in ids} == {"completed"}
    began = [worker.log().index(f'"item_id": "{it["item_id"]}"') for it in first["tasks"]]
    ended = worker.log().index("lease_ended", max(began))
    assert max(began) < ended
    assert house.answer({"drain": 1}).output == {"tasks": [], "completed": 0}


def test_two_jobs_at_once(tiny):
    """One generates while the other waits for its turn: the platform hands out two."""
    house, _ = tiny
    ids = [house.cloud.run({**DIRECT, "seconds": 2}) for _ in range(2)]
    jobs = [house.cloud.wait(job_id, PATIENCE_S) for job_id in ids]
    assert jobs[1].started_at < jobs[0].ended_at
    assert max(job.output["timings"]["wait"] for job in jobs) > 0.2
    assert any(it.get("batch_size") == "2" for it in house.cloud.takes)
    until(lambda: any(it.get("job_id") is None for it in house.cloud.pings), 10, "pings arrive")


def test_sigterm_hands_back_what_does_not_end_in_time(house):
    """The task is free at once, the caller is told to ask again, and the process ends by itself.

    Its lease came twice, since RunPod delivers a job again when it is in doubt, and was worked on once.
    """
    worker = house.worker()
    [item_id] = house.site.submit(seconds=40)
    asked = {"task": house.lease("cron.9", 600), "worker_id": "cron.9"}
    task_job = house.cloud.run(asked)
    house.until_stage(worker, item_id, "render")
    assert house.answer(asked).error == f"task {item_id} is being worked on here under the same lease"
    direct_job = house.cloud.run({**DIRECT, "seconds": 10})
    house.until_stage(worker, direct_job, "wait")
    worker.terminate()
    answers = [house.cloud.wait(job_id) for job_id in (task_job, direct_job)]
    assert [answer.output["retryable"] for answer in answers] == [True, True]
    assert answers[1].error == "this worker is being stopped; send the job again"
    assert worker.wait() == 0
    assert worker.log().count(f'"item_id": "{item_id}", "stage": "render"') == 1
    assert house.lease("the.next")["item_id"] == item_id
    house.site.ask("POST", f"tasks/{item_id}/cancel")
    assert list((house.folder / "temp").iterdir()) == []


def test_sigterm_lets_a_job_end_in_time(house):
    """As the SDK has it, within the grace."""
    worker = house.worker(I2V_SHUTDOWN_GRACE=60)
    [item_id] = house.site.submit(seconds=2)
    job_id = house.cloud.run({"task": house.lease("cron.9", 600), "worker_id": "cron.9"})
    house.until_stage(worker, item_id, "render")
    worker.terminate()
    assert house.cloud.wait(job_id).output["status"] == "completed"
    assert worker.wait() == 0


def test_a_killed_worker_loses_no_task(house):
    """RunPod gives its job to the next one, which goes on under the same lease and delivers once."""
    first = house.worker("pod1")
    [item_id] = house.site.submit(seconds=3)
    job_id = house.cloud.run({"task": house.lease("cron.5", 600), "worker_id": "cron.5"})
    house.until_stage(first, item_id, "render")
    first.kill()
    house.worker("pod2")
    job = house.cloud.wait(job_id, PATIENCE_S)
    assert (job.retried, job.worker_id, job.output["status"]) == (1, "pod2", "completed")
    assert house.site.task(item_id)["status"] == "completed"


def test_thirty_megabytes(house):
    """By an upload every byte; in an answer as much as an answer holds, and never a result that is refused."""
    house.worker(script=ODD)
    noise = {**DIRECT, "prompt": "noise"}
    put = house.bucket.upload_url("large.mp4", content_type="video/mp4")
    stored = house.answer({**noise, "upload_url": put}).output["video"]
    assert len(house.s3.object_bytes("large.mp4")) == stored["size_bytes"] > 30_000_000
    job = house.answer(noise)
    video = job.output["video"]
    assert max(post.size_bytes for post in job.posts) < 10_000_000
    assert INLINE_BYTES / 2 < video["size_bytes"] <= INLINE_BYTES
    assert house.mp4(base64.b64decode(video["base64"])).frames == video["frames"] == stored["frames"]


def test_the_operators_bucket(house):
    """What the job does not say goes there, wherever it is; strangers' addresses stay refused."""
    house.worker(
        script=ODD,
        BUCKET_ENDPOINT_URL=house.s3.url,
        BUCKET_NAME=house.s3.bucket,
        BUCKET_ACCESS_KEY_ID=house.s3.key_id,
        BUCKET_SECRET_ACCESS_KEY=house.s3.secret,
        I2V_ALLOW_PRIVATE_ADDRESSES="false",
    )
    job = house.answer({**DIRECT, "seconds": 13})
    assert len(httpx.get(job.output["video"]["url"]).content) == job.output["video"]["size_bytes"]
    refused = house.answer({"photo_url": f"{house.s3.url}/x.jpg?key=hush", "prompt": ""})
    assert "not a public address" in refused.error
    assert "hush" not in refused.error


def test_a_lost_gpu_takes_its_worker_along(house):
    """The platform is asked for another worker; this one takes no job more, whatever becomes of that, and ends."""
    own = {"I2V_ENGINE": "preview"}
    first = house.cloud.worker(house.folder / "first", script=ODD, pod_id="first", env=own)
    job = house.answer({**DIRECT, "prompt": "lost"})
    assert job.error == "the GPU does not work any more: CUDA error: unspecified launch failure"
    assert (job.output, job.stop_pod) == ({"retryable": True}, True)
    others = [house.cloud.run(DIRECT) for _ in range(3)]
    assert first.wait() == 0
    house.worker("second", script=ODD)
    assert {house.cloud.wait(job_id, PATIENCE_S).status for job_id in others} == {"COMPLETED"}


def test_a_worker_that_cannot_work_is_unhealthy(house):
    """RunPod is told why, and no job is burnt to find out."""
    worker = house.worker(I2V_ENGINE="wan", I2V_WAN_PRESET="a14b-fast")
    job_id = house.cloud.run(DIRECT)
    assert worker.wait(PATIENCE_S) == 1
    [told] = [it for it in house.cloud.pings if it.get("status") == "unhealthy"]
    assert told["check"] == "weights_and_gpu"
    assert "i2v weights fetch" in told["reason"]
    assert house.cloud.job(job_id).status == "IN_QUEUE"


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"BUCKET_NAME": "videos"}, "BUCKET_ENDPOINT_URL, BUCKET_ACCESS_KEY_ID, BUCKET_SECRET_ACCESS_KEY: not set"),
        ({"I2V_WAN_PRESET": "14b"}, "there is no preset '14b'"),
    ],
)
def test_settings_that_cannot_work_are_told(house, settings, told):
    """By name, to the platform and in the log."""
    worker = house.worker(**settings)
    assert worker.wait(PATIENCE_S) == 1
    assert told in worker.log()
    assert any(told in it.get("reason", "") for it in house.cloud.pings)


def handler(folder, *arguments, **settings):
    """`python runpod_handler.py …` on a laptop, with no account."""
    env = environment(HOME=folder, PYTHONPATH=STAND_INS, **settings)
    command = [sys.executable, "-u", str(ROOT / "runpod_handler.py"), *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
    )


def test_one_job_on_a_laptop(tmp_path):
    """--test_input runs one job and says how it ended, in the log and by its exit code."""
    with handler(tmp_path, "--test_input", json.dumps({"input": DIRECT})) as process:
        said = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 0, said
    assert "completed successfully" in said
    with handler(tmp_path, "--test_input", json.dumps({"input": {"drain": 1}})) as process:
        said = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == 1
    assert "VERCEL_API_URL is not set on this endpoint" in said


def test_the_local_api(tmp_path):
    """The SDK's own server takes the same jobs, and ends on Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with handler(
        tmp_path, "--rp_serve_api", "--rp_api_host", "127.0.0.1", "--rp_api_port", str(port), I2V_ENGINE="preview"
    ) as process:
        url = f"http://127.0.0.1:{port}/runsync"
        lines = iter(process.stdout.readline, "")
        assert any("Uvicorn running" in line for line in lines)
        done = httpx.post(url, json={"input": DIRECT}, timeout=PATIENCE_S).json()
        refused = httpx.post(url, json={"input": {**DIRECT, "seed": "7"}}, timeout=PATIENCE_S).json()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert done["status"] == "COMPLETED"
    assert base64.b64decode(done["output"]["video"]["base64"])[4:8] == b"ftyp"
    assert (refused["status"], refused["error"]) == ("FAILED", "seed: input should be a valid integer")
