"""An endpoint with the real ComfyUI engine, and the servers around it on loopback: ComfyUI, S3 and GmAnimato."""

import base64
import io
import json

import pytest
from PIL import Image

from inference.engines.comfyui.api import ComfyApi
from inference.engines.comfyui.engine import ComfyEngine
from inference.engines.comfyui.run import Run
from inference.leasing.executor import MAX_FAULTS_IN_A_ROW
from inference.media.video import probe
from inference.on_runpod.worker import RunPodWorker
from inference.settings import Settings
from tests.engines.comfyui.graphs import still, wan
from tests.support.comfy_server import ComfyServer
from tests.support.gmanimato_app import GmAnimatoServer
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.anyio


def png():
    """A small picture."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(file, "PNG")
    return file.getvalue()


PNG = png()


@pytest.fixture
def comfy(monkeypatch):
    """A ComfyUI with one model, and an engine that does not wait long for it."""
    monkeypatch.setattr(ComfyApi, "pause_s", 0.01)
    for name in ("look_s", "end_s", "lost_s", "first_pause_s", "longest_pause_s", "stop_pause_s"):
        monkeypatch.setattr(Run, name, 0.02)
    monkeypatch.setattr(Run, "socket_s", 0.3)
    with ComfyServer(pace_s=0) as server:
        server.models["checkpoints"] = ["wan.safetensors"]
        yield server


class Box:
    """An endpoint with an engine for a ComfyUI."""

    def __init__(self, folder, comfy, **settings):
        self.folder = folder
        own = {"temp_dir": folder / "temp", "engine": "comfyui", "allow_private_addresses": True}
        self.endpoint = RunPodWorker(Settings.isolated(**own, **settings))
        self.endpoint._engine = ComfyEngine(comfy.url, patience_s=1)
        self.posted = []

    async def post(self, snapshot):
        """As RunPod takes it."""
        self.posted.append(json.loads(json.dumps(snapshot)))

    async def run(self, job_id, payload):
        """One job's answer, as it travels."""
        return json.loads(json.dumps(await self.endpoint.run({"id": job_id, "input": payload}, self.post)))

    def probe(self, mp4):
        """What a video is."""
        path = self.folder / "back.mp4"
        path.write_bytes(mp4)
        return probe(path)


async def test_a_workflow_of_worker_comfyui_comes_back_with_its_video(comfy, tmp_path):
    """Which that worker itself would leave out."""
    box = Box(tmp_path, comfy)
    image = {"name": "x.png", "image": base64.b64encode(PNG).decode()}
    answer = await box.run("j1", {"workflow": wan("x.png"), "images": [image], "node_weights": {"6": 60}})
    [video] = answer["images"]
    assert (video["type"], video["filename"].endswith(".mp4")) == ("base64", True)
    info = box.probe(base64.b64decode(video["data"]))
    assert (info.width, info.height, info.frames, info.codec) == (64, 48, 9, "h264")
    assert list(comfy.uploads.values()) == [PNG]
    assert list((tmp_path / "temp").iterdir()) == []


async def test_what_the_image_lacks_costs_nobody_a_worker(comfy, tmp_path):
    """Callers may ask for any node; other workers of the endpoint have no more, and other jobs go on here."""
    box = Box(tmp_path, comfy)
    lacking = wan() | {"6": {"class_type": "WanMoeKSampler", "inputs": {}, "_meta": {"title": "Wan MoE KSampler"}}}
    picture = base64.b64encode(PNG).decode()
    images = [{"name": "x.png", "image": picture}]
    answers = [await box.run("j1", {"workflow": lacking, "images": images}) for _ in range(MAX_FAULTS_IN_A_ROW)]
    answers.append(await box.run("j2", {"photo_base64": picture, "prompt": "zoom in"}))
    assert "WanMoeKSampler" in answers[0]["error"]
    assert "I2V_COMFY_WORKFLOW" in answers[-1]["error"]
    assert [(answer["retryable"], "refresh_worker" in answer) for answer in answers] == [(False, False)] * len(answers)
    assert "images" in await box.run("j3", {"workflow": wan(), "images": images})


async def test_a_workflow_without_a_video_says_so(comfy, tmp_path):
    """It has none anywhere."""
    answer = await Box(tmp_path, comfy).run("j2", {"workflow": still()})
    assert "no video" in answer["error"]
    assert not answer["retryable"]


async def test_a_comfyui_that_died_ends_its_worker(comfy, tmp_path):
    """Jobs may be sent again, and after three the platform is asked for a worker with another one."""
    box = Box(tmp_path, comfy)
    await box.run("j1", {"workflow": still()})
    comfy.stop()
    box.endpoint._engine._patience_s = 0.05
    answers = [await box.run("j2", {"workflow": still()}) for _ in range(MAX_FAULTS_IN_A_ROW)]
    assert all(answer["retryable"] for answer in answers)
    assert ["refresh_worker" in answer for answer in answers] == [False, False, True]


async def test_a_job_that_gmanimato_sends_to_runpod(comfy, tmp_path):
    """From its payload to its own page: photo by URL, progress and one end through the webhook, a URL that it keeps."""
    with S3Server() as s3, GmAnimatoServer() as app:
        bucket = {
            "bucket_url": s3.url,
            "bucket_name": s3.bucket,
            "bucket_key_id": s3.key_id,
            "bucket_secret": s3.secret,
        }
        box = Box(tmp_path, comfy, **bucket)
        video_id = app.add(PNG, workflow=wan("x.png"))
        job = app.jobs[video_id]
        payload = job.answer["input"]
        payload["images"][0]["name"] = "x.png"
        answer = await box.run(job.job_id, payload | {"callback_url": f"{app.url}/api/i2v-webhook/{video_id}"})
        [end] = app.finals(video_id)
        assert app.after_the_end(video_id) == []
        assert app.look(video_id) == "completed"
        assert end.body["files"] == answer["files"]
        key = f"{job.job_id}/{answer['images'][0]['filename']}"
        assert job.final_url == f"{s3.url}/{s3.bucket}/{key}"
        assert box.probe(s3.object_bytes(key)).frames == 9
