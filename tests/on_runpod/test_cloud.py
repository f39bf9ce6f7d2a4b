"""The fakes that stand for RunPod and S3: the SDK's own job loop, and boto3, against them."""

import json
import socket
import threading
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from time import monotonic

import boto3
import botocore.auth
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from tests.support.processes import until
from tests.support.runpod_cloud import RunPodCloud, Worker
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow

HANDLER = """
import asyncio, functools
from pathlib import Path

import cpuinfo

cpuinfo.get_cpu_info = lambda: {"brand_raw": "any"}  # half of the time that the SDK takes to start

import runpod
from runpod.serverless.modules import rp_http

# the same retries, without their pauses of two and three seconds
rp_http.FibonacciRetry = functools.partial(rp_http.FibonacciRetry, max_timeout=0.05)
running = 0


async def handler(job):
    global running
    running += 1
    asked = job["input"]
    try:
        if "progress" in asked:
            runpod.serverless.progress_update(job, asked["progress"])
        while "gate" in asked and not Path(asked["gate"]).exists():
            await asyncio.sleep(0.02)
        while running < asked.get("company", 0):
            await asyncio.sleep(0.02)
        if asked.get("extras"):
            return {key: it for key, it in job.items() if key not in {"id", "input"}}
        return asked.get("answer", "x" * asked.get("characters", 1))
    except asyncio.CancelledError:
        print("cancelled", job["id"])
        raise
    finally:
        if "company" not in asked:
            running -= 1


runpod.serverless.start({"handler": handler, "concurrency_modifier": lambda _: 4})
"""
RESULT_LIMIT_BYTES = 2000


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """A handler that does as its input says."""
    path = tmp_path_factory.mktemp("script") / "handler.py"
    path.write_text(HANDLER)
    return path


@pytest.fixture(scope="module")
def shared(script, tmp_path_factory) -> tuple[RunPodCloud, Worker]:
    """A worker for all tests that leave it alive: the SDK takes two seconds to start."""
    folder = tmp_path_factory.mktemp("worker")
    with RunPodCloud(payload_limit_bytes=RESULT_LIMIT_BYTES) as cloud, cloud.worker(folder, script=script) as worker:
        yield cloud, worker


@pytest.fixture
def cloud() -> RunPodCloud:
    """An endpoint of its own, without workers."""
    with RunPodCloud() as cloud:
        yield cloud


def client(cloud: RunPodCloud) -> httpx.Client:
    """Somebody who has the key."""
    headers = {"Authorization": f"Bearer {cloud.api_key}"}
    return httpx.Client(base_url=f"{cloud.url}/{cloud.endpoint_id}", headers=headers, timeout=20)


def start(cloud: RunPodCloud, gate: Path, **asked: object) -> str:
    """A job whose handler runs, and goes on when there is a file at `gate`."""
    job_id = cloud.run({"gate": str(gate), "progress": "running", **asked})
    cloud.until(job_id, lambda job: job.progress)
    return job_id


# ------------------------------------------------------------ the SDK's loop


def test_a_job_goes_through_the_sdk(shared):
    """From submission to the status answer, with the envelope of the SDK and the times of the platform."""
    cloud, _ = shared
    job = cloud.wait(cloud.run({"answer": {"frames": 81}}))
    assert (job.status, job.output, job.error, job.worker_id) == ("COMPLETED", {"frames": 81}, None, "pod1")
    assert [(post.body, post.answered) for post in job.posts] == [({"output": {"frames": 81}}, 200)]
    assert job.posts[0].content_type == "application/x-www-form-urlencoded"
    with client(cloud) as http:
        answer = http.get(f"/status/{job.id}").json()
    assert answer.items() >= {"id": job.id, "status": "COMPLETED", "output": {"frames": 81}, "workerId": "pod1"}.items()
    assert answer["delayTime"] >= 0
    assert answer["executionTime"] >= 0


def test_an_error_fails_the_job(shared):
    """The key `error` of a handler's dictionary; its other keys travel as output."""
    cloud, _ = shared
    job = cloud.wait(cloud.run({"answer": {"error": "no photo", "code": "photo"}}))
    assert (job.status, job.error, job.output) == ("FAILED", "no photo", {"code": "photo"})


def test_the_worker_gets_what_came_beside_the_input(shared):
    """Such as the keys of a bucket; policy and webhook stay with the platform."""
    cloud, _ = shared
    job_id = cloud.run({"extras": True}, s3Config={"bucketName": "videos"}, policy={"executionTimeout": 60_000})
    assert cloud.wait(job_id).output == {"s3Config": {"bucketName": "videos"}}


