"""From GmAnimato's claim to its webhook in real processes: `i2v work`, an application, a ComfyUI, and an S3."""

import signal
from collections.abc import Iterator

import pytest

from tests.engines.comfyui.graphs import wan
from tests.support.comfy_server import ComfyServer
from tests.support.gmanimato_app import GmAnimatoServer
from tests.support.processes import Process, environment, jpeg, until
from tests.support.s3_server import S3Server

DEADLINE_S = 40.0


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    """One bucket for this module."""
    with S3Server() as server:
        yield server


@pytest.fixture
def comfy() -> Iterator[ComfyServer]:
    """A ComfyUI with one model."""
    with ComfyServer() as server:
        server.models["checkpoints"] = ["wan.safetensors"]
        yield server


@pytest.fixture
def app() -> Iterator[GmAnimatoServer]:
    """The application, without jobs."""
    with GmAnimatoServer() as server:
        yield server


@pytest.fixture
def work(tmp_path, app, comfy, s3):
    """Starts workers; kills what is left of them."""
    started: list[Process] = []

    def start(*arguments: str, bucket: bool = True, **settings: object) -> Process:
        own = {
            "I2V_ENGINE": "comfyui",
            "GMANIMATO_API_URL": app.url,
            "WORKER_TASK_SECRET": app.secret,
            "COMFY_HOST": comfy.url.removeprefix("http://"),
            "TEMP_DIR": tmp_path / "temp",
        }
        if bucket:
            own |= {
                "BUCKET_ENDPOINT_URL": s3.url,
                "BUCKET_NAME": s3.bucket,
                "BUCKET_ACCESS_KEY_ID": s3.key_id,
                "BUCKET_SECRET_ACCESS_KEY": s3.secret,
            }
        flags = ["work", "--queue", "gmanimato", "--poll-interval", "0.1", *arguments]
        name = f"worker-{len(started)}"
        started.append(Process(tmp_path, name, *flags, env=environment(**own | settings)))
        return started[-1]

    yield start
    for each in started:
        if each.exit_code is None:
            each.kill()


def add(app: GmAnimatoServer, **fields: object) -> str:
    """A job whose graph makes a clip of its photo."""
    video_id = app.add(jpeg())
    graph = wan(f"{video_id}.png")
    job = app.jobs[video_id]
    job.answer["input"] |= {"workflow": graph, "node_weights": {"6": 60, "7": 20, "9": 15}, **fields}
    return video_id


def ends_once(app: GmAnimatoServer, video_id: str, status: str) -> dict:
    """Waits for the end of a job; the body of its one final call."""
    until(lambda: app.finals(video_id), DEADLINE_S, f"{video_id} ended")
    [final] = app.finals(video_id)
    assert app.after_the_end(video_id) == []
    assert app.jobs[video_id].status == status, final.body
    return final.body


def test_a_job_from_its_claim_to_its_webhook(app, comfy, s3, work):
    """The graph ran on the photo, the video lies in the bucket, and the webhook has its plain URL; SIGTERM exits 0."""
    video_id = add(app)
    worker = work()
    ended = ends_once(app, video_id, "completed")
    [file, *_] = ended["files"]
    assert (file["type"], file["filename"][-4:]) == ("s3_url", ".mp4")
    key = file["data"].removeprefix(f"{s3.url}/{s3.bucket}/")
    assert s3.object_bytes(key)[4:8] == b"ftyp"
    assert "?" not in file["data"]
    assert app.jobs[video_id].final_url == file["data"]
    percentages = [each.body["progress"]["percentage"] for each in app.webhooks(video_id) if "progress" in each.body]
    assert percentages == sorted(percentages)
    [prompt] = comfy.ours
    [loader] = [node for node in prompt.graph.values() if node["class_type"] == "LoadImage"]
    assert comfy.uploads[loader["inputs"]["image"]] == jpeg()
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0


def test_without_a_bucket_the_video_is_in_the_call(app, work):
    """As base64, which the application stores."""
    video_id = add(app)
    work(bucket=False)
    ended = ends_once(app, video_id, "completed")
    assert ended["files"][0]["type"] == "base64"


def test_several_workers_beside_each_other(app, work):
    """Each job is made by one of them, and ends once."""
    ids = [add(app) for _ in range(6)]
    workers = [work() for _ in range(2)]
    for video_id in ids:
        ends_once(app, video_id, "completed")
    made = [len(worker.events("lease_ended", status="completed")) for worker in workers]
    assert sum(made) == 6


def test_a_worker_that_is_stopped_ends_its_job_in_words(app, comfy, work):
    """It cannot be handed back: it is failed with the reason, its prompt is gone from ComfyUI, and the exit is 0."""
    comfy.hold("KSampler")
    theirs = comfy.prompts
    video_id = add(app)
    worker = work(I2V_SHUTDOWN_GRACE=0.2)
    until(lambda: comfy.ours and comfy.ours[0].state == "running", DEADLINE_S, "the prompt runs")
    worker.send(signal.SIGTERM)
    ended = ends_once(app, video_id, "failed")
    assert "stopped" in ended["error"]
    assert worker.wait() == 0
    assert not [prompt for prompt in theirs if prompt.state in ("running", "waiting")]


def test_a_worker_that_is_stopped_finishes_within_its_grace_time(app, comfy, work):
    """No job is taken any more, and the running one is delivered."""
    comfy.hold("KSampler")
    video_id, other = add(app), add(app)
    worker = work(I2V_SHUTDOWN_GRACE=30)
    until(lambda: comfy.ours and comfy.ours[0].state == "running", DEADLINE_S, "the prompt runs")
    worker.send(signal.SIGTERM)
    until(lambda: worker.events("stopping") or "stop" in worker.stderr.read_text(), DEADLINE_S, "it heard")
    comfy.release()
    ends_once(app, video_id, "completed")
    assert worker.wait() == 0
    assert app.jobs[other].status == "in_queue"


def test_nothing_is_claimed_while_comfyui_is_away(app, comfy, work):
    """A claimed job could not be given back, so the server is waited for first."""
    comfy.stop()
    video_id = add(app)
    worker = work()
    until(lambda: worker.events("engine_unavailable"), DEADLINE_S, "it found nobody")
    assert app.jobs[video_id].status == "in_queue"
    comfy.start()
    ends_once(app, video_id, "completed")


@pytest.mark.slow
def test_comfyui_is_started_again_in_the_middle_of_a_run(app, comfy, work):
    """The prompt is forgotten there, and sent once more; the application hears of one end."""
    comfy.hold("KSampler")
    video_id = add(app)
    work()
    until(lambda: comfy.ours and comfy.ours[0].state == "running", DEADLINE_S, "the prompt runs")
    comfy.restart()
    comfy.release()
    ends_once(app, video_id, "completed")


def test_a_bucket_that_refuses_costs_one_job(app, work):
    """Rendered, and nowhere to put it: it fails with the reason, the other stays, and systemd starts nothing again."""
    video_id, other = add(app), add(app)
    worker = work("--supervised", BUCKET_SECRET_ACCESS_KEY="another-secret")
    assert "BUCKET_SECRET_ACCESS_KEY" in ends_once(app, video_id, "failed")["error"]
    assert worker.wait() == 78
    assert app.jobs[other].status == "in_queue"


def test_a_node_that_the_server_lacks_is_said(app, work):
    """The job is failed with what is missing, and where."""
    graph = wan("x.png") | {"77": {"class_type": "NoSuchNode", "inputs": {}, "_meta": {"title": "Magic"}}}
    video_id = add(app, workflow=graph)
    work()
    assert "NoSuchNode" in ends_once(app, video_id, "failed")["error"]