def test_two_jobs_run_at_once(shared):
    """Each waits for the other. What the worker has room for is taken as a batch."""
    cloud, _ = shared
    jobs = [cloud.run({"company": 2}) for _ in range(2)]
    assert [cloud.wait(job_id).status for job_id in jobs] == ["COMPLETED"] * 2
    assert any(take.get("batch_size") == "4" for take in cloud.takes)


def test_the_worker_pings(shared, tmp_path):
    """With the ids of its jobs."""
    cloud, _ = shared
    job_id = start(cloud, tmp_path / "gate")
    cloud.until(job_id, lambda _: any(ping.get("job_id") == job_id for ping in cloud.pings))
    (tmp_path / "gate").touch()
    assert cloud.wait(job_id).status == "COMPLETED"


def test_progress_is_what_a_running_job_answers(shared, tmp_path):
    """Until it ends with its result."""
    cloud, _ = shared
    job_id = start(cloud, tmp_path / "gate", progress={"percent": 40})
    with client(cloud) as http:
        answer = http.get(f"/status/{job_id}").json()
        assert (answer["status"], answer["output"]) == ("IN_PROGRESS", {"percent": 40})
        assert http.get("/health").json()["workers"]["running"] == 1
    (tmp_path / "gate").touch()
    job = cloud.wait(job_id)
    assert (job.output, [post.is_progress for post in job.posts]) == ("x", [True, False])


def test_a_cancel_reaches_the_handler(shared, tmp_path):
    """As CancelledError; nothing is posted any more, and the worker goes on."""
    cloud, worker = shared
    job_id = start(cloud, tmp_path / "gate")
    cloud.cancel(job_id)
    cloud.until(job_id, lambda _: f"cancelled {job_id}" in worker.log())
    assert cloud.wait(cloud.run({})).status == "COMPLETED"
    job = cloud.job(job_id)
    assert (job.status, [post.is_progress for post in job.posts]) == ("CANCELLED", [True])


def test_a_result_is_posted_three_times(shared):
    """Refused twice with 500, it arrives in the end. Progress is not refused."""
    cloud, _ = shared
    cloud.fail_results(2)
    job = cloud.wait(cloud.run({}))
    assert (job.status, [post.answered for post in job.posts]) == ("COMPLETED", [500, 500, 200])


@pytest.mark.parametrize("fault", ["dropped", "too large", "throttled"])
def test_a_result_may_get_lost(shared, fault):
    """After a connection that breaks and after 4xx the SDK does not try again, and the job seems to run on."""
    cloud, worker = shared
    if fault == "dropped":
        cloud.drop_results(1)
    elif fault == "throttled":
        cloud.fail_results(1, 429)
    job_id = cloud.run({"characters": RESULT_LIMIT_BYTES if fault == "too large" else 1})
    lost = cloud.until(job_id, lambda _: said(worker, job_id, "Finished Job"))
    assert [post.answered for post in lost.posts] == [{"dropped": None, "too large": 413, "throttled": 429}[fault]]
    assert lost.status == "IN_PROGRESS"
    assert said(worker, job_id, "Failed to return job results")
    cloud.cancel(job_id)


def said(worker: Worker, job_id: str, message: str) -> bool:
    """Whether the SDK logged this about a job."""
    return f'"requestId": "{job_id}", "message": "{message}' in worker.log()


def test_stop_pod_ends_the_worker(cloud, script, tmp_path):
    """A handler that answers `refresh_worker` gets SIGTERM after its result."""
    with cloud.worker(tmp_path, script=script) as worker:
        job = cloud.wait(cloud.run({"answer": {"refresh_worker": True, "frames": 81}}))
        assert (job.status, job.output, job.stop_pod) == ("COMPLETED", {"frames": 81}, True)
        assert worker.wait() == 0


def test_sigterm_lets_a_job_finish(cloud, script, tmp_path):
    """It is posted, and the worker ends with 0; nothing new is taken meanwhile."""
    with cloud.worker(tmp_path, script=script) as worker:
        job_id = start(cloud, tmp_path / "gate")
        worker.terminate()
        late = cloud.run({})
        (tmp_path / "gate").touch()
        assert cloud.wait(job_id).status == "COMPLETED"
        assert worker.wait() == 0
        assert cloud.job(late).status == "IN_QUEUE"


def test_a_killed_workers_job_goes_back_to_the_queue(cloud, script, tmp_path):
    """Another worker gets it. No process of the killed one is left, so nothing pings."""
    with cloud.worker(tmp_path, script=script) as worker:
        job_id = start(cloud, tmp_path / "gate")
        worker.kill()
        assert worker.exit_code == -9
    job = cloud.job(job_id)
    assert (job.status, job.worker_id, job.retried) == ("IN_QUEUE", None, 1)
    until(lambda: not alive(worker.pid), 20, "its children are gone")
    with client(cloud) as http:
        assert http.get("/job-take/pod2?gpu=none").json()["id"] == job_id
        assert http.get("/health").json()["jobs"]["retried"] == 1


def alive(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text().rpartition(") ")[2].split()[:3]
        except OSError:  # gone meanwhile
            continue
        if state != "Z" and int(its_group) == group:
            found.append(int(stat.parent.name))
    return found


# ------------------------------------------------------------ the endpoint


def test_requests_are_checked(cloud):
    """Key, address, size, shape and policy."""
    cloud.payload_limit_bytes = 100
    with client(cloud) as http:
        assert http.get("/health", headers={"Authorization": "Bearer other"}).status_code == 401
        assert http.get("/health", headers={"Authorization": cloud.api_key}).status_code == 200
        assert http.get(f"{cloud.url}/other/health").status_code == 404
        assert http.get("/status/other").status_code == 404
        assert http.post("/run", json={"input": "x" * 100}).status_code == 413
        assert http.post("/runsync", json={}).status_code == 400
        for body in ({}, [], {"input": {}, "policy": {"executionTimeout": 5000}}, {"input": {}, "policy": {"ttl": 9}}):
            assert http.post("/run", json=body).status_code == 400
        assert cloud.jobs == {}


def test_a_queued_job_is_cancelled_at_once(cloud):
    """By itself or with the queue."""
    with client(cloud) as http:
        first, second = (http.post("/run", json={"input": {}}).json()["id"] for _ in range(2))
        assert http.post(f"/cancel/{first}").json() == {"id": first, "status": "CANCELLED"}
        assert http.get("/health").json()["jobs"]["inQueue"] == 1
        assert http.post("/purge-queue").json()["removed"] == 1
        assert cloud.job(second).status == "CANCELLED"


def test_jobs_time_out(cloud):
    """In the queue, and at work: then the worker is told."""
    cloud.queue_limit_s = 0.05
    assert cloud.wait(cloud.run({})).status == "TIMED_OUT"
    cloud.queue_limit_s, cloud.execution_limit_s = 60, 0.05
    with client(cloud) as http:
        job_id = cloud.run({})
        assert http.get("/job-take/pod2?gpu=none").json() == {"id": job_id, "input": {}}
        assert http.get("/job-stop/pod2?gpu=none").json() == {"jobsToStop": [job_id]}
    assert cloud.job(job_id).status == "TIMED_OUT"


def test_runsync_waits_for_the_result(cloud):
    """And says where the job is when it takes too long."""
    cloud.sync_wait_s = 0.05
    with client(cloud) as http:
        answer = http.post("/runsync", json={"input": {}}).json()
        assert answer["status"] == "IN_QUEUE"
        cloud.cancel(answer["id"])
        cloud.sync_wait_s = 20
        answers = []
        thread = threading.Thread(
            target=lambda: answers.append(http.post("/runsync", json={"input": {}}).json()), daemon=True
        )
        thread.start()
        job = http.get("/job-take/pod2?gpu=none").json()
        http.post(f"/job-done/pod2/{job['id']}?gpu=none", content='{"output": 7}')
        thread.join(20)
        assert [(it["status"], it["output"]) for it in answers] == [("COMPLETED", 7)]


def test_parts_of_a_stream_are_read_once(cloud):
    """Whatever has come since the last look."""
    with client(cloud) as http:
        job_id = cloud.run({})
        http.get("/job-take/pod2?gpu=none")
        http.post(f"/job-stream/pod2/{job_id}?gpu=none", json={"output": 1})
        assert http.get(f"/stream/{job_id}").json() == {"status": "IN_PROGRESS", "stream": [{"output": 1}]}
        assert http.post(f"/stream/{job_id}").json()["stream"] == []


def test_what_comes_after_the_end_changes_nothing(cloud):
    """It is in the books all the same."""
    with client(cloud) as http:
        job_id = cloud.run({})
        http.get("/job-take/pod2?gpu=none")
        for body in ({"output": 1}, {"status": "IN_PROGRESS", "output": 2}, {"error": "3"}):
            http.post(f"/job-done/pod2/{job_id}?gpu=none", json=body)
    job = cloud.job(job_id)
    assert (job.status, job.output, job.error, job.progress) == ("COMPLETED", 1, None, [])
    assert [post.is_progress for post in job.posts] == [False, True, False]


def test_a_webhook_is_called_until_it_says_200(cloud):
    """Three times at most."""
    cloud.webhook_pause_s = 0
    statuses, bodies = [500, 202, 200], []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses[len(bodies) - 1])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with HTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        job_id = cloud.run({}, webhook=f"http://127.0.0.1:{server.server_port}/hook")
        cloud.cancel(job_id)
        until(lambda: len(cloud.webhooks) == 3, 20, "three calls")
        server.shutdown()
    assert bodies == [{"id": job_id, "status": "CANCELLED"}] * 3
    assert [status for _, _, status in cloud.webhooks] == statuses


def test_long_polls_end_with_the_cloud():
    """And not after their hold."""
    with RunPodCloud() as cloud:
        cloud.poll_s = 60
        host, port = cloud.url.removeprefix("http://").removesuffix("/v2").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            ask = f"GET /v2/ep1/job-take/pod2?gpu=none HTTP/1.1\r\nAuthorization: {cloud.api_key}\r\n\r\n"
            connection.sendall(ask.encode())
            until(lambda: cloud.takes, 20, "the poll has arrived")
            closed_at = monotonic()
            cloud.__exit__(None)
            assert connection.recv(100).startswith(b"HTTP/1.1 204")
        assert monotonic() - closed_at < 5


# ------------------------------------------------------------ S3


@pytest.fixture(scope="module")
def s3() -> S3Server:
    """A bucket."""
    with S3Server() as server:
        yield server


def bucket(s3: S3Server, **changed: str) -> "boto3.client":
    """As whoever has the keys sees it."""
    keys = {"aws_access_key_id": s3.key_id, "aws_secret_access_key": s3.secret} | changed
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"max_attempts": 0})
    return boto3.client("s3", endpoint_url=s3.url, region_name="us-east-1", config=config, **keys)


def test_s3_keeps_objects(s3):
    """With their type."""
    assert s3.object_bytes("clips/1.mp4") is None
    bucket(s3).put_object(Bucket=s3.bucket, Key="clips/1.mp4", Body=b"video", ContentType="video/mp4")
    assert s3.object_bytes("clips/1.mp4") == b"video"
    assert [key for key in s3.keys() if key.startswith("clips/")] == ["clips/1.mp4"]  # noqa: SIM118
    assert bucket(s3).head_object(Bucket=s3.bucket, Key="clips/1.mp4")["ContentType"] == "video/mp4"


@pytest.mark.parametrize("changed", [{"aws_secret_access_key": "wrong"}, {"aws_access_key_id": "nobody"}])
def test_s3_refuses_other_keys(s3, changed):
    """Signatures are really checked."""
    with pytest.raises(ClientError) as caught:
        bucket(s3, **changed).put_object(Bucket=s3.bucket, Key="stolen", Body=b"")
    assert caught.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403
    assert s3.object_bytes("stolen") is None


def presign(s3: S3Server, call: str, key: str, **headers: str) -> str:
    """A URL that needs no keys for a minute."""
    return bucket(s3).generate_presigned_url(call, {"Bucket": s3.bucket, "Key": key, **headers}, ExpiresIn=60)


def test_s3_serves_presigned_urls(s3):
    """Each for its own key, method and signed headers."""
    put, mp4 = presign(s3, "put_object", "p.mp4", ContentType="video/mp4"), {"Content-Type": "video/mp4"}
    assert httpx.put(put, content=b"clip", headers={"Content-Type": "text/html"}).status_code == 403
    assert httpx.put(put, content=b"clip", headers=mp4).status_code == 200
    get = presign(s3, "get_object", "p.mp4")
    assert httpx.get(get).content == b"clip"
    assert httpx.put(get, content=b"other").status_code == 403
    assert httpx.get(get.replace("p.mp4", "q.mp4")).status_code == 403
    assert httpx.get(get.partition("?")[0]).status_code == 400
    assert s3.object_bytes("p.mp4") == b"clip"


def test_s3_refuses_expired_urls(s3, monkeypatch):
    """With 400, where AWS says 403; the code is the same."""
    hour_ago = datetime.now(UTC).replace(tzinfo=None) - timedelta(hours=1)
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: hour_ago)
    answer = httpx.put(presign(s3, "put_object", "late.mp4"), content=b"clip")
    assert (answer.status_code, "AccessDenied" in answer.text) == (400, True)
    assert s3.object_bytes("late.mp4") is None
